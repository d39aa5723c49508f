"""LoRA: the effective weight is the sum W + s B A, which is not stored. Here it is a target like any other.

Factors are recognised as PEFT stores them, on the layer that replaces the adapted Linear. Components are those of the
sum. A change of the sum is applied to the frozen W. This is exact for every component: with the adapters' part D,
(W + D) - change = (W - change) + D. The optimizer alone changes the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from s2d.distributed.sharding import Block
from s2d.targets.weights import Target


@dataclass(frozen=True, eq=False)
class AdaptedTarget(Target):
    """A weight under adapters. `module` is the adapters' layer: its input and output are those of the sum."""

    @property
    def owner(self) -> nn.Module:
        """The Linear below the adapters."""
        return self.module.base_layer  # pyright: ignore[reportReturnType]

    def matrix(self) -> Tensor:
        """W + s B A as a detached `[out, in]` matrix; a new one, so writing to it changes nothing."""
        total = self.parameter.detach()
        for name in active_adapters(self.module):
            total = total + self.module.get_delta_weight(name).detach().to(total)  # type: ignore[operator]
        return self.view(total)

    def block(self, tensor: Tensor | None = None) -> Block:
        """The view of the sum, or of a tensor shaped like W."""
        return Block.of(self.matrix()) if tensor is None else super().block(tensor)

    def edit(self, change: Callable[[Block], None]) -> None:
        """Let `change` write to the sum, and apply the same change to W."""
        merged = self.matrix()
        wanted = merged.clone()
        change(Block.of(wanted))
        self.view(self.parameter.detach()).add_(wanted - merged)


def active_adapters(layer: Any) -> list[str]:
    """The adapters that a layer adds to its frozen weight now. Merged adapters are already part of the weight."""
    if layer.merged or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def with_adapters(model: nn.Module, targets: Iterable[Target]) -> list[Target]:
    """The targets; a weight below LoRA adapters becomes a target for the sum."""
    layers = {id(m.base_layer): m for m in model.modules() if "lora_A" in m._modules and "base_layer" in m._modules}
    return [_adapted(target, layers.get(id(target.module))) for target in targets]


def _adapted(target: Target, layer: nn.Module | None) -> Target:
    if layer is None or target.kind != "linear":
        return target
    same = {field.name: getattr(target, field.name) for field in fields(Target)}
    return AdaptedTarget(**{**same, "module": layer})


def why_not_a_sum(target: Target) -> str | None:
    """Why a weight under adapters is not the sum W + s B A, None where it is one."""
    if isinstance(target, AdaptedTarget) and getattr(target.module, "lora_variant", None):
        kind = type(next(iter(target.module.lora_variant.values()))).__name__  # type: ignore[operator, union-attr]
        return f"its adapter is no plain sum ({kind}); merge it to condition"
    return None
