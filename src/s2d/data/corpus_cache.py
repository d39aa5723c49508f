"""A disk cache for a corpus that takes seconds to gather. It can be deleted at any time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from s2d.errors import InputError
from s2d.io.files import write_atomic

_KEPT = 8  # entries; older ones are removed


def cache_folder() -> Path:
    """The cache folder of s2d: ``$S2D_CACHE``, else ``s2d`` in the user's cache folder."""
    own = os.environ.get("S2D_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2d"


def key_of(files: Iterable[Path], *settings: object) -> str:
    """A key for data made from these files with these settings; a changed file gives another key."""
    digest = hashlib.sha256(repr(settings).encode())
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


def read(name: str, key: str) -> Any | None:
    """The stored data, or None when it is not there or cannot be read."""
    try:
        return json.loads(_path(name, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(name: str, key: str, content: Any) -> None:
    """Store JSON data, atomically; a failed write is no error here."""
    path = _path(name, key)
    with contextlib.suppress(OSError, InputError):
        write_atomic(path, lambda file: file.write(json.dumps(content).encode("utf-8")))
        entries = sorted(path.parent.glob(f"{name}-*.json"), key=lambda entry: entry.stat().st_mtime)
        for entry in entries[:-_KEPT]:
            entry.unlink(missing_ok=True)


def _path(name: str, key: str) -> Path:
    return cache_folder() / f"{name}-{key}.json"
