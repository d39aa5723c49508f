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
without forming H^-1; inputs that are always zero are rounded to nearest, not set to zero; the later columns of GPTAQ
see w_i as it was when it was rounded, whether they are in the same lazy block or not.

Shapes: o outputs, d inputs, N tokens.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

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
    ``U = R^-1``.

    Args:
        hessian: ``[d, d]`` symmetric; float64 is advised.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) != 0:
        return None
    upper = lower.flip(0, 1)
    del lower
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return factor if bool(torch.isfinite(factor).all()) else None


def damped_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor | None:
    """`upper_factor` of ``H + damping * mean(diag H) * I``, with more damping when that fails; None when all fails.

    Args:
        hessian: ``[d, d]``; its diagonal is overwritten.
        dead: ``[d]``, which inputs are always zero.
        damping: See above.
    """
    diagonal = hessian.diagonal()
    diagonal[dead] = 1.0
    for damped in dampings(diagonal.clone(), damping):
        diagonal.copy_(damped)
        factor = upper_factor(hessian)
        if factor is not None:
            return factor
    return None


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


def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = DAMPING,
    act_order: bool = True,
    cross: Tensor | None = None,
    alpha: float = GPTAQ_ALPHA,
) -> Tensor | None:
    """Round a weight for the inputs that its Hessian stands for.

    Args:
        weight: ``[o, d]``.
        hessian: ``2/N X^T X``, ``[d, d]`` float64, undamped.
        grid: What the entries can be.
        damping: Share of the mean diagonal that is added to the diagonal.
        act_order: Round the columns with the largest inputs first.
        cross: GPTAQ's D, ``2/N (X~ - X)^T X``, ``[d, d]``; None for GPTQ.
        alpha: How much of the drift GPTAQ corrects.

    Returns:
        ``[o, d]`` float32, on the grid; None when the Hessian cannot be factored even with more damping.
    """
    dead = hessian.diagonal() == 0
    order = torch.arange(len(hessian), device=hessian.device)
    if act_order:
        order = torch.where(dead, -1.0, hessian.diagonal()).argsort(descending=True, stable=True)
    factor = damped_factor(hessian[order[:, None], order], dead[order], damping)
    if factor is None:
        return None
    drift = None
    if cross is not None:
        drift = (alpha * (cross[order][:, order] @ factor.t()).triu(1) @ factor).float().to(weight.device)
    order = order.to(weight.device)
    factor = factor.float().to(weight.device)
    rounded = round_columns(weight.float()[:, order], grid.select(columns=order), factor, drift)
    back = torch.empty_like(rounded)
    back[:, order] = rounded
    return back


def _wide(x: Tensor) -> Tensor:
    """In float64; on CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


class Moments(corrections.Moments):
    """``X^T X`` as ``square`` and, where there is a reference, ``(X~ - X)^T X`` as ``cross``, ``[d, d]`` both."""

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Take in the inputs of some tokens, ``[N, d]``, and the same tokens' inputs in the full-precision model.

        Raises:
            InputError: NaN or infinity in them.
        """
        x = x.float()
        cross = None if reference is None else _wide((reference.float() - x).t() @ x)
        self.take(len(x), _wide(x.t() @ x), cross)

    def add_up(self, groups: Groups) -> None:
        """Add the sums of other ranks, which saw other tokens of the same layer."""
        if not groups:
            return
        assert self.square is not None
        self.count = int(all_reduce(torch.tensor(self.count, device=self.square.device), groups))
        all_reduce(self.square, groups)
        if self.cross is not None:
            all_reduce(self.cross, groups)

    def hessian(self) -> Tensor:
        """``2/N X^T X``, float64."""
        assert self.square is not None
        return self.square * (2.0 / self.count)

    def drift(self) -> Tensor | None:
        """``2/N (X~ - X)^T X``, float64, or None without a reference."""
        return None if self.cross is None else self.cross * (2.0 / self.count)


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
        for layer in group.layers:
            _round_layer(layer, moments, damping)


def _moments(group: Group, runs: BlockRuns | ModelRuns) -> list[Moments]:
    """The moments of a group's input, one for each part of the rows."""
    moments = [Moments(group.layers[0].site.name) for _ in range(group.parts)]
    for part, x, reference in readings(group, runs):
        moments[part].add(x, reference)
    return moments


def _round_layer(layer: Layer, moments: list[Moments], damping: float) -> None:
    """Round one weight; where it has three inputs, each third of its rows on its own."""
    weight = layer.weight.detach().flatten(1)
    grid = Grid.of(layer.quantizer, weight)
    size = len(weight) // len(moments)
    parts = []
    for index, moment in enumerate(moments):
        rows = slice(index * size, (index + 1) * size)
        rounded = gptq_round(
            weight[rows], moment.hessian(), grid.select(rows=rows), damping=damping, cross=moment.drift()
        )
        if rounded is None:
            to_nearest(layer, "has inputs whose Hessian cannot be factored, even with more damping", _warn)
            return
        parts.append(rounded)
    write(layer, torch.cat(parts))


def _warn(layer: Layer, reason: str) -> None:
    warnings.warn(f"{layer.site.name} {reason}; it is rounded to nearest", stacklevel=2)
