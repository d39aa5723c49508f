"""Images with something beside them: captions, boxes, questions; from folders, tables or a metadata file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d.data.base import SPLITS, Split
from s2d.data.image_folders import IMAGE_NAMES, PREFIX, beside, column_of, image_source, tables_in
from s2d.data.split_files import SPLIT_NAMES
from s2d.data.splits import CARVED, carve
from s2d.data.tables import TABLE_SUFFIXES, Table, read_table
from s2d.errors import InputError
from s2d.optional import require


@dataclass(frozen=True)
class ImageRow:
    """One image, not yet decoded, and what stands beside it.

    Attributes:
        source: Its file, or its bytes as they were stored.
        cells: Values of the columns asked for, in their order.
        place: Where it stands, for messages.
    """

    source: Path | bytes
    cells: tuple[Any, ...]
    place: str

    def content(self) -> bytes:
        """What identifies the image wherever it is kept: the stored bytes, or the end of the path."""
        return self.source if isinstance(self.source, bytes) else "/".join(self.source.parts[-2:]).encode()


def read_image_rows(
    data: str | os.PathLike[str], image: str | None, columns: Mapping[str, Column]
) -> dict[Split, list[ImageRow]]:
    """The rows of all splits; those that are missing are taken out of train, by a hash of the image.

    Args:
        data: See the head of this file.
        image: Name of the image column; found by usual names when None.
        columns: What to read beside the image, by what it is.

    Raises:
        InputError: Nothing that can be read is there, or a column is missing.
    """
    data = os.fspath(data)
    if data.startswith(PREFIX):
        splits = _of_datasets(data, image, columns)
    else:
        path = Path(data).expanduser()
        if not path.exists():
            raise InputError(f"there is no folder or file {data!r} with the images (a data set: {PREFIX}NAME)")
        tables = {split: [(file, file.parent) for file in files] for split, files in tables_in(path).items()}
        if not tables:
            tables = _metadata_in(path)
            image = image or "file_name"
        splits = {
            split: [row for file, folder in files for row in _of_table(read_table(file), folder, image, columns)]
            for split, files in tables.items()
        }
    if not splits.get("train"):
        raise InputError(f"{data} has no images to train on; it has {', '.join(splits) or 'nothing'}")
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


def _metadata_in(path: Path) -> dict[Split, list[tuple[Path, Path]]]:
    """The metadata file of each split's folder, or of the folder itself, which then is train."""
    found: dict[Split, list[tuple[Path, Path]]] = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            file = _metadata_of(path / name)
            if file is not None:
                found[split] = [(file, file.parent)]
    alone = _metadata_of(path)
    if not found and alone is not None:
        found = {"train": [(alone, path)]}
    if not found:
        raise InputError(
            f"{path} has no Parquet files named after splits and no metadata file (metadata.jsonl, .csv) with file_name"
        )
    return found


def _metadata_of(folder: Path) -> Path | None:
    names = [f"metadata{suffix}" for suffix in TABLE_SUFFIXES]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _of_table(table: Table, folder: Path, image: str | None, columns: Mapping[str, Column]) -> Iterator[ImageRow]:
    name = column_of(table.columns, image, IMAGE_NAMES, "image", str(table.path))
    picked = [column_of(table.columns, given, usual, what, str(table.path)) for what, (given, usual) in columns.items()]
    cells = [table.column(column) for column in picked]
    for number, (cell, values) in enumerate(zip(table.column(name), zip(*cells, strict=True), strict=True)):
        place = f"{table.path}, row {number + table.first_line}"
        source = image_source(cell, place)
        yield ImageRow(beside(folder, source, place) if isinstance(source, Path) else source, values, place)


def _of_datasets(data: str, image: str | None, columns: Mapping[str, Column]) -> dict[Split, list[ImageRow]]:
    library = require("datasets", "vision")
    name = data.removeprefix(PREFIX)
    try:
        loaded = library.load_from_disk(name) if Path(name).is_dir() else library.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{data}: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    splits: dict[Split, list[ImageRow]] = {}
    for split, spellings in SPLIT_NAMES.items():
        table = next((loaded[spelling] for spelling in spellings if spelling in loaded), None)
        if table is None:
            continue
        pick = column_of(table.column_names, image, IMAGE_NAMES, "image", data)
        others = [column_of(table.column_names, given, usual, what, data) for what, (given, usual) in columns.items()]
        table = table.select_columns([pick, *others]).cast_column(pick, library.Image(decode=False))
        splits[split] = [
            ImageRow(image_source(row[pick], f"{data}, {split} {n}"), tuple(row[c] for c in others), f"{split} {n}")
            for n, row in enumerate(table, 1)
        ]
    return splits


# What a column is: the name that was given, or None, and the usual names it is looked for under.
Column = tuple[str | None, Sequence[str]]
