"""Shared by the methods that correct weights from their inputs: GPTQ, ERQ, and in part AdaRound.

It decides which layers can be corrected; the others are rounded to nearest, with a warning. It holds the sums over the
inputs, the ridge whose damping grows until a system can be factored, and the writing of the final weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.errors import InputError
from s2d.quant.calibration.readings import BlockRuns, Group, Layer, ModelRuns, groups

# Factors on the damping, tried in turn while a system cannot be factored.
MORE_DAMPING = (1.0, 10.0, 100.0)
ROWS = 512  # of a sum at a time
RIDGE = 0.01

# Says of a layer why it is rounded to nearest, in the method's own words.
Warn = Callable[[Layer, str], None]


@dataclass
class Moments:
    """Sums over the tokens of a layer's inputs, float64; each method defines the summands.

    Attributes:
        name: The layer, for messages.
        count: Tokens so far.
        square: Products of the inputs with themselves; None before the first token.
        cross: Products of the inputs with their reference values; None without a reference.
    """

    name: str
    count: int = 0
    square: Tensor | None = None
    cross: Tensor | None = None

    def take(self, x: Tensor, cross: tuple[Tensor, Tensor] | None) -> None:
        """Add ``x^T x`` over some more tokens ``[N, d]``, and the product of the pair to ``cross``.

        Raises:
            InputError: The sums hold NaN or infinity, so some token's input does.
        """
        self.count += len(x)
        self.square = self._add(self.square, x, x)
        if cross is not None:
            self.cross = self._add(self.cross, *cross)

    def _add(self, total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        """Products in float32, sums in float64, some rows at a time: a matrix of inputs by inputs can be large."""
        if total is None:  # on CPU where the device has no float64
            device = "cpu" if x.device.type == "mps" else x.device
            total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=device)
        for start in range(0, x.shape[1], ROWS):
            product = x[:, start : start + ROWS].t() @ y
            if not bool(torch.isfinite(product).all()):
                raise InputError(
                    f"{self.name} received NaN or infinite values; check the weights and the calibration data"
                )
            total[start : start + ROWS] += product.to(total)
        return total


def dampings(diagonal: Tensor, share: float) -> Iterator[Tensor]:
    """A matrix's diagonal with ``share`` of its mean added, then with more and more.

    Args:
        diagonal: ``[n]``.
        share: Relative to the mean.
    """
    mean = diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
    for times in MORE_DAMPING:
        yield diagonal + times * share * mean


def ridge_solve(square: Tensor, right: Tensor, ridge: float = RIDGE) -> Tensor | None:
    """``(square + ridge * mean(diag) * I)^-1 right``, with more damping if that fails; None when all fails.

    Args:
        square: ``[n, n]`` float64, symmetric, positive semi-definite.
        right: ``[n, o]`` float64.
        ridge: lambda / N, relative to the mean of the diagonal.
    """
    for diagonal in dampings(square.diagonal(), ridge):
        lower = square.t().clone(memory_format=torch.contiguous_format).t()
        lower.diagonal().copy_(diagonal)
        info = lower.new_empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(lower, out=(lower, info))  # stored by columns, it is done in place
        if int(info) == 0:
            solution = torch.linalg.solve_triangular(lower, right, upper=False)
            solution = torch.linalg.solve_triangular(lower.t(), solution, upper=True, out=solution)
            if bool(torch.isfinite(solution).all()):
                return solution
    return None


def correctable(layers: list[Layer], runs: BlockRuns | ModelRuns, warn: Warn) -> list[Group]:
    """The layers that can be corrected, in groups; the others are rounded to nearest, and a warning says so.

    Args:
        layers: With the ranges of their weights set.
        runs: How to run them.
        warn: See `Warn`.
    """
    able = [layer for layer in layers if layer.unfolds and not layer.shared_with]
    found = groups(able, runs)
    reached = {layer for group in found for layer in group.layers}
    for layer in layers:
        if layer.shared_with:
            # Rounded values would change the other's work; the quantizer rounds whenever this layer runs instead.
            warn(layer, f"shares its weight with {layer.shared_with}")
            layer.quantizer.enabled = True
        elif not layer.unfolds:
            to_nearest(layer, f"is a {type(layer.module).__name__} whose patches cannot be unfolded", warn)
        elif layer not in reached:
            to_nearest(layer, "is not reached by the first batch", warn)
    return found


def to_nearest(layer: Layer, reason: str, warn: Warn) -> None:
    """Round a weight as it is, and say why."""
    warn(layer, reason)
    write(layer, layer.weight.detach())


@torch.no_grad()
def write(layer: Layer, values: Tensor) -> None:
    """Put the final weight in place, exactly as its quantizer gives it back."""
    layer.weight.copy_(layer.quantizer.fake_quantize(values.view(layer.weight.shape).to(layer.weight.dtype)))
