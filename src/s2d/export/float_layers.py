"""Layers of floating-point codes: FP8, MXFP4, MXFP8 and NVFP4 in the format of compressed-tensors.

    FP8    y = e4m3(x / s_x) s_x  (e4m3(W / s_w) s_w)^T             s_w one a row or a tensor, s_x static or one a token
    MXFP   blocks of 32 inputs share a power of two, stored as its exponent plus 127 (OCP Microscaling v1.0)
    NVFP4  blocks of 16 inputs share an e4m3 scale; the file holds the inverse of the tensor's scale above them

Inputs of blocks find the scales of their blocks while the model runs, by the reader's rule: powers of two rise from
1.75 times a power on where OCP's text rounds down, and small NVFP4 scales may be subnormal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.modules.storage import encode
from s2d.quant.numerics.formats import FP8_E4M3, BlockFormat, FloatFormat, Format
from s2d.quant.numerics.quantizer import Quantizer

_BLOCKS = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized", "nvfp4": "nvfp4-pack-quantized"}


@dataclass(frozen=True)
class FloatLayer:
    """A Linear whose weight is rounded to floating-point codes.

    Attributes:
        name: The module.
        weight: ``[out, in]``, before rounding.
        quantizer: The weight's.
        input: The input's quantizer; None where the input is not rounded.
    """

    name: str
    weight: Tensor
    quantizer: Quantizer
    input: Quantizer | None

    @property
    def format(self) -> str:
        """The name of compressed-tensors for the layer's bytes."""
        if isinstance(self.quantizer.format, BlockFormat):
            return _BLOCKS[self.quantizer.format.name]
        return "naive-quantized" if self.input is None else "float-quantized"

    def scheme(self) -> dict[str, Any]:
        """The quantization of the layer, as compressed-tensors describes it."""
        inputs = None if self.input is None else _words(self.input)
        return {"weights": _words(self.quantizer), "input_activations": inputs, "format": self.format}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the layer in the file, by key."""
        format, scale = self.quantizer.format, self.quantizer.scale.detach().float()
        spread, zero_point = self.quantizer.parameters_for(self.weight)
        stored = encode(self.weight.detach(), spread.detach(), zero_point, format)
        rows = len(self.weight)
        made = {}
        if isinstance(format, BlockFormat):
            key = "weight" if format.bits == 8 else "weight_packed"
            codes = stored["codes"].view(rows, -1)
            made[key] = codes.view(torch.float8_e4m3fn) if format.bits == 8 else codes
            blocks = stored["blocks"].view(rows, -1)
            made["weight_scale"] = blocks if format.scale is None else blocks.view(torch.float8_e4m3fn)
            if format.scale is not None:
                made["weight_global_scale"] = (1.0 / scale).reshape(1)
        else:
            made["weight"] = stored["codes"].view(self.weight.shape).view(torch.float8_e4m3fn)
            made["weight_scale"] = scale.reshape(-1, 1) if scale.ndim else scale.reshape(1)
        if self.input is not None and not self.input.dynamic:
            scale = self.input.scale.detach().float().reshape(1)
            inverse = isinstance(self.input.format, BlockFormat)
            made["input_global_scale" if inverse else "input_scale"] = 1.0 / scale if inverse else scale.clone()
        return {f"{self.name}.{key}": value.contiguous() for key, value in made.items()}


def float_layer(name: str, module: QuantizedLinear) -> FloatLayer | None:
    """A layer of floating-point codes; None for one of integers.

    Args:
        name: The module's.
        module: A quantized Linear.

    Raises:
        InputError: compressed-tensors cannot hold the format, mixture or size; the message gives the nearest that it
            can.
    """
    weight, input = module.weight_quantizer, module.input_quantizer
    if weight is None or not isinstance(weight.format, (FloatFormat, BlockFormat)):
        return None
    for quantizer in (weight, input):
        if quantizer is not None and isinstance(quantizer.format, FloatFormat) and quantizer.format != FP8_E4M3:
            raise InputError(
                f"{quantizer.name} is {quantizer.format.name}, which compressed-tensors has no name for; the nearest "
                "spec that it can say is fp8 (fp8_e4m3)"
            )
    if input is not None and input.format.name != weight.format.name:
        raise InputError(
            f"{name} multiplies {weight.format.name} weights with {input.format.name} inputs, which no kernel behind "
            f"compressed-tensors does; give both one format, such as {_short(weight.format)}, or keep the inputs"
        )
    if input is not None and input.prefix:
        raise InputError(f"{input.name} keeps the first {input.prefix} tokens; compressed-tensors rounds every token")
    size = module.weight.shape[1]
    if isinstance(weight.format, BlockFormat) and size % weight.format.block:
        raise InputError(
            f"{name} has {size} inputs, which blocks of {weight.format.block} ({weight.format.name}) do not divide; "
            f'the nearest choice is an override "{name}": {_nearest(size, weight.format)}'
        )
    return FloatLayer(name, module.weight, weight, input)


@torch.no_grad()
def share_scales(model: nn.Module, example: Mapping[str, Tensor]) -> int:
    """Give NVFP4 layers that read one tensor (q, k and v; gate and up) one scale above those of their blocks, the
    largest of theirs: servers compute such layers as one product with one scale.

    Args:
        model: A copy; scales are replaced, not written to.
        example: A batch of keyword inputs.

    Returns:
        How many layers got another scale; their codes then differ from the simulated ones.
    """
    groups: dict[tuple[int, int], list[Quantizer]] = {}
    seen: list[Tensor] = []  # tensors are kept alive, so that their addresses stay unique

    def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        group = groups.setdefault((inputs[0].data_ptr(), inputs[0].numel()), [])
        if all(each is not module.weight_quantizer for each in group):
            group.append(module.weight_quantizer)

    hooks = []
    for module in model.modules():
        format = getattr(getattr(module, "weight_quantizer", None), "format", None)
        if isinstance(format, BlockFormat) and format.scale is not None:
            hooks.append(module.register_forward_pre_hook(note))
    if not hooks:
        return 0
    try:
        model(**example)
    finally:
        for hook in hooks:
            hook.remove()
    changed = 0
    for group in groups.values():
        largest = max(float(each.scale) for each in group)
        for quantizer in group:
            if float(quantizer.scale) != largest:
                quantizer.scale = torch.full_like(quantizer.scale, largest)
                changed += 1
    return changed


@torch.no_grad()
def as_read(model: nn.Module) -> bool:
    """Make a copy of a model compute as compressed-tensors computes what was written: weights of blocks come back in
    bfloat16, and the blocks of inputs are scaled by its rule.

    Args:
        model: A copy; its parameters are replaced, not written to.

    Returns:
        Whether anything in it differs from the simulation.
    """
    found = False
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        layer = float_layer(name, module)
        if layer is None or not isinstance(layer.quantizer.format, BlockFormat):
            continue
        found = True
        module.weight = nn.Parameter(layer.quantizer(module.weight).bfloat16().float(), requires_grad=False)
        module.weight_quantizer = None
        if layer.input is not None:
            layer.input.format = replace(layer.quantizer.format, rule="even")
    return found


def _words(quantizer: Quantizer) -> dict[str, Any]:
    format = quantizer.format
    words: dict[str, Any] = {"num_bits": format.bits, "type": "float", "symmetric": True}
    if isinstance(format, BlockFormat):
        shared = format.scale is not None
        scale = "torch.float8_e4m3fn" if shared else "torch.uint8"
        words |= {"strategy": "tensor_group" if shared else "group", "group_size": format.block, "scale_dtype": scale}
    else:
        words["strategy"] = quantizer.granularity
    inputs = quantizer.name.endswith(".input")
    if inputs and isinstance(format, BlockFormat):
        words["dynamic"] = "local" if format.scale is not None else True
    elif inputs:
        words["dynamic"] = quantizer.dynamic
    return words


def _short(format: Format) -> str:
    return "fp8" if isinstance(format, FloatFormat) else format.name


def _nearest(size: int, format: BlockFormat) -> str:
    if format.bits == 4 and size % 16 == 0:
        return "nvfp4"
    return '{"base": "fp8", "attention": false}'
