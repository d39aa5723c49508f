"""Plain layers: Linears with integer weights and, in some formats, rounded inputs; nothing else.

Checkpoint formats (compressed-tensors, GGUF, ExecuTorch's recipes) describe layers, not graphs: they cannot describe
computation beside a weight, rounded operands of attention or rounded convolutions. These are refused by name before
anything is written, with the nearest spec that the format can hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from s2d.errors import InputError
from s2d.export.integers import IntegerActivation, IntegerWeight, integer_activation, integer_weight
from s2d.export.runtime import quoted, runtimes
from s2d.quant.modules.attention import QuantizedAttention
from s2d.quant.modules.linear import QuantizedConv, QuantizedLinear
from s2d.quant.modules.online import OnlineBlock, OnlineLinear
from s2d.quant.modules.sites import is_quantized
from s2d.quant.numerics.quantizer import Quantizer


@dataclass(frozen=True)
class PlainLayer:
    """A quantized Linear as integers.

    Attributes:
        name: The module.
        weight: Its codes ``[out, in]`` and scales.
        activation: How its input becomes codes; None where it is not rounded.
        bits: Of the weight.
    """

    name: str
    weight: IntegerWeight
    activation: IntegerActivation | None
    bits: int

    @property
    def run(self) -> int:
        """How many inputs of a row share a scale."""
        inputs, scale = self.weight.codes.shape[1], self.weight.scale
        return inputs // scale.shape[1] if scale.ndim == 2 else inputs


def plain_layers(model: nn.Module, format: str, without: Collection[str] = ()) -> Iterator[PlainLayer]:
    """The quantized Linears of a model, one at a time.

    Args:
        model: Quantized.
        format: The format's name, for messages.
        without: Modules that the format holds in another way.

    Raises:
        InputError: It is not quantized; something in it is more than a Linear of integers.
    """
    refuse_more_than_linears(model, format)
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear) or name in without:
            continue
        quantizer, weight = module.input_quantizer, module.weight_quantizer
        if weight is None:
            raise InputError(
                f"{name} rounds its input but not its weight, which {format} cannot hold; use w8a8 or w4a16"
            )
        activation = None if quantizer is None else integer_activation(quantizer)
        yield PlainLayer(name, integer_weight(module.weight, weight), activation, weight.format.bits)


def refuse_more_than_linears(model: nn.Module, format: str) -> None:
    """Refuse by name all quantized parts that are not Linears of integers.

    Raises:
        InputError: The model is not quantized, or holds such a thing.
    """
    if not is_quantized(model):
        raise InputError(f"{type(model).__name__} is not quantized; run s2d quantize first, then export its folder")
    for name, module in model.named_modules():
        if isinstance(module, (OnlineLinear, OnlineBlock)):
            raise InputError(
                f"{name}: the method computes beside the weight, which {format} cannot hold; "
                "quantize with rtn, gptq, awq or smoothquant"
            )
        if isinstance(module, QuantizedAttention) and (site := _operand(module)):
            raise InputError(
                f"{site}: operands of attention are rounded, which {format} cannot hold; a spec that it can hold is "
                f"{_held(format)}"
            )
        if isinstance(module, QuantizedConv):
            raise InputError(f"{name}: {format} has no rounded convolutions; leave ends out of the spec")


def _held(format: str) -> str:
    known = runtimes().get(format.lower().replace(" ", ""), runtimes()["qnn"])  # the encodings file is for qnn
    return quoted(known.spec)


def _operand(module: Any) -> str | None:
    holder = module.attention_quantizer
    found = (getattr(holder, operand) for operand in holder.OPERANDS)
    return next((each.name for each in found if isinstance(each, Quantizer)), None)
