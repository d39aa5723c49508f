"""The smoke test of a recipe: the same stages, methods and task on a tiny random model and made-up data, offline.

It takes about a minute and shows that a recipe runs from end to end on this machine. Its numbers mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from s2d.baselines import KEY
from s2d.errors import InputError
from s2d.experiments.recipe import Recipe
from s2d.io.files import write_atomic
from s2d.optional import require

CLASSES = ("circle", "square", "cross")
_PER_CLASS = {"train": 16, "validation": 4, "test": 8}
# Options that name columns and classes of the real data.
_COLUMNS = ("image", "label", "classes", "caption", "question", "answer", "objects")
_EDGE = 40  # size of an image; it differs from the models' size, so that resizing is tested too


def smoke_test(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a few steps of few examples, a tiny model, and data that are written into a folder.

    Raises:
        InputError: The recipe lacks a setting that its smoke test needs.
    """
    if recipe.smoke is None:
        raise InputError(
            "this recipe has no smoke section, the tiny model that stands in; for images: -o smoke=new:vit-tiny"
        )
    options = {name: value for name, value in recipe.task.options.items() if name not in _COLUMNS}
    # Tiny random models have no outliers; the decay should have something to do all the same.
    eager = {"refresh_every": 2, "threshold": 0.1, "outlier_ratio": 1.5}
    plain = [name for name, decay in recipe.arms.items() if decay is None or KEY in decay]  # no decay to strengthen
    arms = {name: decay if name in plain else {**(decay or {}), **eager} for name, decay in recipe.arms.items()}
    train = {"steps": 4, "batch_size": 8, "checkpoints": ()}
    content = recipe.model_dump() | {
        "about": f"Only a trial: {recipe.about}",
        "model": recipe.smoke,
        "task": {"name": recipe.task.name, **options, "data": str(_images(folder))},
        "train": recipe.train.model_dump() | train,
        "arms": arms,
        "seeds": recipe.seeds[:1],
        "batch_size": 16,
        "reference": None,
    }
    content["quantize"]["calibration"] = {"samples": 8, "batch_size": 8}
    if recipe.qat is not None:
        content["qat"] |= {"steps": 3}
    return Recipe.model_validate(content)


def _images(folder: Path) -> Path:
    """Coloured shapes, a folder for each class and split, and beside them what other tasks read: captions, questions,
    boxes, running text.
    """
    image = require("PIL.Image", "vision")
    draw = require("PIL.ImageDraw", "vision")
    generator = torch.Generator().manual_seed(0)
    for split, count in _PER_CLASS.items():
        rows: list[dict[str, Any]] = []
        for label, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                colour, back = torch.randint(0, 256, (2, 3), generator=generator).tolist()
                x, y, r = torch.randint(8, 16, (3,), generator=generator).tolist()
                picture = image.new("RGB", (_EDGE, _EDGE), tuple(back))
                pen = draw.Draw(picture)
                box = (x, y, x + 2 * r - 6, y + 2 * r - 6)
                if name == "circle":
                    pen.ellipse(box, fill=tuple(colour))
                elif name == "square":
                    pen.rectangle(box, fill=tuple(colour))
                else:
                    pen.line(box, fill=tuple(colour), width=4)
                    pen.line((box[0], box[3], box[2], box[1]), fill=tuple(colour), width=4)
                write_atomic(place / f"{number:03}.png", lambda file, picture=picture: picture.save(file, "PNG"))
                rows.append(
                    {
                        "file_name": f"{name}/{number:03}.png",
                        "text": f"a {name}",
                        "question": ("what is it?", "is it a circle?")[number % 2],
                        "answer": (name, "yes" if name == "circle" else "no")[number % 2],
                        "objects": {"bbox": [[x, y, 2 * r - 6, 2 * r - 6]], "category": [label]},
                    }
                )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(folder / split / "metadata.jsonl", lambda file, lines=lines: file.write(lines.encode()))
        story = "".join(f"{row['text']} lies beside {row['file_name']}\n" for row in rows * 8)
        write_atomic(folder / f"{split}.txt", lambda file, story=story: file.write(story.encode()))
    return folder
