"""AWQ: input channels that are large on average get larger weights, so that rounding hurts those weights less.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024, arXiv
2306.00978, section 3.2; the scale with both statistics ("duo scaling") as in the authors' and llm-compressor's code:

    s = x^r / (w^(1-r) + 1e-4),   s / sqrt(max s * min s),        x_j / s_j,  W_:j * s_j

with x_j the mean magnitude of channel j, w_j the mean over rows of |W_oj| / max_j |W_oj|, and r out of 0, 1/20, ..., 1
(or no scale) where the output of the block is closest to that of the full-precision block, the weights that read the
input rounded to nearest.
The scale moves as in `smoothquant`. Meant for weights; before a rounding of activations it works as a smoother.

Shapes: I inputs of a layer, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from s2d.models.blocks import blocks_of
from s2d.models.running import real_tokens
from s2d.quant.calibration.observe import Job, least_error
from s2d.quant.calibration.transforms import ChannelStatistics, channel_statistics, rounded_weight
from s2d.quant.calibration.unchanged import function_kept
from s2d.quant.calibration.walk import Block, walk
from s2d.quant.modules.folding import matrix
from s2d.quant.modules.sites import Site
from s2d.quant.ptq import register
from s2d.quant.ptq.smoothquant import Pair, apply, input_statistics, pairs, shared_scale

STEPS = 20
# As many batches as hold this many tokens judge a scale; a batch is never taken apart.
SEARCH_TOKENS = 512
SMALLEST = 1e-4


def awq_scale(mean: Tensor, weights: Sequence[Tensor], ratio: float) -> Tensor:
    """The scale of one ratio r, centred on 1 (in the logarithm, between its ends).

    Args:
        mean: Mean magnitude of every input channel, ``[I]``.
        weights: The weights ``[O, I]`` that read the input.
        ratio: r, 0 to 1.

    Returns:
        s ``[I]``, float64, > 0.
    """
    stacked = torch.cat([weight.detach().double().abs() for weight in weights])
    relative = (stacked / stacked.amax(1, keepdim=True).clamp(min=SMALLEST)).mean(0)
    scale = (mean.double() ** ratio / (relative ** (1.0 - ratio) + SMALLEST)).clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


@register("awq", "weights of large input channels scaled up before rounding (searched per block)", stage="transform")
def awq(job: Job) -> None:
    """Search and apply a scale for every pair of the model; reads the data twice, a generator is not enough.

    Own protocol: ranges of least squared error (the paper searches a clipping threshold for weights and keeps
    activations at full precision).
    """
    least_error(job)
    chosen = [pair for pair in pairs(job) if _weights_of(job, pair)]
    within = tuple(f"{name}." for name in blocks_of(job.model, job.graph))
    chosen = [pair for pair in chosen if all(reader.startswith(within) for reader in pair.readers)]
    with function_kept(job, "awq"):
        statistics = channel_statistics(job, [pair.readers[0] for pair in chosen])
        for block in walk(job):
            mine = [pair for pair in chosen if pair.readers[0].startswith(f"{block.name}.")]
            if not mine:
                continue
            judge = few_calls(block)
            wanted = judge.run(judge.inputs)
            for pair in mine:
                scale = best_scale(job, judge, pair, input_statistics(pair, statistics), wanted)
                if scale is not None:
                    apply(job.model, pair, scale)


def few_calls(block: Block) -> Block:
    """The same block with the first of its calls, as many as it takes to see `SEARCH_TOKENS` tokens."""
    tokens = count = 0
    for call in block.inputs:
        hidden = next(value for value in call.slots().values() if isinstance(value, Tensor))
        mask = block.mask_of(count)
        tokens, count = tokens + (hidden[..., 0].numel() if mask is None else int(mask.sum())), count + 1
        if tokens >= SEARCH_TOKENS:
            break
    return replace(block, inputs=block.inputs[:count], masks=block.masks[:count], reference=None, outputs=None)


def best_scale(
    job: Job, block: Block, pair: Pair, statistics: ChannelStatistics, wanted: Sequence[Tensor]
) -> Tensor | None:
    """The scale ``[I]`` whose rounded weights give the block the output closest to ``wanted``; None for no scale.

    The block is as it was when this returns. Inputs stay unscaled during the search: readers hold
    ``round(W s) / s`` instead, which computes the same.
    """
    weights = {reader: matrix(job.model, reader)[0] for reader in pair.readers}
    kept = {reader: weight.detach().clone() for reader, weight in weights.items()}
    quantized = _weights_of(job, pair)
    candidates: list[Tensor | None] = [None]
    for step in range(STEPS + 1):
        candidates.append(shared_scale(pair, awq_scale(statistics.mean, list(kept.values()), step / STEPS)))
    errors = []
    try:
        for candidate in candidates:
            scale = torch.ones_like(statistics.total) if candidate is None else candidate
            for reader, weight in weights.items():
                site = quantized.get(reader)
                quantizer = None if site is None else job.quantizers[site]
                scaled = (kept[reader].double() * scale).to(weight.dtype)
                if site is not None:
                    scaled = rounded_weight(job.observed(site), quantizer, scaled)
                with torch.no_grad():
                    weight.copy_(scaled.double() / scale)
            apart = (y - z for y, z in zip(block.stream(block.inputs), wanted, strict=True))
            real = (real_tokens(x, block.mask_of(index), "input") for index, x in enumerate(apart))
            errors.append(sum(float(x.double().square().sum()) for x in real))
    finally:
        with torch.no_grad():
            for reader, weight in weights.items():
                weight.copy_(kept[reader])
    return candidates[min(range(len(candidates)), key=errors.__getitem__)]


def _weights_of(job: Job, pair: Pair) -> dict[str, Site]:
    """The sites of the quantized weights of a pair's readers, by reader."""
    return {site.module: site for site in job.quantizers if site.what == "weight" and site.module in pair.readers}
