"""Formats against torch's own types and casts, and against written-out grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s2d.errors import InputError
from s2d.quant.numerics.formats import (
    FORMATS,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    BlockFormat,
    FloatFormat,
    IntFormat,
    float_codes,
    float_magnitudes,
    float_values,
    get_format,
    integer_format,
    round_float,
)

FP8 = [(FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)]
FLOATS = [FP8_E4M3, FP8_E5M2, FP4_E2M1]


@pytest.mark.parametrize("bits", [*range(2, 9), 16])
def test_integer_grids(bits: int) -> None:
    signed, unsigned = (get_format(f"{sign}int{bits}") for sign in ("", "u"))
    assert isinstance(signed, IntFormat) and isinstance(unsigned, IntFormat)
    if bits <= 8:
        assert (signed, unsigned) == (integer_format(bits, signed=True), integer_format(bits, signed=False))
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    # Restricted range: symmetric around zero, one code short of two's complement; not at 16 bits.
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)) + (bits <= 8), 2 ** (bits - 1) - 1)
    assert signed.symmetric and not unsigned.symmetric
    for format in (signed, unsigned):
        info = torch.iinfo(format.storage)
        assert info.min <= format.qmin and format.qmax <= info.max
        assert get_format(format.name) is format is FORMATS[format.name]


def test_formats_are_frozen() -> None:
    with pytest.raises(AttributeError):
        get_format("int4").bits = 5  # type: ignore[misc]


def test_unknown_formats_are_named() -> None:
    with pytest.raises(InputError, match="'int9'.*int4"):
        get_format("int9")
    with pytest.raises(InputError, match="9-bit.*2 to 8"):
        integer_format(9, signed=True)


def every_bfloat16() -> Tensor:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    return values[values.isfinite()]


@pytest.mark.parametrize(("format", "dtype"), FP8, ids=["e4m3", "e5m2"])
def test_fp8_equals_torchs_cast(format: FloatFormat, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert format.qmax == info.max and 2.0**format.smallest_exponent == info.tiny
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(200_000, generator=generator) * torch.logspace(-8, 6, 200_000)
    x = torch.cat([every_bfloat16(), spread])
    wanted = x.clamp(-info.max, info.max).to(dtype)
    rounded = round_float(x, format)
    assert torch.equal(rounded, wanted.float())
    assert torch.equal(rounded.signbit(), wanted.float().signbit())
    # The codes are the bits of torch's type, both ways.
    assert torch.equal(float_codes(rounded, format), wanted.view(torch.uint8))
    assert torch.equal(float_values(wanted.view(torch.uint8), format), wanted.float())


def test_fp4_is_its_eight_magnitudes_with_halves_to_even() -> None:
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(float_magnitudes(FP4_E2M1), grid)
    middles = (grid[1:] + grid[:-1]) / 2
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])  # the neighbour with the even code
    assert torch.equal(round_float(middles, FP4_E2M1), even)
    assert torch.equal(round_float(-middles, FP4_E2M1), -even)
    x = torch.linspace(-7, 7, 4001)
    nearest = (x.abs()[:, None].clamp(max=6) - grid).abs().min(dim=1).values
    assert torch.allclose((round_float(x, FP4_E2M1) - x.clamp(-6, 6)).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("format", FLOATS, ids=lambda f: f.name)
def test_every_code_of_a_float_format_survives(format: FloatFormat) -> None:
    count = len(float_magnitudes(format))
    codes = torch.cat([torch.arange(count), torch.arange(count) + 2 ** (format.bits - 1)]).to(torch.uint8)
    values = float_values(codes, format)
    assert torch.equal(round_float(values, format), values)
    assert torch.equal(float_codes(values, format), codes)
    assert values.max() == format.qmax


@given(st.sampled_from(FLOATS), st.floats(-1e5, 1e5, width=32), st.floats(-1e5, 1e5, width=32))
def test_rounding_to_floats_is_monotone_odd_and_idempotent(format: FloatFormat, a: float, b: float) -> None:
    x = torch.tensor(sorted([a, b]), dtype=torch.float32)
    rounded = round_float(x, format)
    assert rounded[0] <= rounded[1]
    assert torch.equal(round_float(-x, format), -rounded)
    assert torch.equal(round_float(rounded, format), rounded)


def test_nan_stays_and_infinity_is_clipped() -> None:
    for format in FLOATS:
        rounded = round_float(torch.tensor([torch.nan, torch.inf, -torch.inf]), format)
        assert rounded[0].isnan() and rounded[1:].tolist() == [format.qmax, -format.qmax]


def test_block_formats_are_those_of_the_standards() -> None:
    blocks = {name: format for name, format in FORMATS.items() if isinstance(format, BlockFormat)}
    facts = {name: (f.element.name, f.block, f.scale and f.scale.name, f.bits) for name, f in blocks.items()}
    assert facts == {
        "mxfp8": ("fp8_e4m3", 32, None, 8),
        "mxfp4": ("fp4_e2m1", 32, None, 4),
        "nvfp4": ("fp4_e2m1", 16, "fp8_e4m3", 4),
    }
