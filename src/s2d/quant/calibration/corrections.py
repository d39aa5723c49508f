"""Shared by the methods that correct weights from their inputs: GPTQ, ERQ, and in part AdaRound.

It decides which layers can be corrected; the others are rounded to nearest, with a warning. It holds the sums over the
inputs, the ridge whose damping grows until a system can be factored, and the writing of the final weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2d.errors import InputError
from s2d.quant.calibration.readings import BlockRuns, Group, Layer, ModelRuns, groups

# Factors on the damping, tried in turn while a system cannot be factored.
MORE_DAMPING = (1.0, 10.0, 100.0)
ROWS = 512  # of a sum at a time
TOGETHER = 256  # tokens that are multiplied at once
RIDGE = 0.01

# Says of a layer why it is rounded to nearest, in the method's own words.
Warn = Callable[[Layer, str], None]


@dataclass
class Moments:
    """Sums over the tokens of a layer's inputs, float64; each method defines the summands.

    Attributes:
        name: The layer, for messages.
        count: Tokens so far.
        square: ``x^T x``, ``[d, d]``; None before the first token.
        cross: ``x^T error``, ``[d, e]``; None without errors.
        waiting: Tokens that are in neither sum yet: one product of many costs far less than many of a few.
    """

    name: str
    count: int = 0
    square: Tensor | None = None
    cross: Tensor | None = None
    waiting: list[tuple[Tensor, Tensor | None]] = field(default_factory=list, repr=False)

    def take(self, x: Tensor, error: Tensor | None = None) -> None:
        """Take in some more tokens ``[N, d]``, float32, and what ``x^T error`` is wanted of, ``[N, e]``.

        Raises:
            InputError: As `settle`.
        """
        self.count += len(x)
        self.waiting.append((x, error))
        if sum(len(each) for each, _ in self.waiting) >= TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Add the tokens that wait to the sums, which are whole only after this.

        Raises:
            InputError: A token's input is NaN, infinite, or too large to be squared.
        """
        if self.waiting:
            x, errors = (_joined(each) for each in zip(*self.waiting, strict=True))
            assert x is not None
            self.waiting = []
            # No product of two columns exceeds the product of their lengths.
            lengths = [each.square().sum(0) for each in (x, errors) if each is not None]
            if not all(bool(torch.isfinite(each).all()) for each in lengths):
                raise InputError(
                    f"{self.name} received NaN or infinite values; check the weights and the calibration data"
                )
            self.square = self._add(self.square, x, x)
            if errors is not None:
                self.cross = self._add(self.cross, x, errors)

    def _add(self, total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        """Products in float32, sums in float64, some rows at a time: a matrix of inputs by inputs can be large."""
        if total is None:  # on CPU where the device has no float64
            device = "cpu" if x.device.type == "mps" else x.device
            total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=device)
        for start in range(0, x.shape[1], ROWS):
            product = x[:, start : start + ROWS].t() @ y
            total[start : start + ROWS] += product.to(total)
        return total


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Tokens of several calls, one below the other."""
    there = [each for each in parts if each is not None]
    return there[0] if len(there) == 1 else torch.cat(there) if there else None


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
