"""The quantizer of a stack of matrices in one parameter, such as the weights of all experts of a layer.

A matrix has its own ranges: one for each of its outputs, for each group of inputs, or for the whole matrix. A stack is
``[E, out, in]``, or ``[E, in, out]`` where the product sums over dimension 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from s2d.quant.numerics.formats import Format
from s2d.quant.numerics.quantizer import Granularity, Quantizer, WeightQuantizer, fake_quantize


class StackQuantizer(WeightQuantizer):
    """A `WeightQuantizer` for a stack; its ranges are those of the rows that `rows` gives."""

    def __init__(
        self, format: Format, granularity: Granularity, *, name: str, shape: tuple[int, ...], summed: int, group: int
    ) -> None:
        """Make a quantizer that is still off.

        Args:
            format: The number format.
            granularity: Whose range it is, within a matrix.
            name: The site's name, for messages.
            shape: The stack's, three numbers.
            summed: The dimension that the product sums over, 1 or 2.
            group: How many inputs share a range, when the granularity is groups.
        """
        count, inputs = shape[0] * shape[3 - summed], shape[summed]
        groups = inputs // group if group else 0
        super().__init__(format, granularity, name=name, channels=count, groups=groups)
        self.summed = summed
        if granularity == "tensor":
            self.resize((shape[0],))

    def rows(self, stack: Tensor) -> Tensor:
        """A stack as a matrix: a row for each output, ``[E * out, in]``, or for each matrix, ``[E, out * in]``."""
        stack = stack if self.summed == 2 else stack.transpose(1, 2)
        return stack.flatten(1) if self.granularity == "tensor" else stack.flatten(0, 1)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x [E, ...]`` as its codes hold it, whether or not the quantizer is enabled."""
        rows = self.rows(x)
        return from_rows(fake_quantize(rows, *self.parameters_for(rows), self.format), x.shape, self.summed)


def rows_of(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """A weight as the rows that its quantizer has ranges for: itself, unless it is a stack."""
    return quantizer.rows(weight) if isinstance(quantizer, StackQuantizer) else weight


def from_rows(rows: Tensor, shape: Sequence[int], summed: int) -> Tensor:
    """The stack of this shape, whose product sums over dimension ``summed``, that `StackQuantizer.rows` took apart."""
    if summed == 2:
        return rows.reshape(*shape)
    return rows.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
