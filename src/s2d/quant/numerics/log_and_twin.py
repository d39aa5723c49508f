"""Quantizers for the outputs of softmax and GELU: log-sqrt2, and two uniform ranges that share one code (twin).

Log-sqrt2 (RepQ-ViT, arXiv 2212.08254, section 3.3), for x in [0, scale]:

    code = round(-2 log2(x / scale));   x_hat = scale 2**(-code / 2), or 0 where code >= 2**bits

An integer product takes it as powers of two, `2**(-code/2) = 2**-ceil(code/2) (1 + (sqrt2 - 1)(code mod 2))`: a shift,
under one of two scales. As published, the value 0 is an extra level beside the 2**bits others; a kernel with exactly
``bits`` bits must use its last code for 0.

Whatever lies below `2**(-(2**bits - 0.5) / 2)` of the scale becomes 0, and a row of probabilities over many tokens
consists of such values: with one scale a tensor, the rows no longer sum to 1. Kept mass and relative squared error at 4
bits, logits N(0, sd^2), best of 60 scales (`tests/quant/numerics/test_log_and_twin.py` measures both again):

    sd    tokens   log-sqrt2      uniform       twin
    1.5   196      .89  .014      .73  .080     .71  .072
    1.5   576      .84  .019      .67  .111     .62  .186
    1.5   1024     .81  .022      .65  .123     .47  .235

Dividing the rows by their new sums does not help: it doubles or triples the error. At 576 tokens or more prefer 6 or 8
bits for the probabilities: the override ``"*.probs": {"attention": {"bits": 8}}``.

Twin (PTQ4ViT, arXiv 2111.12293, section 3.2): one bit says which of two ranges, the other bits are the code inside it,
0..K-1 with K = 2**(bits - 1).

    magnitude    low range [0, split), step split / (K-1); high range [split, 1], step 1 / (K-1)     for softmax
    sign         negative range, codes -K..0; positive range, codes 0..K-1; each its own step        for GELU

The released code adds the two parts, `Q_high(max(x, split)) + Q_low(min(x, split))`, and so counts ``split`` twice in
the high range and `Q_high(split)` on top in the low one. That is ``form="sum"``, to reproduce published numbers; the
default is the piecewise form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from s2d.quant.numerics.formats import Format, IntFormat
from s2d.quant.numerics.quantizer import SMALLEST_SCALE, Quantizer, RangeFinder, register_kind

Split = Literal["magnitude", "sign"]
Form = Literal["piecewise", "sum"]


def log_sqrt2_codes(x: Tensor, scale: Tensor) -> Tensor:
    """The code of every value before any limit, float32; values of 0 or less get infinity, which stands for 0.

    Args:
        x: Any shape.
        scale: The largest value, > 0, broadcastable to x.
    """
    return torch.round(-2.0 * torch.log2(x.float().clamp(min=0.0) / scale)).clamp(min=0.0)


def log_sqrt2_values(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What codes stand for, float32."""
    return torch.where(codes >= 2**bits, torch.zeros_like(codes), scale * torch.exp2(-0.5 * codes))


def log_sqrt2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize probabilities; same shape and dtype.

    The gradient is straight-through: 1 where a value has a code, 0 where it was clipped or became 0.
    """
    codes = log_sqrt2_codes(x.detach(), scale)
    rounded = log_sqrt2_values(codes, scale, bits).to(x.dtype)
    return _straight_through(x, rounded, lambda: (codes < 2**bits) & (x <= scale))


def twin(x: Tensor, low: Tensor, high: Tensor, bits: int, split: Split, form: Form = "piecewise") -> Tensor:
    """Quantize and dequantize with two uniform ranges; same shape and dtype.

    The gradient is straight-through: 1 inside the ranges, 0 where values were clipped.

    Args:
        x: Any shape.
        low: Step of the low (negative) range, > 0, broadcastable to x.
        high: Step of the high (positive) range, likewise.
        bits: Bits of a code, the one that tells the ranges apart included.
        split: What tells them apart.
        form: ``"piecewise"``, or ``"sum"`` as in PTQ4ViT's release; by sign they are the same.
    """
    levels = 2 ** (bits - 1)
    wide = x.detach().float()
    if split == "sign":
        negative = torch.round(wide.clamp(max=0.0) / low).clamp(min=-levels) * low
        positive = torch.round(wide.clamp(min=0.0) / high).clamp(max=levels - 1) * high
        inside = (wide >= -(levels + 0.5) * low) & (wide <= (levels - 0.5) * high)
        return _straight_through(x, (negative + positive).to(x.dtype), lambda: inside)
    border = low * (levels - 1)
    if form == "sum":
        lower = torch.round(torch.minimum(wide, border) / low).clamp(0, levels - 1) * low
        upper = torch.round(torch.maximum(wide, border) / high).clamp(0, levels - 1) * high
        rounded = lower + upper
    else:
        step = torch.where(wide < border, low, high)
        rounded = torch.round(wide / step).clamp(0, levels - 1) * step
    return _straight_through(x, rounded.to(x.dtype), lambda: (wide >= 0.0) & (wide <= (levels - 0.5) * high))


def _straight_through(x: Tensor, rounded: Tensor, inside: Callable[[], Tensor]) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return rounded + (x - x.detach()) * inside()


@register_kind
class LogSqrt2Quantizer(Quantizer):
    """Log-sqrt2 for values in [0, scale]: attention probabilities."""

    kind = "log_sqrt2"

    def __init__(self, format: Format, *, name: str) -> None:
        """Make a quantizer that is still off; of ``format`` only the width is read."""
        assert isinstance(format, IntFormat)
        super().__init__(format, "tensor", name=name)

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Take ``hi`` (a scalar) as the scale; the lower end is always 0."""
        self.scale.copy_(hi.clamp(min=SMALLEST_SCALE))

    def fit(self, observer: RangeFinder) -> None:
        """Take the range that an observer finds for rounding on a log scale."""
        bits = self.format.bits
        self.set_range(*observer.range(self.format, lambda x, lo, hi: log_sqrt2(x, hi.clamp(min=SMALLEST_SCALE), bits)))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` as its codes hold it."""
        return log_sqrt2(x, self.scale, self.format.bits)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"log-sqrt2, {self.format.bits} bits{'' if self.enabled else ', off'}"


@register_kind
class TwinQuantizer(Quantizer):
    """Two uniform ranges, told apart by magnitude (attention probabilities) or by sign (outputs of GELU).

    ``scale`` holds both steps, ``[2]``.
    """

    kind = "twin"

    def __init__(self, format: Format, *, name: str, split: Split, form: Form = "piecewise") -> None:
        """Make a quantizer that is still off; of ``format`` only the width is read."""
        assert isinstance(format, IntFormat) and split in get_args(Split) and form in get_args(Form)
        super().__init__(format, "tensor", name=name)
        self.split: Split = split
        self.form: Form = form
        self.scale, self.zero_point = torch.ones(2), torch.zeros(2, dtype=torch.int32)

    @property
    def levels(self) -> int:
        """K: how many codes a range has."""
        return 2 ** (self.format.bits - 1)

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Cover ``[lo, hi]`` (scalars): by sign, each range its own end; by magnitude, ``lo`` ends the low range."""
        self.scale.copy_(torch.stack(self.steps(lo, hi)))

    def steps(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The steps of the low and of the high range that cover it, of any shape."""
        low = -lo / self.levels if self.split == "sign" else lo / (self.levels - 1)
        return low.clamp(min=SMALLEST_SCALE), (hi / (self.levels - 1)).clamp(min=SMALLEST_SCALE)

    def fit(self, observer: RangeFinder) -> None:
        """Take the range that an observer finds; by magnitude, the low range then divides the high one's first step."""
        if self.split == "sign":
            self.set_range(*observer.range(self.format, self.rounding))
            return
        first = 1.0 / (self.levels - 1)
        _, hi = observer.range(self.format, lambda x, lo, hi: self.rounding(x, first * hi, hi))
        self.set_range(first * hi, hi)

    def rounding(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """``x`` as the codes would hold it after `set_range`, for any number of ranges that broadcast against x."""
        return twin(x, *self.steps(lo, hi), self.format.bits, self.split, self.form)

    def options(self) -> dict[str, Any]:
        """Which split, in which form."""
        return {"split": self.split, "form": self.form}

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` as its codes hold it."""
        return twin(x, self.scale[0], self.scale[1], self.format.bits, self.split, self.form)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"twin by {self.split} ({self.form}), {self.format.bits} bits{'' if self.enabled else ', off'}"
