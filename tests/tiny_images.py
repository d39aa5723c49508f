"""Small pictures on disk, in every layout that is read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

CLASSES = ("cat", "dog", "eel")


def picture(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG of random pixels around a colour that depends on `number` modulo 3."""
    from PIL import Image

    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 60, (size[1], size[0], 3))
    pixels[..., number % 3] += 150
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_folders(path: Path, counts: dict[str, int]) -> Path:
    """``path/SPLIT/CLASS/N.png``; the split ``""`` puts the classes directly into `path`."""
    for split, count in counts.items():
        for label, name in enumerate(CLASSES):
            folder = path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(picture(3 * number + label))
    return path


def make_parquet(path: Path, count: int, *, names: bool = True) -> Path:
    """One Parquet file as the `datasets` library writes them, with or without the names of the classes."""
    import pyarrow
    import pyarrow.parquet

    rows = range(3 * count)
    table = pyarrow.table(
        {
            "image": [{"bytes": picture(row), "path": f"{row}.png"} for row in rows],
            "label": pyarrow.array([row % 3 for row in rows], pyarrow.int64()),
        }
    )
    if names:
        features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


def make_idx(path: Path, counts: dict[str, int], size: tuple[int, int] = (9, 7)) -> Path:
    """``train``, ``t10k``, ... as MNIST's files, compressed where the name of the split says so (``train.gz``)."""
    import gzip

    path.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        split, _, suffix = name.partition(".")
        generator = np.random.default_rng(count)
        pixels = generator.integers(0, 256, (count, *size), dtype=np.uint8)
        labels = (np.arange(count) % 3).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            packed = header + array.tobytes()
            file = path / f"{split}-{kind}-ubyte{'.gz' if suffix else ''}"
            file.write_bytes(gzip.compress(packed) if suffix else packed)
    return path
