"""Pictures with several garments of Fashion-MNIST and the boxes around them, as folders for the task detection.

    python benchmarks/fashion_boxes.py /usr/share/datasets/fashion-mnist --out runs/fashion-boxes [--train N] [--test N]

Each picture has 56x56 pixels and one to three garments, each whole, at random places where boxes cover each other by
less than a tenth. Boxes are those of the pixels that are not black. Garments of the data's test files are in test
alone; validation has other garments than train.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from s2d.data.idx import idx_in, read_images, read_labels

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
EDGE, MOST, TRIES = 56, 3, 20


def cut_out(packed: bytes) -> np.ndarray:
    """A garment without the black around it."""
    pixels = np.frombuffer(packed[-28 * 28 :], np.uint8).reshape(28, 28)
    rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def covered(box: list[int], others: list[list[int]]) -> float:
    """The largest share of a box, ``[x, y, width, height]``, or of another that both cover."""
    x, y, width, height = box
    shares = [0.0]
    for a, b, c, d in others:
        both = max(0, min(x + width, a + c) - max(x, a)) * max(0, min(y + height, b + d) - max(y, b))
        shares.append(both / min(width * height, c * d))
    return max(shares)


def picture(
    garments: list[bytes], labels: list[int], draw: np.random.Generator
) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """One picture and its objects."""
    canvas = np.zeros((EDGE, EDGE), np.uint8)
    boxes: list[list[int]] = []
    names: list[str] = []
    for number in draw.integers(0, len(garments), draw.integers(1, MOST + 1)):
        garment = cut_out(garments[number])
        height, width = garment.shape
        for _ in range(TRIES):
            box = [int(draw.integers(0, EDGE - width + 1)), int(draw.integers(0, EDGE - height + 1)), width, height]
            if covered(box, boxes) < 0.1:
                place = canvas[box[1] : box[1] + height, box[0] : box[0] + width]
                np.maximum(place, garment, out=place)
                boxes.append(box)
                names.append(CLASSES[labels[number]])
                break
    return canvas, {"bbox": boxes, "category": names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = idx_in(arguments.data)
    read = {split: (read_images(images), read_labels(labels)) for split, (images, labels) in files.items()}
    images, labels = read["train"]
    kept = read | {"train": (images[:-5000], labels[:-5000]), "validation": (images[-5000:], labels[-5000:])}
    for number, split in enumerate(("train", "validation", "test")):
        draw = np.random.default_rng([arguments.seed, number])
        folder = arguments.out / split
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for row in range(getattr(arguments, split)):
            canvas, objects = picture(*kept[split], draw)
            Image.fromarray(canvas).save(folder / f"{row:05}.png")
            lines.append(json.dumps({"file_name": f"{row:05}.png", "objects": objects}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{split}: {len(lines)} pictures, for example {lines[0]}")


if __name__ == "__main__":
    main()
