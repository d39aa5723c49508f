"""SmoothQuant: large input channels are divided by a scale, the weights' columns are multiplied by it.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
arXiv 2211.10438, equation 4, with alpha = 0.5:

    s_j = max |X_j|^alpha / max |W_:j|^(1 - alpha)        X_j / s_j,  W_:j * s_j

The division is folded, exactly, into what writes X: a pre-norm block's norms (the Linears behind a norm share one s),
the rows of v for the attention's output projection, the ungated half of a gated MLP for its second Linear. An MLP with
a GELU between its Linears cannot take it in and is left alone, as in the paper. Where norms follow the residual sum
(BERT) the norm's output is the residual as well, and nothing can be folded into it; there the division happens where
the input is rounded, which divides by a step anyway: one vector a layer, kept with the layer.

Shapes: I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2d.quant.calibration.observe import Job, least_error
from s2d.quant.calibration.transforms import ChannelStatistics, channel_statistics
from s2d.quant.calibration.unchanged import function_kept
from s2d.quant.modules.folding import (
    NormFold,
    PairFold,
    apply_norm_fold,
    apply_value_fold,
    matrix,
    norm_folds,
    pair_folds,
)
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.modules.online import OnlineLinear, make_online
from s2d.quant.ptq import register

ALPHA = 0.5


@dataclass(frozen=True)
class Pair:
    """Layers that read one input, and the move that scales it.

    Attributes:
        readers: Dotted names of the layers.
        fold: What writes the input; a post-norm `NormFold` cannot take a scale.
    """

    readers: tuple[str, ...]
    fold: NormFold | PairFold


def smoothing_scale(largest: Tensor, weights: Sequence[Tensor], alpha: float = ALPHA) -> Tensor:
    """Equation 4; 1 for channels that are dead in the inputs or in all weights.

    Args:
        largest: ``max |X_j|``, ``[I]``.
        weights: The weights ``[O, I]`` that read the input.
        alpha: How much of the difficulty moves into the weights, 0 to 1.

    Returns:
        s ``[I]``, float64, > 0.
    """
    columns = torch.stack([weight.detach().abs().amax(0) for weight in weights]).amax(0).double()
    largest = largest.double()
    alive = (largest > 0) & (columns > 0)
    ones = torch.ones_like(largest)
    scale = torch.where(alive, largest, ones) ** alpha / torch.where(alive, columns, ones) ** (1.0 - alpha)
    return torch.where(alive, scale.clamp(1e-5, 1e5), ones)


def pairs(job: Job) -> list[Pair]:
    """The pairs of a model that have a quantized reader."""
    quantized = {site.module for site in job.quantizers}
    found = [Pair(fold.readers, fold) for fold in norm_folds(job.model, job.graph)]
    for fold in pair_folds(job.model, job.graph):
        # An input that is rotated on its way is not what the writer wrote.
        if not isinstance(job.model.get_submodule(fold.reader), OnlineLinear):
            found.append(Pair((fold.reader,), fold))
    return [pair for pair in found if any(reader in quantized for reader in pair.readers)]


def input_statistics(pair: Pair, statistics: dict[str, ChannelStatistics]) -> ChannelStatistics:
    """Magnitudes of a pair's input; heads that share a channel of v are taken together (``[I]`` stays)."""
    found = statistics[pair.readers[0]]
    if not isinstance(pair.fold, PairFold):
        return found
    largest = pair.fold.to_value(found.largest, "max")
    total = pair.fold.to_value(found.total, "mean")
    return ChannelStatistics(pair.fold.to_reader(largest), pair.fold.to_reader(total), found.tokens)


def shared_scale(pair: Pair, scale: Tensor) -> Tensor:
    """The scale ``[I]`` made alike (the mean, in the logarithm) where heads read the same channel of v."""
    if not isinstance(pair.fold, PairFold):
        return scale
    return pair.fold.to_reader(pair.fold.to_value(scale.log(), "mean").exp())


def apply(model: nn.Module, pair: Pair, scale: Tensor) -> None:
    """Divide a pair's input by ``scale [I]`` (`shared_scale`) and multiply its readers' columns, in place."""
    fold = pair.fold
    if isinstance(fold, PairFold):
        apply_value_fold(model, fold, fold.to_value(scale, "mean"))
    elif not fold.residual:
        apply_norm_fold(model, fold, scale)
    else:
        for reader in pair.readers:
            module = model.get_submodule(reader)
            if isinstance(module, QuantizedLinear):
                make_online(module).smooth_input(scale)


@register(
    "smoothquant", "large input channels moved into the weights (alpha 0.5), then any rounding", stage="transform"
)
def smoothquant(job: Job) -> None:
    """Scale every pair of the model; reads the data once.

    Own protocol: ranges of least squared error (the paper's are min-max, which are enough at its 8 bits).
    """
    least_error(job)
    chosen = pairs(job)
    with function_kept(job, "smoothquant"):
        statistics = channel_statistics(job, [pair.readers[0] for pair in chosen])
        for pair in chosen:
            weights = [matrix(job.model, reader)[0] for reader in pair.readers]
            scale = smoothing_scale(input_statistics(pair, statistics).largest, weights)
            apply(job.model, pair, shared_scale(pair, scale))
