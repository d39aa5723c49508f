"""Number formats as data: the codes that exist and their values.

A format knows nothing about ranges found in data; `quantizer.py` turns a range and a format into scale and zero point.

Integers. Signed formats of up to 8 bits leave out the most negative two's-complement code (the *restricted* range,
-7..7 at 4 bits): the grid is symmetric around zero, `-x` quantizes to minus what `x` does, and products fit the int8
kernels of CPUs. It costs 1/16 of the codes at 4 bits and makes int2 ternary. Unsigned formats use every code; with a
zero point they hold any range that contains zero. Weights have 2 to 8 bits. Activations may also be int16 or uint16,
which NPUs compute with, on all codes; a width of 16 in a spec is not that: it keeps full precision. Every signed width
also exists with scales that are powers of two (``int8-pow2``), for NPUs that shift instead of multiplying.

Floating point. IEEE-like grids without infinities: values beyond the largest are clipped, halves round to even, as
torch's casts do inside the range (`float8_e4m3fn`, `float8_e5m2`).

Blocks. Small floating-point elements that share a scale with their neighbours along the last dimension: OCP
Microscaling v1.0 (blocks of 32, scale a power of two, floor rule) and NVFP4 (blocks of 16, scale e4m3 under one scale a
tensor).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from s2d.errors import InputError

MIN_BITS, MAX_BITS = 2, 8
WIDE_BITS = 16  # of activations only


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: Short name.
        bits: Bits that one stored value takes, scales not counted.
        qmax: The largest value at scale 1.
    """

    name: str
    bits: int
    qmax: float

    @property
    def symmetric(self) -> bool:
        """Whether ``-x`` is a value whenever ``x`` is; the zero point is then fixed at 0."""
        return True


@dataclass(frozen=True)
class IntFormat(Format):
    """The integers ``qmin..qmax``; signed formats of up to 8 bits are symmetric (``qmin == -qmax``).

    Attributes:
        power_of_two: Scales are powers of two.
    """

    signed: bool
    qmin: int
    power_of_two: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed at 0."""
        return self.signed

    @property
    def storage(self) -> torch.dtype:
        """The smallest torch type that holds a code."""
        if self.bits > MAX_BITS:
            return torch.int16 if self.signed else torch.uint16
        return torch.int8 if self.signed else torch.uint8


@dataclass(frozen=True)
class FloatFormat(Format):
    """One sign bit, ``exponent_bits`` (IEEE bias) and ``mantissa_bits``; codes above ``qmax`` are not used."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number; below it steps no longer shrink."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest number."""
        return math.floor(math.log2(self.qmax))


@dataclass(frozen=True)
class BlockFormat(Format):
    """Elements that share a scale by blocks of the last dimension; the last block is filled up with zeros.

    Attributes:
        element: Format of the elements.
        block: Elements a block.
        scale: Format of a block's scale, relative to one float32 scale a tensor; None for powers of two with nothing
            above them (e8m0).
        rule: How a block's scale comes from its largest value: ``"floor"`` is OCP's power of two, and e4m3 scales that
            are normal numbers; ``"even"`` is AMD Quark's and compressed-tensors': the next power of two from 1.75 times
            a power on, and e4m3 scales that may be subnormal.
    """

    element: FloatFormat
    block: int
    scale: FloatFormat | None
    rule: Literal["floor", "even"] = "floor"


def _integer(bits: int, signed: bool, power_of_two: bool = False) -> IntFormat:
    if signed:
        limit = 2 ** (bits - 1) - 1
        name, low = f"int{bits}{'-pow2' if power_of_two else ''}", -limit if bits <= MAX_BITS else -limit - 1
        return IntFormat(name, bits, limit, True, low, power_of_two)
    return IntFormat(f"uint{bits}", bits, 2**bits - 1, False, 0)


_WIDTHS = (*range(MIN_BITS, MAX_BITS + 1), WIDE_BITS)

FP8_E4M3 = FloatFormat("fp8_e4m3", 8, 448.0, 4, 3)
FP8_E5M2 = FloatFormat("fp8_e5m2", 8, 57344.0, 5, 2)
FP4_E2M1 = FloatFormat("fp4_e2m1", 4, 6.0, 2, 1)

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        *(_integer(bits, signed) for signed in (True, False) for bits in _WIDTHS),
        *(_integer(bits, True, power_of_two=True) for bits in _WIDTHS),
        FP8_E4M3,
        FP8_E5M2,
        FP4_E2M1,
        BlockFormat("mxfp8", 8, FP8_E4M3.qmax, FP8_E4M3, 32, None),
        BlockFormat("mxfp4", 4, FP4_E2M1.qmax, FP4_E2M1, 32, None),
        BlockFormat("nvfp4", 4, FP4_E2M1.qmax * FP8_E4M3.qmax, FP4_E2M1, 16, FP8_E4M3),
    )
}


def get_format(name: str) -> Format:
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
    format = FORMATS[f"{'int' if signed else 'uint'}{bits}"]
    assert isinstance(format, IntFormat)
    return format


def power_of_two(x: Tensor) -> Tensor:
    """The smallest powers of two that are not below positive values, the same shape."""
    mantissa, exponent = torch.frexp(x)  # mantissas are in [0.5, 1), and 0.5 belongs to a power
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def round_float(x: Tensor, format: FloatFormat) -> Tensor:
    """Round float32 values to the nearest value of a floating-point grid, halves to even, clipped at its ends.

    Args:
        x: float32, any shape.
        format: The grid.
    """
    # The power of two below |x| is its exponent field; a step is that, mantissa_bits lower. Both are exact in float32.
    bottom, shift = (format.smallest_exponent + 127) << 23, format.mantissa_bits << 23
    step = (x.contiguous().view(torch.int32) & 0x7F800000).clamp_(min=bottom).sub_(shift).view(torch.float32)
    return (x / step).round_().mul_(step).clamp_(-format.qmax, format.qmax)


@cache
def float_magnitudes(format: FloatFormat) -> Tensor:
    """The non-negative values in the order of their codes, float32 ``[number of codes]``."""
    exponents, mantissas = 2**format.exponent_bits, 2**format.mantissa_bits
    values = []
    for exponent in range(exponents):
        for mantissa in range(mantissas):
            lead = mantissas if exponent else 0
            power = max(exponent, 1) - 1 + format.smallest_exponent - format.mantissa_bits
            values.append((lead + mantissa) * 2.0**power)
    return torch.tensor([value for value in values if value <= format.qmax])


def float_codes(values: Tensor, format: FloatFormat) -> Tensor:
    """The codes (uint8; sign bit, exponent, mantissa) of values that lie on the grid."""
    magnitudes = float_magnitudes(format).to(values.device)
    index = torch.bucketize(values.abs(), magnitudes).to(torch.uint8)
    return index | (torch.signbit(values).to(torch.uint8) << (format.bits - 1))


def float_values(codes: Tensor, format: FloatFormat) -> Tensor:
    """The float32 values of codes."""
    magnitudes = float_magnitudes(format).to(codes.device)
    sign = 1.0 - 2.0 * (codes >> (format.bits - 1)).float()
    return magnitudes[(codes & (2 ** (format.bits - 1) - 1)).long()] * sign
