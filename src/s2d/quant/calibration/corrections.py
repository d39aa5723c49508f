"""Shared by the methods that correct weights from their inputs: GPTQ, ERQ, and in part AdaRound.

Which layers can be corrected at all, what happens to the others (rounded to nearest, and said), how the final weight is
written, and damping that grows until a system can be factored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from s2d.quant.calibration.readings import BlockRuns, Group, Layer, ModelRuns, groups

# A system that cannot be factored gets more damping, this many times as much in turn.
MORE_DAMPING = (1.0, 10.0, 100.0)

# Says of a layer why it is rounded to nearest, in the method's own words.
Warn = Callable[[Layer, str], None]


def dampings(diagonal: Tensor, share: float) -> Iterator[Tensor]:
    """A matrix's diagonal with ``share`` of its mean added, then with more and more.

    Args:
        diagonal: ``[n]``.
        share: Relative to the mean.
    """
    mean = diagonal.mean().clamp(min=torch.finfo(diagonal.dtype).tiny)
    for times in MORE_DAMPING:
        yield diagonal + times * share * mean


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
