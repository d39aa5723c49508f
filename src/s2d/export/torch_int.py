"""A quantized model in plain torch with integer products: a reference, and a fallback without further packages.

    y = ((codes_x - shift) @ codes_w) * (scale_x scale_w) + b - (zero_point - shift) * scale_x scale_w * sum_in(codes_w)

on ``torch._int_mm`` (int8 x int8 with int32 sums): exact. Codes of 8 bits are shifted by 128 to fit int8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s2d.export.lowering import LoweredLinear, LoweredOnlineLinear, Rounded, lower
from s2d.quant.modules.linear import turn_into

_SHIFT, _MOST = 128, 255


class _TorchProduct:
    """The product of a Linear with codes on both sides."""

    rounded: Rounded
    integer_codes: Tensor
    output_scale: Tensor
    offset: Tensor

    def quantized_product(self, input: Tensor) -> Tensor:
        """``input [..., in]`` to ``[..., out]``."""
        rounding = self.rounded
        shift = _shift(rounding)
        codes = torch.round(input.reshape(-1, input.shape[-1]) / rounding.scale).add_(rounding.zero_point)
        codes = codes.clamp_(0, rounding.top).sub_(shift).to(torch.int8)
        sums = torch.ops.aten._int_mm(codes, self.integer_codes).to(input.dtype)
        return sums.mul_(self.output_scale).add_(self.offset).reshape(*input.shape[:-1], -1)


class TorchLinear(_TorchProduct, LoweredLinear):
    """A Linear on ``torch._int_mm``."""


class TorchOnlineLinear(_TorchProduct, LoweredOnlineLinear):
    """The same under a transform of its input, or beside a low-rank branch."""


def integer_model(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose Linears multiply int8 codes.

    Linears with codes of up to 8 bits on both sides (per-tensor activations, per-channel or per-tensor weights) do;
    other sites round in floating point, as they do in the quantized model.

    Args:
        model: From `s2d.quantize` or `s2d.load`; left as it is.

    Raises:
        InputError: It is not quantized, or a site has no integer form; the message names the site.
    """
    made = lower(model)
    for module in made.modules():
        if not isinstance(module, (LoweredLinear, LoweredOnlineLinear)):
            continue
        rounding = module.input_quantizer
        if not isinstance(rounding, Rounded) or rounding.top > _MOST:
            continue
        if rounding.axis < 0 and module.weight_codes.integer:
            online = isinstance(module, LoweredOnlineLinear)
            _turn(module, rounding, TorchOnlineLinear if online else TorchLinear)
    return made


def _shift(rounding: Rounded) -> int:
    """The shift with which the codes fit int8."""
    return _SHIFT if rounding.top > 127 else 0


def _turn(module: Any, rounding: Rounded, kind: type[Any]) -> None:
    codes = module.weight_codes.codes
    scale = module.weight_codes.weight_scale * rounding.scale
    shift = _shift(rounding)
    offset = (shift - rounding.zero_point.to(scale.dtype)) * scale * codes.sum(0, dtype=torch.int32)
    bias = module.bias
    turn_into(module, kind)
    module.rounded = rounding
    for name, value in (
        ("integer_codes", codes),
        ("output_scale", scale),
        ("offset", offset if bias is None else offset + bias),
    ):
        module.register_buffer(name, value.detach())
