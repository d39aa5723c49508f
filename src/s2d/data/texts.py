"""Reading unlabelled texts: the lines of .txt files, the rows of .jsonl and .parquet files."""

from __future__ import annotations

from pathlib import Path

from s2d.data.split_files import read_utf8
from s2d.data.tables import read_table
from s2d.errors import InputError

_TABLES = (".jsonl", ".parquet")
TEXT_SUFFIXES = (".txt", *_TABLES)


def read_texts(data: Path, column: str | None = None) -> list[str]:
    """All texts of a file, or of the files of a folder in the order of their names; blank ones are left out.

    Args:
        data: The file or folder.
        column: The text column of tables; None for the column named text, or the only column.

    Raises:
        InputError: Nothing is there, of a known kind, or readable; a table's column is not clear; no text at all.
    """
    if not data.exists():
        raise InputError(f"there is no folder or file {str(data)!r} with the data")
    files = [data]
    if data.is_dir():
        present = sorted(file for file in data.iterdir() if file.is_file())
        files = [file for file in present if file.suffix.lower() in TEXT_SUFFIXES]
        if not files:
            listed = ", ".join(file.name for file in present[:6]) or "no files"
            raise InputError(f"{data} has no texts ({', '.join(TEXT_SUFFIXES)}); it holds {listed}")
    texts = [text for file in files for text in (part.strip() for part in _read(file, column)) if text]
    if not texts:
        raise InputError(f"{data} holds no text, only blanks; check it")
    return texts


def _read(file: Path, column: str | None) -> list[str]:
    suffix = file.suffix.lower()
    if suffix in _TABLES:
        table = read_table(file, (column,))
        if column is None:
            column = "text" if "text" in table.columns else table.columns[0]
            if column != "text" and len(table.columns) > 1:
                raise InputError(
                    f"{file}: which column is the text? name it: -o task.column=NAME; "
                    f"the columns are {', '.join(table.columns)}"
                )
        cells = table.column(column)
        wrong = next((cell for cell in cells if cell is not None and not isinstance(cell, str)), None)
        if wrong is not None:
            raise InputError(f"{file}: column {column!r} holds {type(wrong).__name__}, not text; name another one")
        return [cell or "" for cell in cells]
    if suffix != ".txt":
        raise InputError(f"{file} is not a text file that can be read; use {', '.join(TEXT_SUFFIXES)}")
    return read_utf8(file).splitlines()
