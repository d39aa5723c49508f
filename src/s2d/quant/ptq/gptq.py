"""GPTQ and GPTAQ: weights rounded column by column, the error of each column compensated by those not yet rounded.

GPTQ: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
arXiv 2210.17323, algorithm 1. GPTAQ: Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
Calibration", ICML 2025, arXiv 2504.02692.

With X the inputs that the layer gets behind quantized layers, its own input quantizer included, and X~ those of the
full-precision model (rows are tokens):

    GPTQ   minimises |X W^T - X Q^T|^2
    GPTAQ  minimises |X~ W^T - X Q^T|^2

    H = 2/N X^T X + damping * mean(diag H) * I        H^-1 = U^T U, U upper triangular
    D = 2/N (X~ - X)^T X                              P = alpha * strictly upper triangle of (D U^T), times U

    for every column i, in order of falling H_ii:  q = round(w_i),  e = (w_i - q) / U_ii,
        W[:, i+1:] -= e U[i, i+1:],  and in GPTAQ  W[:, i+1:] += w_i P[i, i+1:]

Ranges are set before the loop, per row or per group, from the weights as they were. Where this file differs from the
papers: U comes from one Cholesky factorisation of H with its columns reversed and one triangular inverse, in float64,
in the memory of H and once for all layers that read an input; inputs that are always zero are rounded to nearest, not
set to zero; the later columns of GPTAQ see w_i as it was when it was rounded, whether they are in the same lazy block
or not.

Shapes: o outputs, d inputs, N tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2d.distributed.sharding import Groups, all_reduce
from s2d.models.running import evaluating
from s2d.quant.calibration import corrections
from s2d.quant.calibration.corrections import correctable, dampings, to_nearest, write
from s2d.quant.calibration.observe import Job, least_error, observe, set_weight_range
from s2d.quant.calibration.readings import BlockRuns, Group, Layer, ModelRuns, layers_of, readings
from s2d.quant.calibration.walk import observe_block, observe_outside, original, outside, walk
from s2d.quant.numerics.formats import BlockFormat, Format
from s2d.quant.numerics.quantizer import Quantizer, block_scales, fake_quantize, switched_on, to_blocks
from s2d.quant.ptq import register

LAZY_BLOCK = 128
COLUMNS = 256  # of U at a time
DAMPING = 0.01  # section 3.3, step 3
GPTAQ_DAMPING = 0.10  # the released code for vision transformers
# The released code for vision transformers. The derivation has 1, which is better on one layer alone; through MiniLM's
# six blocks 0.25 is (W4A8, distance of embeddings from full precision: alpha 1 0.236, alpha 0.25 0.216; one draw).
GPTAQ_ALPHA = 0.25


@dataclass(frozen=True)
class Grid:
    """What every entry of a weight can be rounded to.

    Attributes:
        scale: ``[o, d]`` (expanded, where it is the same for many).
        zero_point: ``[o, d]``.
        format: Of the elements.
        anchors: ``[o, d]``, True where an entry gives its block the scale and so has to stay the block's largest; None
            where scales are fixed.
    """

    scale: Tensor
    zero_point: Tensor
    format: Format
    anchors: Tensor | None = None

    @staticmethod
    def of(quantizer: Quantizer, weight: Tensor) -> Grid:
        """The grid of a quantizer that has its range, for a weight ``[o, d]``."""
        scale, zero_point = quantizer.parameters_for(weight)
        format = quantizer.format
        if not isinstance(format, BlockFormat):
            return Grid(scale.expand(weight.shape), zero_point.expand(weight.shape), format)
        blocks = to_blocks(weight, format)
        shared = block_scales(blocks, scale, format)
        width = weight.shape[1]
        full = (shared * scale).expand(blocks.shape).flatten(-2)[:, :width]
        anchors = None
        if format.scale is not None:
            # The scale of a block is read off its largest entry. Where that entry stays the largest code, the scale of
            # the rounded block is the one it was rounded with. Blocks at the smallest scale keep it in any case.
            largest = blocks.abs() == blocks.abs().amax(-1, keepdim=True)
            first = largest & (largest.cumsum(-1) == 1)
            anchors = (first & (shared > 2.0**format.scale.smallest_exponent)).flatten(-2)[:, :width]
        return Grid(full, torch.zeros_like(full, dtype=torch.int32), format.element, anchors)

    def select(self, *, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> Grid:
        """The grid of some rows and columns of the weight."""
        anchors = None if self.anchors is None else self.anchors[rows][:, columns]
        return Grid(self.scale[rows][:, columns], self.zero_point[rows][:, columns], self.format, anchors)


def upper_factor(hessian: Tensor) -> Tensor | None:
    """The upper triangular U with ``H^-1 = U^T U``, or None when H is not positive definite to working precision.

    With J the reversal of the order, ``J H J = L L^T``; then ``R = J L J`` is upper triangular, ``H = R R^T`` and
    ``U = R^-1``, whose last columns need none of those before them.

    Args:
        hessian: ``[d, d]`` symmetric; float64 is advised. Stored by columns, its memory becomes that of U; a d of
            some thousand inputs leaves no room for a second matrix.
    """
    factor = hessian if hessian.t().is_contiguous() else hessian.t().contiguous().t()
    _reverse(factor)
    info = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info) != 0:
        return None
    _reverse(factor)
    for start in reversed(range(0, len(factor), COLUMNS)):
        stop = min(start + COLUMNS, len(factor))
        unit = factor.new_zeros(stop, stop - start)
        unit[start:].fill_diagonal_(1.0)
        columns = torch.linalg.solve_triangular(factor[:stop, :stop], unit, upper=True)
        if not bool(torch.isfinite(columns).all()):
            return None
        factor[:stop, start:stop] = columns
    return factor


def _reverse(matrix: Tensor) -> None:
    """Turn the order of rows and columns round in place: that of all entries in memory."""
    entries, step = matrix.t().view(-1), 1 << 20
    for start in range(0, len(entries) // 2, step):
        stop = min(start + step, len(entries) // 2)
        first, last = entries[start:stop], entries[len(entries) - stop : len(entries) - start]
        turned = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(turned)


def damped_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """`upper_factor` of ``H + damping * mean(diag H) * I``, with more damping when that fails; None when all fails.

    Args:
        hessian: ``[d, d]``; an input that is always zero counts as 1.
        order: ``[d]``, the order in which columns are rounded; that of the factor.
        damping: See above.
    """
    diagonal = hessian.diagonal()[order]
    for damped in dampings(diagonal.where(diagonal != 0, 1.0), damping):
        ordered = hessian.t()[order[:, None], order].t()
        ordered.diagonal().copy_(damped)
        factor = upper_factor(ordered)
        if factor is not None:
            return factor
    return None


@dataclass(frozen=True)
class Compensation:
    """What the rounding of a column does to those after it: the same for all weights that read an input.

    Attributes:
        order: ``[d]``, the order in which columns are rounded.
        factor: U, ``[d, d]`` float32, upper triangular.
        drift: P of GPTAQ, ``[d, d]`` float32, strictly upper triangular; None for GPTQ.
    """

    order: Tensor
    factor: Tensor
    drift: Tensor | None = None


def compensation(
    hessian: Tensor,
    *,
    damping: float = DAMPING,
    act_order: bool = True,
    cross: Tensor | None = None,
    alpha: float = GPTAQ_ALPHA,
) -> Compensation | None:
    """What the inputs behind a Hessian ask for; None when it cannot be factored even with more damping.

    Args:
        hessian: ``2/N X^T X``, ``[d, d]`` float64, undamped.
        damping: Share of the mean diagonal that is added to the diagonal.
        act_order: Round the columns with the largest inputs first.
        cross: GPTAQ's D, ``2/N (X~ - X)^T X``, ``[d, d]``; None for GPTQ.
        alpha: How much of the drift GPTAQ corrects.
    """
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        sizes = hessian.diagonal()
        order = sizes.where(sizes != 0, -1.0).argsort(descending=True, stable=True)
    factor = damped_factor(hessian, order, damping)
    del hessian  # the factor is as large
    if factor is None:
        return None
    return Compensation(order, factor.float(), None if cross is None else _drift(cross, factor, order, alpha))


def _drift(cross: Tensor, factor: Tensor, order: Tensor, alpha: float) -> Tensor:
    """GPTAQ's P, some rows at a time."""
    drift = torch.empty(factor.shape, dtype=torch.float32, device=factor.device)
    for start in range(0, len(order), COLUMNS):
        here = order[start : start + COLUMNS]
        later = (alpha * (cross[here][:, order] @ factor.t())).triu(1 + start)
        drift[start : start + COLUMNS] = later @ factor
    return drift


def round_columns(weight: Tensor, grid: Grid, factor: Tensor, drift: Tensor | None = None) -> Tensor:
    """The loop of GPTQ, over the columns in the order they have.

    Args:
        weight: ``[o, d]`` float32.
        grid: What its entries can be.
        factor: U, ``[d, d]`` upper triangular.
        drift: P of GPTAQ, ``[d, d]`` strictly upper triangular; None for GPTQ.

    Returns:
        The rounded weight, ``[o, d]`` float32, on the grid.
    """
    # Columns as rows: what the inner loop touches is then contiguous.
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # [d, o]
    rounded = torch.empty_like(columns)
    scale, zero_point = grid.scale.t().contiguous(), grid.zero_point.t().contiguous()
    anchors = None if grid.anchors is None else grid.anchors.t().contiguous()
    signs = columns.sign()
    size = len(columns)
    for start in range(0, size, LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, size)
        here = columns[start:stop]
        errors, before = torch.empty_like(here), torch.empty_like(here)
        inner = factor[start:stop, start:stop]
        drifting = None if drift is None else drift[start:stop, start:stop]
        for i in range(stop - start):
            column, w = start + i, here[i]
            q = fake_quantize(w, scale[column], zero_point[column], grid.format)
            if anchors is not None:
                q = torch.where(anchors[column], signs[column] * grid.format.qmax * scale[column], q)
            rounded[column] = q
            error = (w - q) / inner[i, i]
            errors[i], before[i] = error, w
            if i + 1 < stop - start:
                here[i + 1 :].addr_(inner[i, i + 1 :], error, alpha=-1.0)
                if drifting is not None:
                    here[i + 1 :].addr_(drifting[i, i + 1 :], before[i])
        if stop < size:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
            if drift is not None:
                columns[stop:].addmm_(drift[start:stop, stop:].t(), before)
    return rounded.t().contiguous()


def gptq_round(weight: Tensor, inputs: Compensation, grid: Grid) -> Tensor:
    """Round a weight for the inputs that it reads.

    Args:
        weight: ``[o, d]``.
        inputs: What they ask for.
        grid: What the entries can be.

    Returns:
        ``[o, d]`` float32, on the grid.
    """
    order, factor = inputs.order.to(weight.device), inputs.factor.to(weight.device)
    drift = None if inputs.drift is None else inputs.drift.to(weight.device)
    rounded = round_columns(weight.float()[:, order], grid.select(columns=order), factor, drift)
    back = torch.empty_like(rounded)
    back[:, order] = rounded
    return back


class Moments(corrections.Moments):
    """``X^T X`` as ``square`` and, where there is a reference, ``X^T (X~ - X)`` as ``cross``, ``[d, d]`` both."""

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Take in the inputs of some tokens, ``[N, d]``, and the same tokens' inputs in the full-precision model.

        Raises:
            InputError: NaN or infinity in them.
        """
        x = x.float()
        self.take(x, None if reference is None else reference.float() - x)

    def add_up(self, groups: Groups) -> None:
        """Add the sums of other ranks, which saw other tokens of the same layer."""
        if not groups:
            return
        self.settle()
        assert self.square is not None
        self.count = int(all_reduce(torch.tensor(self.count, device=self.square.device), groups))
        all_reduce(self.square, groups)
        if self.cross is not None:
            all_reduce(self.cross, groups)

    def compensation(self, **options: Any) -> Compensation | None:
        """`compensation` of the inputs; the sums are given up for it."""
        self.settle()
        square, cross = self.square, self.cross
        assert square is not None
        self.square = self.cross = None
        square.mul_(2.0 / self.count)
        return compensation(square, cross=None if cross is None else cross.t().mul_(2.0 / self.count), **options)


@register(
    "gptq", "GPTQ: columns rounded one by one, each one's error compensated by those that follow", passes=5, shares=True
)
def gptq(job: Job) -> None:
    """GPTQ on every quantized weight, block by block, on inputs behind quantized blocks.

    Own protocol: ranges of least squared error. The paper leaves inputs whole; where they are rounded to one static
    range, min-max costs more than any rounding of weights can make up for.
    """
    _go(job, reference=False, damping=DAMPING)


@register(
    "gptaq",
    "GPTAQ: GPTQ that also corrects what quantized layers before have changed in the inputs",
    passes=8,
    shares=True,
)
def gptaq(job: Job) -> None:
    """GPTAQ in the blocks; weights outside, which have no second stream to compare with, get GPTQ.

    Own protocol: ranges as in `gptq` (the paper's are each token's own, clipped).
    """
    _go(job, reference=True, damping=GPTAQ_DAMPING)


def _go(job: Job, *, reference: bool, damping: float) -> None:
    if job.protocol == "unified":
        observe(job)
    else:
        least_error(job)
        observe_outside(job)
    for block in walk(job, reference=reference):
        if job.protocol == "own":
            observe_block(job, block)
        for site, quantizer in block.quantizers.items():
            quantizer.enabled = site.what != "weight"
        _round_layers(
            job, layers_of(job, block.quantizers), BlockRuns(block, original(block) if reference else None), damping
        )
    rest = layers_of(job, outside(job))
    if rest:
        with switched_on(job.quantizers.values()), evaluating(job.model):
            for layer in rest:
                layer.quantizer.enabled = False
            _round_layers(job, rest, ModelRuns(job), damping)


def _round_layers(job: Job, layers: list[Layer], runs: BlockRuns | ModelRuns, damping: float) -> None:
    """Round the weights of some layers in the order in which they run, each on what the ones before now give."""
    for layer in layers:
        set_weight_range(job.observed(layer.site), layer.quantizer, layer.weight.detach())
    for group in correctable(layers, runs, _warn):
        moments = _moments(group, runs)
        for moment in moments:
            moment.add_up(job.ranks)
        inputs = [moment.compensation(damping=damping) for moment in moments]
        for layer in group.layers:
            _round_layer(layer, inputs)


def _moments(group: Group, runs: BlockRuns | ModelRuns) -> list[Moments]:
    """The moments of a group's input, one for each part of the rows."""
    moments = [Moments(group.layers[0].site.name) for _ in range(group.parts)]
    for part, x, reference in readings(group, runs):
        moments[part].add(x, reference)
    return moments


def _round_layer(layer: Layer, inputs: list[Compensation | None]) -> None:
    """Round one weight; where it has three inputs, each third of its rows on its own."""
    weight = layer.weight.detach().flatten(1)
    grid = Grid.of(layer.quantizer, weight)
    size = len(weight) // len(inputs)
    parts = []
    for index, each in enumerate(inputs):
        if each is None:
            to_nearest(layer, "has inputs whose Hessian cannot be factored, even with more damping", _warn)
            return
        rows = slice(index * size, (index + 1) * size)
        parts.append(gptq_round(weight[rows], each, grid.select(rows=rows)))
    write(layer, torch.cat(parts))


def _warn(layer: Layer, reason: str) -> None:
    warnings.warn(f"{layer.site.name} {reason}; it is rounded to nearest", stacklevel=2)
