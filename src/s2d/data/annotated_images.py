"""Images with annotations (captions, boxes, questions), from folders, tables or a metadata file."""

from __future__ import annotations

import os
from pathlib import Path

from s2d.data.base import SPLITS, Split
from s2d.data.image_rows import Columns, ImageRow, of_table, read_splits
from s2d.data.split_files import SPLIT_NAMES
from s2d.data.splits import CARVED, carve
from s2d.data.tables import TABLE_SUFFIXES
from s2d.errors import InputError


def read_image_rows(data: str | os.PathLike[str], image: str | None, columns: Columns) -> dict[Split, list[ImageRow]]:
    """The rows of all splits. A missing split is taken out of train, by a hash of the image.

    Args:
        data: See the head of this file.
        image: Name of the image column; found by usual names when None.
        columns: Columns to read beside the image, by their meaning.

    Raises:
        InputError: Nothing that can be read is there, or a column is missing.
    """
    data = os.fspath(data)

    def of_metadata(path: Path) -> dict[Split, list[ImageRow]]:
        files = _metadata_in(path)
        return {split: list(of_table(file, image or "file_name", columns)) for split, file in files.items()}

    splits = read_splits(data, image, columns, of_metadata).rows
    for split, share in CARVED:
        if split not in splits:
            rows = splits["train"]
            images = list(dict.fromkeys(row.content() for row in rows))
            _, taken = carve([""] * len(images), images, share)
            apart = {images[index] for index in taken}
            splits["train"] = [row for row in rows if row.content() not in apart]
            splits[split] = [row for row in rows if row.content() in apart]
            if not splits[split] or not splits["train"]:
                raise InputError(f"{data} has too few images to take a {split} split out of them; add one")
    return {split: splits[split] for split in SPLITS}


def _metadata_in(path: Path) -> dict[Split, Path]:
    """The metadata file of each split's folder, or of the folder itself, which then is train."""
    found: dict[Split, Path] = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            file = _metadata_of(path / name)
            if file is not None:
                found[split] = file
    alone = _metadata_of(path)
    if not found and alone is not None:
        found = {"train": alone}
    if not found:
        raise InputError(
            f"{path} has no Parquet files named after splits and no metadata file (metadata.jsonl, .csv) with file_name"
        )
    return found


def _metadata_of(folder: Path) -> Path | None:
    names = [f"metadata{suffix}" for suffix in TABLE_SUFFIXES]
    return next((folder / name for name in names if (folder / name).is_file()), None)
