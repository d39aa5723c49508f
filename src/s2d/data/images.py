"""Images without labels: files at any depth of a folder, rows of Parquet or MNIST's files, the `datasets` library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from s2d.data import idx
from s2d.data.image_rows import IMAGE_NAMES, IMAGE_SUFFIXES, PREFIX, ImageRow, all_of_datasets, of_table
from s2d.data.texts import TEXT_SUFFIXES
from s2d.errors import InputError, first_line
from s2d.optional import require

_TABLE = ".parquet"
_NAMES = f"{', '.join(IMAGE_SUFFIXES[:4])}, ...; {_TABLE}"


def read_images(data: str | os.PathLike[str], image: str | None = None) -> list[ImageRow]:
    """All images, not yet opened, in an order that mixes folders and does not depend on where the files are.

    Args:
        data: A folder with images, Parquet files or MNIST's files at any depth, one such file, or ``datasets:NAME``,
            all of its splits. Hidden files are left out, and so are tables without images.
        image: Name of the image column; found by usual names when None.

    Raises:
        InputError: Nothing is there, no image, or a table's image column is not clear.
    """
    data = os.fspath(data)
    if data.startswith(PREFIX):
        rows, root = list(all_of_datasets(data, image)), data
    else:
        path = Path(data).expanduser()
        files, root = _files_in(path), str(path)
        rows = [ImageRow(file, (), str(file)) for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        tables = [file for file in files if file.suffix.lower() == _TABLE]
        known = [file for file in tables if image is not None or _has_images(file)]
        rows += [row for file in known or (() if rows else tables) for row in of_table(file, image, {})]
        packed = [file for file in files if idx.is_images(file)]
        rows += [ImageRow(source, (), place) for file in packed for place, source in idx.placed_images(file)]
        if not rows:
            raise InputError(f"{data} holds no images ({_NAMES}); {_held(path, files)}")
    return sorted(
        rows, key=lambda row: hashlib.sha256(row.place.removeprefix(root).encode("utf-8", "replace")).digest()
    )


def content_of(row: ImageRow) -> bytes:
    """An image as it is stored. For a file that cannot be opened it is the path; decoding then reports the reason."""
    if isinstance(row.source, bytes):
        return row.source
    try:
        return row.source.read_bytes()
    except OSError:
        return row.place.encode("utf-8", "replace")


def holds_images(data: str | os.PathLike[str]) -> bool:
    """Whether data without labels are images; otherwise they are texts.

    Raises:
        InputError: Nothing is there, neither, or both.
    """
    data = os.fspath(data)
    if data.startswith(PREFIX):
        return True
    path = Path(data).expanduser()
    files = _files_in(path)
    images = any(file.suffix.lower() in IMAGE_SUFFIXES or idx.is_images(file) or _has_images(file) for file in files)
    # Texts are read from one folder, not below it; a metadata file there says something about images.
    texts = any(
        file.suffix.lower() in TEXT_SUFFIXES and not _has_images(file) and not (images and file.stem == "metadata")
        for file in files
        if file == path or file.parent == path
    )
    if images and texts:
        raise InputError(
            f"{data} holds images and texts; say which: --task unlabelled-images or --task unlabelled-text"
        )
    if not images and not texts:
        raise InputError(
            f"{data} holds neither texts ({', '.join(TEXT_SUFFIXES)}) nor images ({_NAMES}); {_held(path, files)}"
        )
    return images


def _files_in(path: Path) -> list[Path]:
    """The files of a folder at any depth, without hidden ones; of a file, itself."""
    if not path.exists():
        raise InputError(f"there is no folder or file {str(path)!r} with the data (a data set of images: {PREFIX}NAME)")
    if not path.is_dir():
        return [path]
    files = sorted(path.rglob("*"))
    return [
        file
        for file in files
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]


def _has_images(file: Path) -> bool:
    """Whether a table has an image column, judged by column names; False for a file that is no table."""
    if file.suffix.lower() != _TABLE:
        return False
    parquet = require("pyarrow.parquet", "parquet")
    arrow = require("pyarrow", "parquet")
    try:
        names = parquet.read_schema(file).names
    except (OSError, arrow.ArrowException, ValueError) as error:
        raise InputError(f"cannot read {file} as Parquet: {first_line(error)}") from error
    return any(name in names for name in IMAGE_NAMES)


def _held(path: Path, files: list[Path]) -> str:
    listed = ", ".join(str(file.relative_to(path)) for file in files[:4]) if path.is_dir() else path.name
    return f"it holds {listed or 'no files'}"
