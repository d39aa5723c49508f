"""Freed memory, handed back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Drop what only cycles hold, and make glibc return what it keeps for later; between the stages of an export that
    is a good part of a model's size.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
