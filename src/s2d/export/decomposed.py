"""Static Linears in the decomposed operators of PT2E, which XNNPACK and other delegates of ExecuTorch lower.

    dequantize(quantize(x)) @ dequantize(codes)^T + b, and the same pair around the output

``quantized_decomposed`` is what torchao's ``convert_pt2e`` leaves behind. Here the pairs hold the ranges of the
quantized model, so nothing is observed again, but for one thing: a static product of XNNPACK rounds its output to 8
bits too, and s2d simulates no such rounding. Those ranges are the extremes of the outputs on an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.export.integers import IntegerActivation, IntegerWeight
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.quantizer import affine_parameters

_LOW, _TOP = -128, 127  # codes of a delegate are int8; those of weights leave out the lowest


class Pair(nn.Module):
    """A quantize and a dequantize with one range a tensor, on int8."""

    def __init__(self, scale: float, zero_point: int) -> None:
        """Hold a scale, and a zero point in -128..127."""
        super().__init__()
        self.range = (scale, zero_point, _LOW, _TOP, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        ops: Any = torch.ops.quantized_decomposed
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.range), *self.range)


class StaticLinear(nn.Module):
    """A Linear of int8 codes whose input has one static range, or none.

    Attributes:
        input: Rounds what it reads; None for an input in full precision.
        output: Rounds what it returns; None while it is not known.
    """

    weight: Tensor
    weight_scale: Tensor
    zeros: Tensor
    input: Pair | None
    output: Pair | None

    def __init__(self, weight: IntegerWeight, activation: IntegerActivation | None, bias: Tensor | None) -> None:
        """Take the codes ``[out, in]`` (a scale for each channel, or for all), and 8-bit codes of the input."""
        super().__init__()
        from torchao.quantization.pt2e import quantizer  # noqa: F401  (registers the operators)

        scale = weight.scale.expand(len(weight.codes)).contiguous()
        self.register_buffer("weight", weight.codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("zeros", torch.zeros_like(scale, dtype=torch.int64))
        self.bias = bias
        self.input = None if activation is None else _pair(activation)
        self.output = None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        ops: Any = torch.ops.quantized_decomposed
        values = ops.dequantize_per_channel(self.weight, self.weight_scale, self.zeros, 0, -_TOP, _TOP, torch.int8)
        found = F.linear(input if self.input is None else self.input(input), values, self.bias)
        return found if self.output is None else self.output(found)


def _pair(activation: IntegerActivation) -> Pair:
    assert activation.scale is not None and activation.zero_point is not None
    below = activation.format.qmin if activation.format.signed else _LOW
    return Pair(float(activation.scale), int(activation.zero_point) + int(below))


@torch.no_grad()
def set_output_ranges(made: nn.Module, model: nn.Module, example: Mapping[str, Tensor]) -> int:
    """Give the outputs of all static Linears the ranges that they have on an example; return how many.

    Args:
        made: Holds the static Linears.
        model: The quantized model, with layers of the same names.
        example: A batch of keyword inputs.
    """
    static = {name: each for name, each in made.named_modules() if isinstance(each, StaticLinear)}
    ends: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, y: Tensor) -> None:
        lo, hi = ends.get(name, (y.min(), y.max()))
        ends[name] = torch.minimum(lo, y.min()), torch.maximum(hi, y.max())

    hooks = [
        layer.register_forward_hook(lambda _, __, y, name=name: see(name, y))
        for name, layer in model.named_modules()
        if name in static
    ]
    try:
        model(**example)
    finally:
        for hook in hooks:
            hook.remove()
    for name, (lo, hi) in ends.items():
        scale, zero_point = affine_parameters(lo, hi, FORMATS["uint8"], False)
        static[name].output = Pair(float(scale), int(zero_point) + _LOW)
    return len(ends)
