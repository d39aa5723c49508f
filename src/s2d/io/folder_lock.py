"""A lock: one process works in a folder at a time. The system releases it when the process ends, for any reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2d.errors import InputError

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While active, no other process can lock this folder, which is made if needed.

    Raises:
        InputError: Another process holds the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except FileExistsError:
        raise InputError(f"{folder} is a file; name a folder for the run") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}; choose another folder") from error
    try:
        if not _take(handle):
            raise InputError(
                f"another s2d run is working in {folder}; wait for it to end, or choose another folder with --out"
            )
        yield
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except PermissionError:  # Windows's error for a lock that is taken
        return False
    except OSError:  # a file system without locks
        return True
    return True
