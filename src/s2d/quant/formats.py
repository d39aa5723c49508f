"""Number formats as data: what codes exist and what they stand for.

A format knows nothing about ranges found in data; `quantizer.py` turns a range and a format into scale and zero point.
New kinds of formats (floating point, block-scaled) are further subclasses of `Format`.

Integer grids. Signed formats leave out the most negative two's-complement code (the *restricted* range, -7..7 at
4 bits): the grid is symmetric around zero, `-x` quantizes to minus what `x` does, and the products fit the int8 kernels
of CPUs. It costs 1/16 of the codes at 4 bits and makes int2 ternary. Unsigned formats use every code; with a zero point
they hold any range that contains zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s2d.errors import InputError

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Format:
    """A number format: its name and the bits that one stored value takes."""

    name: str
    bits: int


@dataclass(frozen=True)
class IntFormat(Format):
    """A grid of the integers ``qmin..qmax``; signed formats are symmetric (``qmin == -qmax``, zero point 0)."""

    signed: bool
    qmin: int
    qmax: int

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed at 0."""
        return self.signed

    @property
    def storage(self) -> torch.dtype:
        """The smallest torch type that holds a code."""
        return torch.int8 if self.signed else torch.uint8


def _integer(bits: int, signed: bool) -> IntFormat:
    if signed:
        limit = 2 ** (bits - 1) - 1
        return IntFormat(f"int{bits}", bits, True, -limit, limit)
    return IntFormat(f"uint{bits}", bits, False, 0, 2**bits - 1)


FORMATS: dict[str, IntFormat] = {
    entry.name: entry
    for entry in (_integer(bits, signed) for signed in (True, False) for bits in range(MIN_BITS, MAX_BITS + 1))
}


def get_format(name: str) -> IntFormat:
    """Look a format up by name.

    Raises:
        InputError: There is no such format.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise InputError(f"unknown number format {name!r}; known formats: {', '.join(FORMATS)}") from None


def integer_format(bits: int, *, signed: bool) -> IntFormat:
    """The integer format of that width.

    Raises:
        InputError: The width is outside 2..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"there is no {bits}-bit integer format; use {MIN_BITS} to {MAX_BITS} bits, or 16 to keep it")
    return FORMATS[f"{'int' if signed else 'uint'}{bits}"]
