"""Provenance of a result: versions, commit, machine, seconds, peak memory, digests of data and code."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d.io.files import JSON, _plain

_NOTED = ("s2d", "torch", "transformers", "accelerate", "timm", "open_clip_torch", "numpy", "safetensors")


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def digest(content: object) -> str:
    """A hash of a JSON-like value, 12 hexadecimal digits. The order of keys does not matter."""
    text = json.dumps(_plain(content), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def code_digest(*rooms: str) -> str:
    """A hash of the code in these folders of s2d, 12 hexadecimal digits. Comments and docstrings do not count.

    Args:
        rooms: Files or folders of the package, such as ``"writers.py"`` and ``"quant"``.
    """
    package = Path(__file__).parent.parent
    sha = hashlib.sha256()
    for room in sorted(rooms):
        place = package / room
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            sha.update(f"{file.relative_to(package).as_posix()} {_meaning(file, file.stat().st_mtime_ns)}".encode())
    return sha.hexdigest()[:12]


@functools.cache
def _meaning(file: Path, changed: int) -> str:
    """A hash of a Python file's code, cached, as every stage of a run needs the same files."""
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
    """Time and memory of a stage.

    Attributes:
        seconds: Wall-clock time.
        peak_mb: Peak memory in MB: of the accelerator where one is used, otherwise of the process.
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
    """The "run" part of a results file: versions, the machine in general words, the command, and a stage's additions.

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
    """The command line, without the folders of this machine."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    places = {str(Path.cwd()): ".", str(Path.home()): "~"}
    words = []
    for word in sys.argv[1:]:
        for place, shown in places.items():
            if len(place) > 1:
                word = word.replace(place + os.sep, "" if shown == "." else shown + os.sep).replace(place, shown)
        words.append(word)
    return shlex.join([program, *words])
