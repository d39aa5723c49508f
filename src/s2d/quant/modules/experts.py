"""Stacks of matrices in one parameter, mostly the weights of a layer's experts, quantized by one mechanism.

While a module with such parameters runs, it finds them rounded, and the mode of `s2d.models.stack_products` puts a
quantizer on what they are multiplied with. A quantized stack that meets an activation in any operation that is no
product is an error that names the module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from s2d.models.stack_products import StackMode
from s2d.quant.modules.linear import Quantized, swap_in, swap_out
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.numerics.stacks import StackQuantizer


class StackQuantizers(nn.Module):
    """The quantizer of one stack, and that of what is multiplied with it; None leaves it alone."""

    weight: StackQuantizer | None
    input: Quantizer | None

    def __init__(self, weight: Quantizer | None, input: Quantizer | None) -> None:
        """Hold both."""
        super().__init__()
        self.register_module("weight", weight)
        self.register_module("input", input)
        # Of the operand that is shown to the input's `watch`: which rows of the module's input its vectors are, and how
        # many that has.
        self.rows_seen: tuple[Tensor | None, int] = (None, 0)


class QuantizedExperts(Quantized):
    """A module whose stacks are quantized; each stack ``NAME`` has its quantizers in ``NAME_quantizer``."""

    _stacks: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's forward, under the mode that quantizes its products."""
        with _Rounding(self, (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def quantizers_of_stack(module: Any, name: str) -> StackQuantizers:
    """The quantizers of the stack that a module holds under this name."""
    return getattr(module, f"{name}_quantizer")


def swap_in_stacks(module: nn.Module, holders: dict[str, StackQuantizers], path: str) -> None:
    """Make a module quantize its stacks, in place.

    Raises:
        InputError: Something else has already replaced the module's forward.
    """
    swap_in(module, QuantizedExperts, {f"{name}_quantizer": holder for name, holder in holders.items()}, path)
    module.__dict__["_stacks"] = tuple(holders)


def swap_out_stacks(module: nn.Module) -> None:
    """Undo `swap_in_stacks`."""
    swap_out(module, tuple(f"{name}_quantizer" for name in module.__dict__.pop("_stacks")))


class _Rounding(StackMode):
    """Quantizes the products with the stacks of one module, for one run of it."""

    def __init__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        self.held = {name: quantizers_of_stack(module, name) for name in module._stacks}
        watched = any(held.input is not None and held.input.watch is not None for held in self.held.values())
        super().__init__(module, arguments, rows=watched)

    def stacks(self) -> Mapping[str, Tensor]:
        plain = self.module._parameters
        return {
            name: plain[name] if held.weight is None else held.weight(plain[name])  # pyright: ignore[reportReturnType]
            for name, held in self.held.items()
        }

    def operand(self, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        held = self.held[name]
        if held.input is None:
            return x
        held.rows_seen = rows, self.count
        x = held.input(x)
        held.rows_seen = None, 0
        return x
