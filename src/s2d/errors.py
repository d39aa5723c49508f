"""Errors for users: one line that says what happened, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class S2DError(Exception):
    """Base class of every error s2d raises on purpose."""


class InputError(S2DError, ValueError):
    """The caller's input is at fault; the message names it and the remedy. The command line exits with 2."""


class MissingExtra(InputError):
    """An optional dependency is not installed; the message holds the install line."""


# Control characters (terminal escapes among them) and marks that turn the direction of text have no place in a line.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: object, most: int = 300) -> str:
    """``text`` with what cannot be seen written out as an escape, and cut at so many characters."""
    shown = _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error of another library says, in one line (with the next, where the first only announces it); its kind
    where it says nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return visible(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), most)


def choices(name: str, known: Iterable[str], else_: str = "") -> str:
    """The end of a line about an unknown name: the names that are close to it, else all there are.

    Args:
        name: The unknown one.
        known: What there is.
        else_: What to say in place of a list that is too long, when nothing is close.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else else_ or f"choose from {', '.join(known)}"
