"""Reading labelled texts: CSV, TSV (with or without a header), JSON lines and Parquet, and which columns to use."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from s2d.errors import InputError, first_line
from s2d.io.files import parse_json
from s2d.optional import require

_TEXT_NAMES = ("text", "sentence", "question", "query", "utterance", "review", "content", "sms", "tweet", "title")
_LABEL_NAMES = ("label", "labels", "category", "intent", "class", "target", "sentiment", "topic", "emotion")


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Attributes:
        path: The file.
        columns: Names of the columns; ``"0"``, ``"1"``, ... for a file without a header.
        rows: One list of cells per row, in the order of `columns`.
        first_line: Line (or row) number of the first row, for messages.
        metadata: Metadata of a Parquet file.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[Any]]
    first_line: int
    metadata: Any = None

    def column(self, name: str) -> list[Any]:
        """The cells of a column.

        Raises:
            InputError: There is no such column; the existing ones are listed.
        """
        if name not in self.columns:
            raise InputError(f"{self.path} has no column {name!r}; its columns are {', '.join(self.columns)}")
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


# Chooses among the columns that a file has.
Pick: TypeAlias = Callable[[Sequence[str]], Sequence[str]]


def read_table(path: Path, named: tuple[str | None, ...] = (), pick: Pick | None = None) -> Table:
    """A table by its file's ending.

    Args:
        path: A ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet`` file.
        named: Columns that the caller asks for; a first line that holds one of them is a header.
        pick: Called with the existing columns, returns those needed; other columns of a Parquet file are not read.

    Raises:
        InputError: Unknown ending, unreadable or empty file, rows of different lengths.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is not a table that can be read; use {', '.join(_READERS)}")
    table = reader(path, tuple(name for name in named if name), pick)
    if not table.rows:
        raise InputError(f"{path} holds no rows; check the file")
    return table


def find_columns(table: Table, text: str | None, label: str | None) -> tuple[str, str]:
    """Names of the text and the label column: as given, else by usual names, else by number of distinct values.

    Raises:
        InputError: A given column is missing, or the choice is not clear; the columns are listed.
    """
    for name in (text, label):
        if name is not None:
            table.column(name)
    lower = {column.lower(): column for column in reversed(table.columns)}
    text = text or next((lower[name] for name in _TEXT_NAMES if name in lower and lower[name] != label), None)
    label = label or next((lower[name] for name in _LABEL_NAMES if name in lower and lower[name] != text), None)
    others = [column for column in table.columns if column not in (text, label)]
    if text is None and label is None and len(others) == 2:
        label, text = sorted(others, key=lambda column: len(set(map(str, table.column(column)))))
    elif len(others) == 1 and (text is None) != (label is None):
        text, label = text or others[0], label or others[0]
    if text is None or label is None:
        wanted = "text" if text is None else "label"
        raise InputError(
            f"{table.path}: which column is the {wanted}? name it; the columns are {', '.join(table.columns)}"
        )
    if text == label:
        raise InputError(f"{table.path}: text and label cannot both be column {text!r}; name two")
    return text, label


def _read_delimited(path: Path, named: tuple[str, ...], pick: Pick | None) -> Table:
    tabs = path.suffix.lower() == ".tsv"
    # Tab-separated corpora hold bare quotation marks; only CSV uses quoting.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    rows: list[list[str]] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, **options)
            for row in reader:
                if not row:
                    continue
                if rows and len(row) != len(rows[0]):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(row)} columns where the first line has {len(rows[0])}"
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it or check the file") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not rows:
        raise InputError(f"{path} is empty; give a table with a row for each example")
    first = [cell.strip() for cell in rows[0]]
    if _is_header(first, rows[1:], named):
        return Table(path, tuple(first), rows[1:], 2)
    return Table(path, tuple(str(index) for index in range(len(first))), rows, 1)


def _is_header(first: list[str], rest: list[list[str]], named: tuple[str, ...]) -> bool:
    """Whether the first line names the columns: it holds a known name, or its label occurs in no other line."""
    usual = {*_TEXT_NAMES, *_LABEL_NAMES, *(name.lower() for name in named)}
    if any(cell.lower() in usual for cell in first):
        return True
    values = [{row[index].strip() for row in rest} for index in range(len(first))]
    labels = min(range(len(first)), key=lambda index: len(values[index]))
    return len(values[labels]) < len(rest) and first[labels] not in values[labels]


def _read_json_lines(path: Path, named: tuple[str, ...], pick: Pick | None) -> Table:
    records: list[dict[str, Any]] = []
    try:
        content = path.read_text(encoding="utf-8-sig")
        if content.lstrip().startswith("["):
            records = parse_json(content)
        else:
            records = [parse_json(line) for line in content.splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it or check the file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} as JSON lines: {error}") from error
    if not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path} should hold one JSON object per line")
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    return Table(path, columns, [[record.get(name) for name in columns] for record in records], 1)


def _read_parquet(path: Path, named: tuple[str, ...], pick: Pick | None) -> Table:
    parquet = require("pyarrow.parquet", "parquet")
    arrow = require("pyarrow", "parquet")
    try:
        wanted = None if pick is None else list(dict.fromkeys(pick(parquet.read_schema(path).names)))
        table = parquet.read_table(path, columns=wanted)
        columns = tuple(table.column_names)
        cells = [column.to_pylist() for column in table.columns]
    except InputError:
        raise
    except (OSError, arrow.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(f"cannot read {path} as Parquet: {first_line(error)}") from error
    return Table(path, columns, [list(row) for row in zip(*cells, strict=True)], 1, table.schema.metadata)


_READERS: dict[str, Callable[[Path, tuple[str, ...], Pick | None], Table]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
TABLE_SUFFIXES = tuple(_READERS)
