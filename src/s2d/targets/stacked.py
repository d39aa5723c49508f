"""Stacks of matrices in one parameter (the experts of a layer) as targets: all of them, or one.

Which parameters are stacks, and how their matrices lie, is read from the graph (`s2d.models.stack_products`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from s2d.distributed.sharding import Block
from s2d.targets.weights import Target


@dataclass(frozen=True, eq=False)
class StackTarget(Target):
    """The matrices of a stack one below the other, ``[E * out, in]``, or the one of an expert, ``[out, in]``.

    Attributes:
        summed: The dimension of the inputs in the parameter: 2, or 1 where it is ``[E, in, out]``.
        expert: Which matrix; None for all.
        bias_name: Name of the parameter ``[E, out]`` that is added to the products; empty if there is none.
    """

    summed: int = 2
    expert: int | None = None
    bias_name: str = ""

    def view(self, tensor: Tensor) -> Tensor:
        """``[out, in]``, or ``[E * out, in]``; a view but for all of an ``[E, in, out]``."""
        tensor = tensor if self.summed == 2 else tensor.transpose(1, 2)
        return tensor.flatten(0, 1) if self.expert is None else tensor[self.expert]

    def block(self, tensor: Tensor | None = None) -> Block:
        """The matrix, or that of a tensor shaped like the parameter."""
        return Block.of(self.matrix() if tensor is None else self.view(tensor.detach()))

    def edit(self, change: Callable[[Block], None]) -> None:
        """Let `change` write to the matrix."""
        block = self.block()
        change(block)
        if self.summed == 1 and self.expert is None:  # of a copy
            stack = self.parameter.detach()
            count, inputs, outputs = stack.shape
            stack.copy_(block.local.view(count, outputs, inputs).transpose(1, 2))

    def experts(self) -> list[StackTarget]:
        """A target for each matrix."""
        return [replace(self, name=f"{self.name}[{e}]", expert=e) for e in range(len(self.parameter))]
