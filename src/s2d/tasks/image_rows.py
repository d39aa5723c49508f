"""Images with something beside each: captions, a question and its answers, boxes; and what tasks on them share.

Three layouts are read: Parquet files named after the splits, folders of images with a ``metadata`` file (JSON lines,
CSV or Parquet, with a ``file_name`` column: the layout of the `datasets` library), and ``datasets:NAME``.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.errors import InputError, require
from s2d.models import Loaded
from s2d.models.preprocessing import Preprocessing, preprocessing_of
from s2d.tasks.base import SPLITS, Batch, Split, Task, check_batch_size, check_split
from s2d.tasks.carving import CARVED, carve
from s2d.tasks.files import SPLIT_NAMES
from s2d.tasks.image_files import IMAGE_NAMES, PREFIX, beside, column_of, image_source, tables_in
from s2d.tasks.image_table import ImageTable
from s2d.tasks.tables import TABLE_SUFFIXES, Table, read_table
from s2d.tasks.tokens import digest, row_batches

# What a column is: the name that was given, or None, and the usual names it is looked for under.
Column = tuple[str | None, Sequence[str]]


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


class ImageRows(Task):
    """A task on such rows of every split; images that stand in several rows are decoded once."""

    ragged = False

    def __init__(self, rows: dict[Split, list[ImageRow]]) -> None:
        self.rows = rows
        self._sources: dict[Split, list[Path | bytes]] = {}
        self._image_of: dict[Split, Tensor] = {}
        for split, members in self.rows.items():
            known: dict[Path | bytes, int] = {}
            self._image_of[split] = torch.tensor([known.setdefault(row.source, len(known)) for row in members])
            self._sources[split] = list(known)
        self._fingerprint = digest(
            part
            for split in SPLITS
            for row in self.rows[split]
            for part in (split, str(row.cells), digest([row.content().hex()]))
        )
        self._tables: dict[Split, ImageTable] = {}
        self._preprocessing: Preprocessing | None = None

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of all splits: images and what stands beside them."""
        return self._fingerprint

    def sizes(self) -> dict[str, int]:
        """Number of rows of each split, without those whose image is known to be unreadable."""
        return {split: int(self._readable(split).numel()) for split in SPLITS}

    def prepare(self, loaded: Loaded) -> None:
        """Note the model's preprocessing; a split's images are decoded when it is first used."""
        preprocessing = preprocessing_of(loaded.processor, loaded.source)
        if preprocessing == self._preprocessing:
            return
        for split, sources in self._sources.items():
            self._tables[split] = ImageTable(sources, preprocessing)
            if self._tables[split].first_readable() is None:
                raise InputError(f"none of the {len(sources)} images of {split} can be read; {self.notes()[-1]}")
        self._preprocessing = preprocessing

    def notes(self) -> list[str]:
        """One line for each split with images found unreadable so far."""
        lines = []
        for split, table in self._tables.items():
            images = self._image_of[split].tolist()
            places = {image: row.place for image, row in zip(images, self.rows[split], strict=True)}
            line = table.note(split, places)
            lines += [line] if line else []
        return lines

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """Batches of ``pixels`` `[batch, 3, height, width]` (bytes) and what `beside` makes of their rows."""
        if check_split(split) not in self._tables:
            raise RuntimeError("the images' size is not known yet: call build(loaded) or prepare(loaded) first")
        table = self._tables[split]
        table.decode()
        readable = self._readable(split)
        for chosen in row_batches(len(readable), check_batch_size(batch_size), seed=seed, shuffle=shuffle):
            rows = readable[chosen]
            images = self._image_of[split][rows]
            if not table.in_memory:  # images turn out to be unreadable only now
                _, kept = table.take(images.unique())
                rows = rows[torch.isin(images, kept)]
                images = self._image_of[split][rows]
            if len(rows):
                pixels, _ = table.take(images)
                yield {"pixels": pixels, **self.beside(split, rows)}

    @abstractmethod
    def beside(self, split: Split, rows: Tensor) -> Batch:
        """What a batch holds beside the pixels, for rows by index `[batch]`."""

    def normalize(self, pixels: Tensor) -> Tensor:
        """What the model reads."""
        assert self._preprocessing is not None
        return self._preprocessing.normalize(pixels)

    def _readable(self, split: Split) -> Tensor:
        images = self._image_of[split]
        bad = list(self._tables[split].unreadable) if split in self._tables else []
        return torch.arange(len(images))[~torch.isin(images, torch.tensor(bad, dtype=torch.long))]


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
