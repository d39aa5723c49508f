"""Labelled images on disk: folders of classes, Parquet with an image column, MNIST's files, the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from s2d.data.base import SPLITS, Split
from s2d.data.idx import idx_in, placed_images, read_labels
from s2d.data.image_rows import IMAGE_SUFFIXES, ImageRow, read_splits
from s2d.data.split_files import SPLIT_NAMES
from s2d.data.splits import CARVED, carve
from s2d.errors import InputError

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "category")


def read_labelled_images(
    data: str, image: str | None = None, label: str | None = None
) -> tuple[dict[Split, list[ImageRow]], tuple[str, ...]]:
    """All images of all splits, each with the name of its class, and the names of the classes in order.

    Args:
        data: A folder with ``train`` (``validation``, ``test``) folders of one folder a class, or of class folders
            alone; a folder with Parquet files named after the splits, or one such file; a folder with the files of
            MNIST or of a data set like it; ``datasets:NAME``.
        image: Name of the image column; found by usual names when None.
        label: Name of the label column; likewise.

    Raises:
        InputError: Nothing that can be read is there, a class folder is empty, or a class is missing from train.
    """
    found = read_splits(
        data, image, {"label": (label, _LABEL_NAMES)}, lambda path: _from_idx(idx_in(path)) or _from_folders(path)
    )
    names = found.names.get("label")
    splits = {split: [_named(row, names) for row in rows] for split, rows in found.rows.items()}
    for split, share in CARVED:
        if split not in splits:
            splits["train"], splits[split] = _carve(splits["train"], share, split, data)
    classes = names or _sorted({example.cells[0] for example in splits["train"]})
    if len(classes) < 2:
        raise InputError(f"{data}: all images of train are of one class ({''.join(classes)}); two classes are needed")
    known = set(classes)
    for split in SPLITS:
        for example in splits[split]:
            if example.cells[0] not in known:
                raise InputError(
                    f"{example.place}: class {example.cells[0]!r} does not occur in train; "
                    "add images of it there, or leave it out"
                )
    return {split: splits[split] for split in SPLITS}, classes


def _sorted(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def _carve(examples: list[ImageRow], share: float, split: Split, data: str) -> tuple[list[ImageRow], list[ImageRow]]:
    stay, taken = carve([example.cells[0] for example in examples], [example.content() for example in examples], share)
    if not taken:
        raise InputError(f"{data} has too few images to take a {split} split out of them; add a {split} folder or file")
    return [examples[index] for index in stay], [examples[index] for index in taken]


# -- folders


def _from_folders(path: Path) -> dict[Split, list[ImageRow]]:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder of images nor a Parquet file")
    found: dict[Split, list[ImageRow]] = {}
    for split, names in SPLIT_NAMES.items():
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder is not None:
            found[split] = list(_classes_in(folder))
    return found or {"train": list(_classes_in(path))}


def _classes_in(folder: Path) -> Iterator[ImageRow]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} holds no folders; put the images of each class into a folder named after it")
    for name in classes:
        files = sorted(file for file in name.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"the class folder {name} holds no images; remove it or fill it")
        for file in files:
            yield ImageRow(file, (name.name,), str(file))


def _named(row: ImageRow, names: tuple[str, ...] | None) -> ImageRow:
    """The row with the name of its class."""
    value = row.cells[0]
    if value is None:
        raise InputError(f"{row.place}: the label is empty; remove or repair the row")
    if names is None or isinstance(value, str):
        return replace(row, cells=(str(value),))
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise InputError(
            f"{row.place}: label {value!r} is outside the {len(names)} classes of the data set; repair the row"
        )
    return replace(row, cells=(names[value],))


# -- MNIST's files


def _from_idx(files: dict[Split, tuple[Path, Path]]) -> dict[Split, list[ImageRow]]:
    found: dict[Split, list[ImageRow]] = {}
    for split, (images, labels) in files.items():
        pixels, numbers = list(placed_images(images)), read_labels(labels)
        if len(pixels) != len(numbers):
            raise InputError(f"{images} holds {len(pixels)} images, {labels.name} beside it {len(numbers)} labels")
        found[split] = [
            ImageRow(source, (str(number),), place) for (place, source), number in zip(pixels, numbers, strict=True)
        ]
    return found
