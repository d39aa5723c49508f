"""Labelled images on disk: folders of classes, Parquet with an image column, MNIST's files, the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d.data.base import SPLITS, Split
from s2d.data.idx import idx_in, placed_images, read_labels
from s2d.data.split_files import SPLIT_NAMES
from s2d.data.splits import CARVED, carve
from s2d.errors import InputError, first_line
from s2d.io.files import parse_json
from s2d.optional import require

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
IMAGE_NAMES = ("image", "img", "jpg", "png", "pixel_values", "image_bytes")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "category")
PREFIX = "datasets:"


@dataclass(frozen=True)
class ImageExample:
    """One labelled image, not yet decoded.

    Attributes:
        source: Its file, or its bytes as they were stored.
        label: Name of its class.
        place: Where it stands, for messages.
    """

    source: Path | bytes
    label: str
    place: str

    def content(self) -> bytes:
        """What identifies it wherever it is kept: the stored bytes, or the end of the path."""
        return self.source if isinstance(self.source, bytes) else "/".join(self.source.parts[-2:]).encode()


def read_labelled_images(
    data: str, image: str | None = None, label: str | None = None
) -> tuple[dict[Split, list[ImageExample]], tuple[str, ...]]:
    """All images of all splits, and the names of the classes in order.

    Args:
        data: A folder with ``train`` (``validation``, ``test``) folders of one folder a class, or of class folders
            alone; a folder with Parquet files named after the splits, or one such file; a folder with the files of
            MNIST or of a data set like it; ``datasets:NAME``.
        image: Name of the image column; found by usual names when None.
        label: Name of the label column; likewise.

    Raises:
        InputError: Nothing that can be read is there, a class folder is empty, or a class is missing from train.
    """
    if data.startswith(PREFIX):
        splits, names = _from_datasets(data, image, label)
    else:
        path = Path(data).expanduser()
        if not path.exists():
            raise InputError(f"there is no folder or file {data!r} with the images (a data set: {PREFIX}NAME)")
        tables = tables_in(path)
        if tables:
            splits, names = _from_tables(tables, image, label)
        else:
            splits, names = _from_idx(idx_in(path)) or _from_folders(path), None
    if not splits.get("train"):
        raise InputError(f"{data} has no images to train on; it has {', '.join(splits) or 'nothing'}")
    for split, share in CARVED:
        if split not in splits:
            splits["train"], splits[split] = _carve(splits["train"], share, split, data)
    classes = names or _sorted({example.label for example in splits["train"]})
    if len(classes) < 2:
        raise InputError(f"{data}: all images of train are of one class ({''.join(classes)}); two classes are needed")
    known = set(classes)
    for split in SPLITS:
        for example in splits[split]:
            if example.label not in known:
                raise InputError(
                    f"{example.place}: class {example.label!r} does not occur in train; "
                    "add images of it there, or leave it out"
                )
    return {split: splits[split] for split in SPLITS}, classes


def _sorted(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def _carve(
    examples: list[ImageExample], share: float, split: Split, data: str
) -> tuple[list[ImageExample], list[ImageExample]]:
    stay, taken = carve([example.label for example in examples], [example.content() for example in examples], share)
    if not taken:
        raise InputError(f"{data} has too few images to take a {split} split out of them; add a {split} folder or file")
    return [examples[index] for index in stay], [examples[index] for index in taken]


# -- folders


def _from_folders(path: Path) -> dict[Split, list[ImageExample]]:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder of images nor a Parquet file")
    found: dict[Split, list[ImageExample]] = {}
    for split, names in SPLIT_NAMES.items():
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder is not None:
            found[split] = list(_classes_in(folder))
    return found or {"train": list(_classes_in(path))}


def _classes_in(folder: Path) -> Iterator[ImageExample]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} holds no folders; put the images of each class into a folder named after it")
    for name in classes:
        files = sorted(file for file in name.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"the class folder {name} holds no images; remove it or fill it")
        for file in files:
            yield ImageExample(file, name.name, str(file))


# -- Parquet


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


def _from_tables(
    tables: dict[Split, list[Path]], image: str | None, label: str | None
) -> tuple[dict[Split, list[ImageExample]], tuple[str, ...] | None]:
    arrow = require("pyarrow", "hf")
    parquet = require("pyarrow.parquet", "hf")
    names: tuple[str, ...] | None = None
    splits: dict[Split, list[ImageExample]] = {}
    for split, files in tables.items():
        splits[split] = []
        for file in files:
            try:
                schema = parquet.read_schema(file)
                pick = [column_of(schema.names, image, IMAGE_NAMES, "image", str(file))]
                pick.append(column_of(schema.names, label, _LABEL_NAMES, "label", str(file)))
                table = parquet.read_table(file, columns=pick)
                cells = [table.column(name).to_pylist() for name in pick]
            except InputError:
                raise
            except (OSError, arrow.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
                raise InputError(f"cannot read {file} as Parquet: {first_line(error)}") from error
            names = names or _stated_names(schema.metadata, pick[1])
            for number, (cell, value) in enumerate(zip(*cells, strict=True), 1):
                place = f"{file}, row {number}"
                source = image_source(cell, place)
                if isinstance(source, Path):
                    source = beside(file.parent, source, place)
                splits[split].append(ImageExample(source, _label(value, names, place), place))
    return splits, names


def _stated_names(metadata: Any, column: str) -> tuple[str, ...] | None:
    """The class names that the `datasets` library writes into a Parquet file."""
    try:
        features = parse_json(metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"]) or None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def column_of(columns: Sequence[str], given: str | None, usual: Sequence[str], what: str, shown: str) -> str:
    """The column that was named, or the first of the usual names; InputError for none."""
    if given is not None and given not in columns:
        raise InputError(f"{shown} has no column {given!r}; its columns are {', '.join(columns)}")
    found = given or next((name for name in usual if name in columns), None)
    if found is None:
        raise InputError(f"{shown}: which column is the {what}? name it; the columns are {', '.join(columns)}")
    return found


def image_source(cell: Any, place: str) -> bytes | Path:
    """What a table's cell holds: encoded bytes, or the path of a file."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str):
        return Path(cell)
    raise InputError(f"{place}: the image is a {type(cell).__name__}; expected encoded bytes (JPEG, PNG) or a path")


def beside(folder: Path, path: Path, place: str) -> Path:
    """A file that a table names; a table that came from elsewhere may not name files all over this machine."""
    found = (folder / path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise InputError(f"{place}: the image {str(path)!r} is outside of the table's folder; put it below that")
    return found


def _label(value: Any, names: tuple[str, ...] | None, place: str) -> str:
    if value is None:
        raise InputError(f"{place}: the label is empty; remove or repair the row")
    if names is None or isinstance(value, str):
        return str(value)
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise InputError(
            f"{place}: label {value!r} is outside the {len(names)} classes of the data set; repair the row"
        )
    return names[value]


# -- MNIST's files


def _from_idx(files: dict[Split, tuple[Path, Path]]) -> dict[Split, list[ImageExample]]:
    found: dict[Split, list[ImageExample]] = {}
    for split, (images, labels) in files.items():
        pixels, numbers = list(placed_images(images)), read_labels(labels)
        if len(pixels) != len(numbers):
            raise InputError(f"{images} holds {len(pixels)} images, {labels.name} beside it {len(numbers)} labels")
        found[split] = [
            ImageExample(source, str(number), place) for (place, source), number in zip(pixels, numbers, strict=True)
        ]
    return found


# -- the datasets library


def _from_datasets(
    data: str, image: str | None, label: str | None
) -> tuple[dict[Split, list[ImageExample]], tuple[str, ...] | None]:
    library = require("datasets", "vision")
    name = data.removeprefix(PREFIX)
    try:
        loaded = library.load_from_disk(name) if Path(name).is_dir() else library.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{data}: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    splits: dict[Split, list[ImageExample]] = {}
    names: tuple[str, ...] | None = None
    for split, spellings in SPLIT_NAMES.items():
        table = next((loaded[spelling] for spelling in spellings if spelling in loaded), None)
        if table is None:
            continue
        pick = column_of(table.column_names, image, IMAGE_NAMES, "image", data)
        kind = column_of(table.column_names, label, _LABEL_NAMES, "label", data)
        names = names or tuple(getattr(table.features[kind], "names", None) or ()) or None
        table = table.select_columns([pick, kind]).cast_column(pick, library.Image(decode=False))
        splits[split] = [
            ImageExample(
                image_source(row[pick], f"{data}, {split} {number}"),
                _label(row[kind], names, data),
                f"{split} {number}",
            )
            for number, row in enumerate(table, 1)
        ]
    return splits, names
