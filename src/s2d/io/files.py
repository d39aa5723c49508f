"""Results on disk: JSON, written atomically, with its provenance.

Nothing here imports torch; where torch is loaded already, its version and devices are noted too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from s2d.errors import InputError, first_line

JSON = dict[str, Any]


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Call `write` with a file that replaces `path` once it is complete and on the disk; folders are made.

    A `path` that is no regular file (``/dev/stdout``, a pipe) is written to directly.

    Raises:
        InputError: The disk is full or not writable; the old content of `path` is untouched.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            with open(target, "wb") as file:  # a pipe or a device, which must not be replaced by a file
                write(file)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private
        os.replace(temporary, target)
        temporary = None
        _sync(target.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        while isinstance(error, RuntimeError) and isinstance(error.__context__, (OSError, RuntimeError)):
            error = error.__context__
        raise _not_written(target, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return target


@contextlib.contextmanager
def in_place_of(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path for a file or a folder that replaces `path` once it is complete and on the disk.

    It lies in a folder of its own. Files that are written beside it are moved beside `path` first, because `path` may
    refer to them.

    Raises:
        InputError: The disk is full or not writable; the old content of `path` is untouched.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            yield made
            for each in Path(scratch).rglob("*"):
                if each.is_file() and not each.is_symlink():
                    each.chmod(0o644)  # some libraries make their files private
                    with open(each, "rb") as file:
                        os.fsync(file.fileno())
                elif each.is_dir():
                    _sync(each)
            for each in sorted(Path(scratch).iterdir(), key=lambda each: each == made):
                _put(each, target.parent / each.name)
            _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(target, error) from error


def _put(new: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(new, target)
        return
    old = new.with_name(f"{new.name}.old")
    os.replace(target, old)
    try:
        os.replace(new, target)
    finally:
        if not target.exists():
            os.replace(old, target)


def _not_written(target: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or first_line(error)
    if "inline_container" in reason:  # torch's archive writer hides the disk's error
        reason = "the file did not become whole, perhaps the disk is full"
    return InputError(
        f"could not write {target}: {reason}; nothing was changed there; free some space or choose another place"
    )


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot do it with folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path, *, age: float = 3600.0) -> None:
    """Remove the remains of killed writes: temporary files and folders in a folder, unchanged for `age` seconds."""
    for path in list(folder.rglob(".*-????????")):
        with contextlib.suppress(OSError):
            newest = max(part.lstat().st_mtime for part in [path, *path.rglob("*")])
            if re.fullmatch(r"\..+-[a-z0-9_]{8}", path.name) and time.time() - newest >= age:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_json(path: str | os.PathLike[str], content: object) -> Path:
    """Write a JSON file, atomically. NaN and infinities, which JSON does not have, become null.

    Raises:
        InputError: It cannot be written.
    """
    text = json_text(content).encode("utf-8")
    return write_atomic(path, lambda file: file.write(text))


def json_text(content: object) -> str:
    """Any data as JSON; see `write_json`."""
    return json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: str | bytes) -> Any:
    """The data of a JSON text. Every fault is a ValueError (also too deep nesting, or numbers too long)."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_any_json(path: str | os.PathLike[str]) -> Any:
    """The data of a JSON file.

    Raises:
        InputError: It is not there, cannot be read, or is no JSON.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}; check the name") from error
    except ValueError as error:
        raise InputError(f"cannot read {os.fspath(path)}: it is not a JSON file: {error}; make it again") from error


def read_json(path: str | os.PathLike[str]) -> JSON:
    """A JSON object from a file.

    Raises:
        InputError: As `read_any_json`, or the data are no object.
    """
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{os.fspath(path)} should hold a JSON object, not a {type(content).__name__}")
    return content


def _plain(value: Any) -> Any:
    """Containers and numbers as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _plain(value.tolist())
    return str(value)
