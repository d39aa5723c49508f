"""Find the file of each split in a folder, and read text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from s2d.data.base import Split
from s2d.errors import InputError

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def split_files(data: Path, suffixes: Sequence[str]) -> dict[Split, Path]:
    """The file of each split that a folder has; a single file is the train split.

    Raises:
        InputError: Nothing is there, two files claim one split, or no file has a known name.
    """
    if not data.exists():
        raise InputError(f"there is no folder or file {str(data)!r} with the data")
    if data.is_file():
        return {"train": data}
    files: dict[Split, Path] = {}
    present = sorted(file for file in data.iterdir() if file.is_file())
    for split, names in SPLIT_NAMES.items():
        found = [file for file in present if file.stem.lower() in names and file.suffix.lower() in suffixes]
        if len(found) > 1:
            raise InputError(f"{data} has several {split} files: {', '.join(file.name for file in found)}; keep one")
        if found:
            files[split] = found[0]
    if not files:
        listed = ", ".join(file.name for file in present[:6]) or "no files"
        endings = ", ".join(suffixes)
        raise InputError(f"{data} has no files named train, validation or test ({endings}); it holds {listed}")
    return files


def read_utf8(file: Path) -> str:
    """The text of a file.

    Raises:
        InputError: It cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it or check the file") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
