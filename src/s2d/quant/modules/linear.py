"""Quantized modules: a module's class is swapped for a quantizing subclass, and swapped back.

The module object, its parameters, hooks, names and state-dict keys do not change; the quantizers' buffers are added
below it. `isinstance` checks hold, and so do checks of the class name. Copies and pickles work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer


class Quantized:
    """Mixed into the class of a module that holds quantizers."""

    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the plain class and the mixin instead.
        mixin = type(self).__bases__[0]
        return _rebuild, (mixin, self.plain_class), self.__dict__


class QuantizedLayer(Quantized):
    """A layer with a weight that quantizes its weight, its input, or both."""

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: WeightQuantizer | None
    input_quantizer: Quantizer | None

    def quantized(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the weight as their quantizers hold them."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        return input, self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)


class QuantizedLinear(QuantizedLayer):
    """A Linear that quantizes its weight, its input, or both."""

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., in]`` to ``[..., out]``, as the plain Linear."""
        return self.quantized_product(self.transform_input(input))

    def transform_input(self, input: Tensor) -> Tensor:
        """What the input's quantizer sees, ``[..., in]``: the input, unless a method transforms it first."""
        return input

    def quantized_product(self, input: Tensor) -> Tensor:
        """The product of the quantized weight with the quantized (transformed) input, and the bias."""
        return F.linear(*self.quantized(input), self.bias)


class QuantizedConv(QuantizedLayer):
    """A convolution that quantizes its weight, its input, or both."""

    def forward(self, input: Tensor) -> Tensor:
        """``input [B, in, ...]`` to ``[B, out, ...]``, as the plain convolution."""
        return self._conv_forward(*self.quantized(input), self.bias)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _quantized_class(mixin: type[Quantized], plain: type[nn.Module]) -> type[nn.Module]:
    # The plain class's names are kept: model families and output recorders look them up.
    body = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (mixin, plain), {**body, "plain_class": plain})


def _rebuild(mixin: type[Quantized], plain: type[nn.Module]) -> nn.Module:
    return object.__new__(_quantized_class(mixin, plain))


def swap_in(module: nn.Module, mixin: type[Quantized], children: dict[str, nn.Module | None], name: str) -> None:
    """Make ``module`` a quantized one, in place, with the given quantizers as children.

    Raises:
        InputError: Something else has already replaced the module's forward.
    """
    if "forward" in module.__dict__:
        raise InputError(f"{name}: another library has replaced this module's forward; quantize the model before that")
    module.__class__ = _quantized_class(mixin, type(module))
    for child, quantizer in children.items():
        module.register_module(child, quantizer)


def swap_out(module: nn.Module, children: tuple[str, ...]) -> None:
    """Undo `swap_in`: the plain class again, without the quantizers."""
    assert isinstance(module, Quantized)
    object.__setattr__(module, "__class__", module.plain_class)
    for child in children:
        delattr(module, child)


def turn_into(module: nn.Module, mixin: type[Quantized]) -> None:
    """Change the mixin of a quantized module; its children stay."""
    assert isinstance(module, Quantized)
    object.__setattr__(module, "__class__", _quantized_class(mixin, module.plain_class))
