"""The integers of a quantized model: codes, scales and zero points of a site, as a runtime needs them.

    y = (codes_x - zero_point) * scale_x  @  (codes_w * scale_w)^T + b

Activation codes are shifted to begin at 0, so that one unsigned type holds signed and unsigned grids of up to 8 bits;
weight codes are signed. Formats that are not integers have no such form and are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.errors import InputError
from s2d.quant.numerics.formats import MAX_BITS, IntFormat
from s2d.quant.numerics.log_and_twin import LogSqrt2Quantizer, TwinQuantizer
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer, quantize_codes, spread


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as signed codes.

    Attributes:
        codes: int8, the weight's shape ``[out, ...]``.
        scale: float32: ``[]``, one a channel ``[out]``, or one a group of inputs ``[out, groups]``.
    """

    codes: Tensor
    scale: Tensor

    @property
    def granularity(self) -> str:
        """``"tensor"``, ``"channel"`` or ``"group"``."""
        return ("tensor", "channel", "group")[self.scale.ndim]


@dataclass(frozen=True)
class IntegerActivation:
    """How an activation becomes codes 0..top.

    Attributes:
        format: Of the codes before they are shifted.
        scale: float32 ``[]``, or one a head ``[H]``; None when every token brings its own.
        zero_point: int32, the shape of ``scale``; None with it.
    """

    format: IntFormat
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def top(self) -> int:
        """The last code; signed grids of up to 8 bits use one code less than there are."""
        return int(self.format.qmax - self.format.qmin)

    @property
    def dynamic(self) -> bool:
        """Whether scales are found for every token while the model runs."""
        return self.scale is None


def integer_weight(weight: Tensor, quantizer: WeightQuantizer) -> IntegerWeight:
    """The codes of a weight.

    Raises:
        InputError: Its format has no signed integers.
    """
    format = _integers(quantizer)
    if not format.signed:
        raise InputError(f"{quantizer.name} has unsigned weights ({format.name}); runtimes take signed ones: use w4a4")
    scale, zero_point = quantizer.scale, quantizer.zero_point
    codes = quantize_codes(weight.detach(), spread(scale, weight.shape), spread(zero_point, weight.shape), format)
    return IntegerWeight(codes, scale.detach().clone())


def integer_activation(quantizer: Quantizer) -> IntegerActivation:
    """The codes of an activation.

    Raises:
        InputError: It is not rounded to one uniform grid of integers.
    """
    if isinstance(quantizer, (LogSqrt2Quantizer, TwinQuantizer)):
        raise InputError(
            f"{quantizer.name} is rounded on two grids ({quantizer.kind}), which runtimes have no codes for; "
            "use a method without such grids"
        )
    if quantizer.prefix:
        raise InputError(
            f"{quantizer.name} keeps the first {quantizer.prefix} tokens at full precision, which no runtime here "
            "does; quantize without a prefix, or with ranges of each token (w4a4-token)"
        )
    format = _integers(quantizer)
    if quantizer.granularity in ("token", "span"):
        if format.bits > MAX_BITS:
            raise InputError(
                f"{quantizer.name} is {format.name} with a range for every token, which no runtime computes; use "
                f"static ranges (w8a{format.name}) or 8 bits (w8a8-token)"
            )
        return IntegerActivation(format)
    return IntegerActivation(format, quantizer.scale.detach().clone(), quantizer.zero_point.detach() - format.qmin)


def _integers(quantizer: Quantizer) -> IntFormat:
    if not isinstance(quantizer.format, IntFormat):
        nearest = "w4a4" if quantizer.format.bits <= 4 else "w8a8"
        raise InputError(
            f"{quantizer.name} is {quantizer.format.name}, which no kernel of this runtime computes; "
            f"the nearest spec that it runs is {nearest}"
        )
    return quantizer.format


def embedding_codes(table: Tensor, bits: int, group: int = 32) -> IntegerWeight:
    """Round an embedding table: one scale a row at 8 bits, one for every ``group`` columns below (or a row, if they do
    not divide it).

    Args:
        table: ``[vocabulary, D]``.
        bits: 2 to 8.
        group: Columns that share a scale, below 8 bits.

    Returns:
        Codes, and scales ``[vocabulary, groups]``: the smallest of a few clipped ranges by squared error below 8 bits.
    """
    qmax = 2 ** (bits - 1) - 1
    size = table.shape[1]
    group = size if bits >= 8 or size % group else group
    blocks = table.detach().float().unflatten(1, (-1, group))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-40)
    best, error = largest, torch.full_like(largest, torch.inf)
    for share in (1.0,) if bits >= 8 else (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        step = largest * share / qmax
        found = ((blocks / step).round().clamp(-qmax, qmax) * step - blocks).square().sum(-1, keepdim=True)
        best = torch.where(found < error, largest * share, best)
        error = torch.minimum(found, error)
    step = best / qmax
    codes = (blocks / step).round().clamp(-qmax, qmax).to(torch.int8)
    return IntegerWeight(codes.flatten(1), step.squeeze(-1))
