"""Images that are not yet decoded, with their other columns, from tables and from the `datasets` library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from s2d.data.base import Split
from s2d.data.split_files import SPLIT_NAMES
from s2d.data.tables import Table, read_table
from s2d.errors import InputError, first_line
from s2d.io.files import parse_json
from s2d.optional import require

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
IMAGE_NAMES = ("image", "img", "jpg", "png", "pixel_values", "image_bytes")
PREFIX = "datasets:"

# A column: the name that was given, or None, and the usual names that are tried.
Column: TypeAlias = tuple[str | None, Sequence[str]]
Columns: TypeAlias = Mapping[str, Column]


@dataclass(frozen=True)
class ImageRow:
    """One image, not yet decoded, and its other columns.

    Attributes:
        source: Its file, or its bytes as they were stored.
        cells: Values of the columns asked for, in their order.
        place: Its location, for messages.
    """

    source: Path | bytes
    cells: tuple[Any, ...]
    place: str

    def content(self) -> bytes:
        """An identity of the image that does not depend on its folder: the stored bytes, or the end of the path."""
        return self.source if isinstance(self.source, bytes) else "/".join(self.source.parts[-2:]).encode()


@dataclass
class ImageSplits:
    """The rows of the splits that exist, and the class names behind a column's numbers, where the data state them.

    Attributes:
        rows: Rows of each split.
        names: Names by the meaning of the column.
    """

    rows: dict[Split, list[ImageRow]]
    names: dict[str, tuple[str, ...]]


def read_splits(
    data: str, image: str | None, columns: Columns, otherwise: Callable[[Path], dict[Split, list[ImageRow]]]
) -> ImageSplits:
    """The images of all splits of the data.

    Args:
        data: A folder with Parquet files named after the splits, one such file, ``datasets:NAME``, or anything that
            `otherwise` reads.
        image: Name of the image column; found by usual names when None.
        columns: Columns to read beside the image, by their meaning.
        otherwise: Reads a path without such tables.

    Raises:
        InputError: Nothing that can be read is there, a column is missing, or nothing to train on.
    """
    found = ImageSplits({}, {})
    path = Path(data).expanduser()
    if data.startswith(PREFIX):
        loaded = load_datasets(data)
        for split, spellings in SPLIT_NAMES.items():
            table = next((loaded[spelling] for spelling in spellings if spelling in loaded), None)
            if table is not None:
                found.rows[split] = list(_of_dataset(table, f"{data}, {split}", image, columns, found.names))
    elif not path.exists():
        raise InputError(f"there is no folder or file {data!r} with the images (a data set: {PREFIX}NAME)")
    elif tables := tables_in(path):
        for split, files in tables.items():
            found.rows[split] = [row for file in files for row in of_table(file, image, columns, found.names)]
    else:
        found.rows = otherwise(path)
    if not found.rows.get("train"):
        raise InputError(f"{data} has no images to train on; it has {', '.join(found.rows) or 'nothing'}")
    return found


def tables_in(path: Path) -> dict[Split, list[Path]]:
    """The Parquet files of each split; shards are named ``train-00000-of-00004.parquet``."""
    if path.is_file():
        return {"train": [path]} if path.suffix.lower() == ".parquet" else {}
    files = sorted(path.glob("*.parquet")) + sorted(path.glob("data/*.parquet"))
    found: dict[Split, list[Path]] = {
        split: [file for file in files if file.stem.lower().partition("-")[0] in names]
        for split, names in SPLIT_NAMES.items()
    }
    if files and not any(found.values()):
        raise InputError(f"{path}: no Parquet file is named after a split (train, validation, test)")
    return {split: members for split, members in found.items() if members}


def of_table(
    file: Path, image: str | None, columns: Columns, names: dict[str, tuple[str, ...]] | None = None
) -> Iterator[ImageRow]:
    """The rows of a table.

    Args:
        file: The table; images that it names are below its folder.
        image: See `read_splits`.
        columns: Likewise.
        names: Filled with the class names that the table states.

    Raises:
        InputError: It cannot be read, a column is missing, or a cell holds no image.
    """
    table = read_table(file, pick=lambda present: _pick(present, image, columns, str(file)))
    picked = _pick(table.columns, image, columns, str(file))
    if names is not None:
        for what, column in zip(columns, picked[1:], strict=True):
            _note(names, what, _stated_names(table, column))
    cells = [table.column(column) for column in picked]
    for number, (cell, *values) in enumerate(zip(*cells, strict=True), table.first_line):
        place = f"{file}, row {number}"
        source = image_source(cell, place)
        yield ImageRow(beside(file.parent, source, place) if isinstance(source, Path) else source, (*values,), place)


def load_datasets(data: str) -> Mapping[str, Any]:
    """The tables of a data set of the `datasets` library, by split; a table alone is train.

    Raises:
        InputError: It cannot be loaded.
    """
    library = require("datasets", "vision")
    name = data.removeprefix(PREFIX)
    try:
        loaded = library.load_from_disk(name) if Path(name).is_dir() else library.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{data}: {first_line(error)}") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def all_of_datasets(data: str, image: str | None) -> Iterator[ImageRow]:
    """The images of all splits of a data set of the `datasets` library.

    Raises:
        InputError: It cannot be loaded, or its image column is not clear.
    """
    for split, table in load_datasets(data).items():
        yield from _of_dataset(table, f"{data}, {split}", image, {}, {})


def _of_dataset(
    table: Any, shown: str, image: str | None, columns: Columns, names: dict[str, tuple[str, ...]]
) -> Iterator[ImageRow]:
    picked = _pick(table.column_names, image, columns, shown)
    for what, column in zip(columns, picked[1:], strict=True):
        _note(names, what, getattr(table.features[column], "names", None))
    encoded = require("datasets", "vision").Image(decode=False)
    for number, row in enumerate(table.select_columns(picked).cast_column(picked[0], encoded), 1):
        place = f"{shown} {number}"
        yield ImageRow(image_source(row[picked[0]], place), tuple(row[column] for column in picked[1:]), place)


def _pick(present: Sequence[str], image: str | None, columns: Columns, shown: str) -> list[str]:
    """The image column and the others, in their order."""
    wanted = {"image": (image, IMAGE_NAMES), **columns}
    return [column_of(present, given, usual, what, shown) for what, (given, usual) in wanted.items()]


def _note(names: dict[str, tuple[str, ...]], what: str, stated: Sequence[str] | None) -> None:
    if stated and what not in names:
        names[what] = tuple(stated)


def _stated_names(table: Table, column: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library writes into a Parquet file."""
    try:
        features = parse_json(table.metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def column_of(columns: Sequence[str], given: str | None, usual: Sequence[str], what: str, shown: str) -> str:
    """The named column, or the first of the usual names; InputError for none."""
    if given is not None and given not in columns:
        raise InputError(f"{shown} has no column {given!r}; its columns are {', '.join(columns)}")
    found = given or next((name for name in usual if name in columns), None)
    if found is None:
        raise InputError(f"{shown}: which column is the {what}? name it; the columns are {', '.join(columns)}")
    return found


def image_source(cell: Any, place: str) -> bytes | Path:
    """The image of a table's cell: encoded bytes, or the path of a file."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str):
        return Path(cell)
    raise InputError(f"{place}: the image is a {type(cell).__name__}; expected encoded bytes (JPEG, PNG) or a path")


def beside(folder: Path, path: Path, place: str) -> Path:
    """A file that a table names. It must lie below the table's folder, as tables from elsewhere are not trusted."""
    found = (folder / path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise InputError(f"{place}: the image {str(path)!r} is outside of the table's folder; put it below that")
    return found
