from __future__ import annotations

import pytest
import torch

from s2d.errors import InputError
from s2d.quant.formats import FORMATS, get_format, integer_format


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_grids(bits: int) -> None:
    signed, unsigned = integer_format(bits, signed=True), integer_format(bits, signed=False)
    assert (unsigned.qmin, unsigned.qmax) == (0, 2**bits - 1)
    # Restricted range: symmetric around zero, one code short of two's complement.
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
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
