"""What every stage writes down: JSON that is whole or not there, with enough beside it to know where it came from.

Nothing here imports torch; where torch is loaded already, its version and devices are noted too.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from s2d.errors import InputError, first_line

JSON = dict[str, Any]
_NOTED = ("s2d", "torch", "transformers", "accelerate", "timm", "open_clip_torch", "numpy", "safetensors")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Give `write` a file that takes the place of `path` once it is complete and on the disk; folders are made.

    What is no regular file (``/dev/stdout``, a pipe) is written into as it is.

    Raises:
        InputError: The disk is full or does not let us write; what stood at `path` is untouched.
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
        reason = getattr(error, "strerror", None) or first_line(error)
        if "inline_container" in reason:  # torch's archive, which does not say what the disk said
            reason = "the file did not become whole, perhaps the disk is full"
        raise InputError(
            f"could not write {target}: {reason}; nothing was changed there; free some space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return target


def sync_folder(folder: Path) -> None:
    """Put every file of a folder on the disk, so that a name given to it later never stands for less than it says."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)  # some libraries make their files private
        _sync(path)


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot do it with folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path, *, age: float = 3600.0) -> None:
    """Remove what killed writes left in a folder: temporary files and folders that nobody touched for `age` seconds."""
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
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8"))

    return write_atomic(path, write)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says; whatever is wrong with it is a ValueError (too deep a nesting, or numbers too long)."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike[str]) -> JSON:
    """A JSON object from a file.

    Raises:
        InputError: It is not there, cannot be read, or is something else.
    """
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}; check the name") from error
    except ValueError as error:
        raise InputError(f"{os.fspath(path)} is not a JSON file: {error}; make it again") from error
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


def digest(content: object) -> str:
    """12 hexadecimal digits that tell two JSON-like values apart, whatever the order of their keys."""
    text = json.dumps(_plain(content), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def code_digest(*rooms: str) -> str:
    """12 hexadecimal digits of what these rooms of s2d compute; comments and docstrings do not count.

    Args:
        rooms: Files or folders of the package, such as ``"decay.py"`` and ``"quant"``.
    """
    package = Path(__file__).parent
    sha = hashlib.sha256()
    for room in sorted(rooms):
        place = package / room
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            sha.update(f"{file.relative_to(package).as_posix()} {_meaning(file, file.stat().st_mtime_ns)}".encode())
    return sha.hexdigest()[:12]


@functools.cache
def _meaning(file: Path, changed: int) -> str:
    """A hash of what a Python file says; every stage of a run asks for the same files."""
    tree = ast.parse(file.read_bytes())
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
        # Statements only: no expression has a docstring, and most of a tree is expressions.
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, field, [])
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


@dataclass
class Cost:
    """What a stage took.

    Attributes:
        seconds: Wall-clock time.
        peak_mb: Largest memory in use, in MB: of the accelerator where one is used, otherwise of the process.
    """

    seconds: float = 0.0
    peak_mb: float = 0.0


@contextlib.contextmanager
def measured() -> Iterator[Cost]:
    """Fill in a `Cost` when the block ends."""
    torch = sys.modules.get("torch")
    cuda = torch.cuda if torch is not None and torch.cuda.is_initialized() else None
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux: the process's high-water mark starts again from here
            Path("/proc/self/clear_refs").write_text("5")
    cost, start = Cost(), time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = round(time.perf_counter() - start, 3)
        cost.peak_mb = round(_peak_mb() if cuda is None else cuda.max_memory_allocated() / 2**20, 1)


def _peak_mb() -> float:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def run_metadata(**more: Any) -> JSON:
    """Versions, the machine in general words, the command, and whatever a stage adds: the "run" part of a results file.

    Names of people and places stay out: paths in the command are relative or start with ``~``.
    """
    versions = {"python": platform.python_version()}
    for name in _NOTED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine: JSON = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    with contextlib.suppress(AttributeError, ValueError, OSError):
        machine["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        machine["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            machine["accelerator"] = torch.cuda.get_device_name()
    return {
        "command": command_line(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "machine": machine,
        **more,
    }


def command_line() -> str:
    """The command that runs, without the folders of this machine."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    places = {str(Path.cwd()): ".", str(Path.home()): "~"}
    words = []
    for word in sys.argv[1:]:
        for place, shown in places.items():
            if len(place) > 1:
                word = word.replace(place + os.sep, "" if shown == "." else shown + os.sep).replace(place, shown)
        words.append(word)
    return shlex.join([program, *words])
