"""Errors that people read: one line, what happened, where, and what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class S2DError(Exception):
    """Base class of every error s2d raises on purpose."""


class InputError(S2DError, ValueError):
    """The caller's input is at fault; the message names it and the remedy. The command line exits with 2."""


class MissingExtra(InputError):
    """An optional dependency is not installed; the message holds the install line."""


def choices(name: str, known: Iterable[str]) -> str:
    """The end of a line about an unknown name: the names that are close to it, else all there are."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency when it is first needed.

    Args:
        module: Dotted name of the module, e.g. ``"transformers"``.
        extra: The extra of s2d that brings it, e.g. ``"hf"``.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise MissingExtra(f'{package} is needed here and is not installed; run: pip install "s2d[{extra}]"') from None
