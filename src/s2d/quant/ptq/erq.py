"""ERQ: weights not yet rounded compensate the error of rounded activations, then that of rounded weights.

Zhong et al., "ERQ: Error Reduction for Post-Training Quantization of Vision Transformers", ICML 2024, arXiv 2407.06794.
Rows of X are the inputs of a layer at full precision, those of X^ what its input quantizer makes of them, with a column
of ones for the bias; N tokens.

Aqer (section 3.2): with both at full precision, the weight moves so that it undoes the rounding of its input,

    delta^T = (X^^T X^ + lambda I)^-1 X^^T (X - X^) W^T                                                    (eq. 8)

Wqer (section 3.3): with all columns active, again and again
    1. the first half S of the active columns is rounded, Delta_S = Q(W_S) - W_S;
    2. rounding refinement: with C = X^_S^T X^_S / N and L(d) = d C d^T, every row flips the entry with the largest
       |2 C d| whose other neighbour lowers L, up to 100 times (algorithm 1);
    3. the rest R takes up the error, Delta_R^T = -(X^_R^T X^_R + lambda I)^-1 X^_R^T X^_S Delta_S^T      (eq. 16)
until only the bias is left, which stays at full precision.

Norms are reparametrised and the softmax is quantized as in `repq`, ranges of weights the best percentile out of ten.

Protocol ``own``: X comes from the full-precision model, every layer on its own, as released. Protocol ``unified``: X^
comes from behind quantized layers, X from the full-precision model, so a layer also makes up for those before it.

Where this differs from the release:

- lambda is a share of the mean squared input, times N. The release adds 2000 to sums over all tokens: 0.01 a token at
  1024 images, but 0.3 at 32.
- Under ``own``, what a range cuts off does not count as an error of the input. A percentile lets the outliers of a few
  tokens go on purpose; making up for them puts giant columns into W and moves the bias of all tokens. (MiniLM at W6A6:
  cosine to full precision 0.58 with it, 0.91 without; on inputs without outliers it makes no difference.)
- A flip is done if it lowers L exactly (the change is 2 e (C d)_j + e^2 C_jj); nothing has to be tried and undone.
- The dual uniform ranges of the later TPAMI version are not here. Weights keep the spec's format.
- Outside the blocks (a head that an override names), X comes from behind quantized blocks.

Factorisations are in float64; one that fails gets more damping, at last a warning that names the layer, which is then
rounded to nearest. Cost: d^3 a layer, once for all rows; some forwards of every block. When not to use it: with fewer
tokens than ten times the inputs of a layer, the correction overfits the calibration data.

Shapes: o outputs, d inputs, N tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from s2d.models.running import evaluating
from s2d.quant.calibration import corrections
from s2d.quant.calibration.corrections import RIDGE, correctable, ridge_solve, to_nearest, write
from s2d.quant.calibration.observe import Job
from s2d.quant.calibration.readings import BlockRuns, Group, Layer, ModelRuns, layers_of, readings
from s2d.quant.calibration.walk import observe_block, original, outside, walk
from s2d.quant.numerics.formats import IntFormat
from s2d.quant.numerics.quantizer import Quantizer, fake_quantize, switched_on
from s2d.quant.ptq import register
from s2d.quant.ptq.gptq import Grid
from s2d.quant.ptq.repq import begin, plain_integer, reparametrise_block, set_weight

# The list of the released code.
WEIGHT_PERCENTILES = "percentiles:97,98,99,99.5,99.95,99.97,99.99,99.995,99.999,100"
FLIPS = 100
_UNSOLVED = "has inputs whose second moment cannot be factored, even with more damping"


class Moments(corrections.Moments):
    """``X^^T X^`` as ``square``, ``[d + 1, d + 1]``, and ``X^^T (X - X^)`` as ``cross``, ``[d + 1, d]``; the last row
    and column belong to the constant 1.
    """

    def add(self, rounded: Tensor, x: Tensor) -> None:
        """Take in some tokens: what the layer reads and what it should read, ``[N, d]`` each.

        Raises:
            InputError: NaN or infinity in them.
        """
        rounded, x = rounded.float(), x.float()
        extended = torch.cat([rounded, rounded.new_ones(len(rounded), 1)], dim=1)
        self.take(extended, x - rounded)

    def normalised(self, bias: bool) -> tuple[Tensor, Tensor]:
        """Both sums divided by the tokens, in place, without the constant if there is no bias to take it."""
        self.settle()
        assert self.square is not None and self.cross is not None
        if self.count > 1:
            self.square.div_(self.count)
            self.cross.div_(self.count)
            self.count = 1
        size = len(self.square) if bias else len(self.square) - 1
        return self.square[:size, :size], self.cross[:size]


def refine_rounding(
    weight: Tensor, rounded: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, moment: Tensor, flips: int = FLIPS
) -> Tensor:
    """Round some entries to their other neighbour, where that lowers ``d C d^T`` of a row's error d.

    Args:
        weight: ``[o, s]`` before rounding.
        rounded: After rounding to nearest.
        scale: Step of every entry, ``[o, s]``.
        lowest: The smallest value there is for an entry, ``[o, s]``.
        highest: The largest.
        moment: C, ``[s, s]``.
        flips: How many entries of a row may change.

    Returns:
        The refined values, ``[o, s]``.
    """
    rounded = rounded.clone()
    error = rounded - weight
    slope = 2.0 * error @ moment
    own = moment.diagonal()
    # An entry only ever changes between its two neighbours, so whether the other one exists is known beforehand.
    other = rounded - error.sign() * scale
    exists = ((other >= lowest - 0.5 * scale) & (other <= highest + 0.5 * scale)).to(slope.dtype)
    for _ in range(flips):
        # Down where it was rounded up and the other way round: the error and the slope agree in sign.
        steepest, best = slope.abs().mul_(slope * error > 0).mul_(exists).max(1)
        step = -(error.gather(1, best[:, None]).sign() * scale.gather(1, best[:, None])).squeeze(1)
        # L changes by step * slope + step^2 C_jj, and step * slope is -|step| |slope|.
        rows = (steepest > step.abs() * own[best]).nonzero().squeeze(1)
        if not len(rows):
            break
        columns, change = best[rows], step[rows]
        rounded[rows, columns] += change
        error[rows, columns] += change
        slope.index_add_(0, rows, 2.0 * change[:, None] * moment[columns])
    return rounded


def round_halves(
    weight: Tensor, bias: Tensor | None, square: Tensor, grid: Grid, ridge: float = RIDGE
) -> tuple[Tensor, Tensor | None] | None:
    """Wqer: round a weight, half of what is left at a time, the other half and the bias making up for it.

    Args:
        weight: ``[o, d]``.
        bias: ``[o]``, or None.
        square: ``X^^T X^ / N``, ``[n, n]`` float64 with n = d, or d + 1 with a bias.
        grid: What the entries can be.
        ridge: lambda / N, relative to the mean of the diagonal of ``square``.

    Returns:
        The rounded weight, ``[o, d]`` float32 on the grid, and the bias, ``[o]`` float64; None when a system cannot be
        solved.
    """
    size, width = square.shape[0], weight.shape[1]
    columns = weight.double()
    if bias is not None:
        columns = torch.cat([columns, bias.double()[:, None]], dim=1)
    rounded = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    start = 0
    while start < width:
        stop = min(start + max(1, (size - start) // 2), width)
        here = columns[:, start:stop].float()
        values = _round(here, grid.select(columns=slice(start, stop)), square[start:stop, start:stop].float())
        rounded[:, start:stop] = values
        if stop < size:
            error = values.double() - columns[:, start:stop]
            correction = ridge_solve(square[stop:, stop:], square[stop:, start:stop] @ error.T, ridge)
            if correction is None:
                return None
            columns[:, stop:] -= correction.T
        start = stop
    return rounded, None if bias is None else columns[:, -1]


def _round(weight: Tensor, grid: Grid, moment: Tensor) -> Tensor:
    values = fake_quantize(weight, grid.scale, grid.zero_point, grid.format)
    if grid.anchors is not None:
        return torch.where(grid.anchors, weight.sign() * grid.format.qmax * grid.scale, values)
    if not isinstance(grid.format, IntFormat):
        return values
    ends = [(code - grid.zero_point) * grid.scale for code in (grid.format.qmin, grid.format.qmax)]
    refined = refine_rounding(weight, values, grid.scale, ends[0], ends[1], moment)
    # Sums of steps miss the grid by a rounding error; rounding to nearest puts them back on it.
    return fake_quantize(refined, grid.scale, grid.zero_point, grid.format)


@register("erq", "ERQ: ridge corrections for rounded activations and rounded weights, with refined rounding")
def erq(job: Job) -> None:
    """ERQ on every quantized weight, block by block."""
    begin(job)
    own = job.protocol == "own"
    for block in walk(job, reference=True):
        assert block.reference is not None
        fitted = reparametrise_block(job, block, block.reference)
        plain = replace(block, inputs=block.reference)
        if own:
            observe_block(job, plain)
        fitted.restore()
        teacher = original(block)
        layers = layers_of(job, block.quantizers)
        for site, quantizer in block.quantizers.items():
            quantizer.enabled = not own and site.what != "weight"
        with evaluating(teacher):
            for group in _groups(job, layers, BlockRuns(block)):
                if own:
                    # The teacher's quantizers are off: it runs at full precision and the rounding is done here.
                    tokens = _rounded_here(group, BlockRuns(replace(plain, module=teacher)))
                else:
                    tokens = _against_reference(group, BlockRuns(block, teacher))
                _round_group(job, group, tokens)
    _round_outside(job)


def _round_outside(job: Job) -> None:
    layers = layers_of(job, outside(job))
    if not layers:
        return
    with switched_on(job.quantizers.values()), evaluating(job.model):
        for layer in layers:
            layer.quantizer.enabled = False
            if layer.input_quantizer is not None:
                layer.input_quantizer.enabled = False
        for group in _groups(job, layers, ModelRuns(job)):
            _round_group(job, group, _rounded_here(group, ModelRuns(job)))
            for layer in group.layers:
                if layer.input_quantizer is not None:
                    layer.input_quantizer.enabled = True


def _groups(job: Job, layers: list[Layer], runs: BlockRuns | ModelRuns) -> list[Group]:
    """The layers that can be corrected, in groups, all with the ranges of their weights; see `correctable`."""
    for layer in layers:
        set_weight(job, layer.site, layer.quantizer, WEIGHT_PERCENTILES)
    return correctable(layers, runs, _warn)


def _rounded_here(group: Group, runs: BlockRuns | ModelRuns) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Which part, what a group's input quantizer makes of its inputs, and these inputs as its range holds them."""
    quantizer = group.layers[0].input_quantizer
    for part, x, _ in readings(group, runs):
        rounded = x if quantizer is None else quantizer.fake_quantize(x)
        yield part, rounded, x if quantizer is None else within_range(x, rounded, quantizer)


def within_range(x: Tensor, rounded: Tensor, quantizer: Quantizer) -> Tensor:
    """``x``, but what the quantizer's range cuts off as it leaves it: ``rounded``."""
    if not plain_integer(quantizer):
        return x
    # Inside the range the error is at most half a step; the margin is for ties in float32.
    return torch.where((x - rounded).abs() > 0.501 * quantizer.scale, rounded, x)


def _against_reference(group: Group, runs: BlockRuns) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Which part, what a group reads behind quantized layers, and what it reads at full precision, ``[N, d]``."""
    for part, x, reference in readings(group, runs):
        assert reference is not None
        yield part, x, reference


def _round_group(job: Job, group: Group, tokens: Iterable[tuple[int, Tensor, Tensor]]) -> None:
    moments = [Moments(group.layers[0].site.name) for _ in range(group.parts)]
    for part, rounded, x in tokens:
        moments[part].add(rounded, x)
    for layer in group.layers:
        _round_layer(job, layer, moments, last=layer is group.layers[-1])


@torch.no_grad()
def _round_layer(job: Job, layer: Layer, moments: list[Moments], *, last: bool) -> None:
    """Both steps for one layer; where it has three inputs, each third of its rows on its own.

    The ``last`` layer of a group leaves no more of the moments than it still needs: they can be larger than its weight.
    """
    weight, bias = layer.weight.detach().flatten(1).float(), _bias(layer)
    weights = list(weight.chunk(len(moments)))
    biases: list[Tensor | None] = [None] * len(moments) if bias is None else list(bias.detach().chunk(len(moments)))
    width, squares = weight.shape[1], []
    for index, moment in enumerate(moments):
        square, cross = moment.normalised(bias is not None)
        missing = cross @ weights[index].double().T
        del cross
        if last:
            moment.cross = None
        solved = ridge_solve(square, missing)  # eq. 8
        if solved is None:
            to_nearest(layer, _UNSOLVED, _warn)
            return
        delta = solved.T
        squares.append(square)
        weights[index] = (weights[index].double() + delta[:, :width]).float()
        if (old := biases[index]) is not None:
            biases[index] = old.double() + delta[:, width]
    corrected = torch.cat(weights)
    # The ranges of the corrected weight.
    layer.weight.copy_(corrected.view(layer.weight.shape))
    set_weight(job, layer.site, layer.quantizer, WEIGHT_PERCENTILES)
    grid, first = Grid.of(layer.quantizer, corrected), 0
    del missing, solved, delta
    for index, square in enumerate(squares):
        rows = slice(first, first + len(weights[index]))
        found = round_halves(weights[index], biases[index], square, grid.select(rows=rows))
        if found is None:
            to_nearest(layer, _UNSOLVED, _warn)
            return
        weights[index], biases[index] = found
        first = rows.stop
    write(layer, torch.cat(weights))
    if bias is not None:
        bias.copy_(torch.cat([part for part in biases if part is not None]))


def _bias(layer: Layer) -> nn.Parameter | None:
    name = "in_proj_bias" if isinstance(layer.module, nn.MultiheadAttention) else "bias"
    return layer.module._parameters.get(name)  # pyright: ignore[reportReturnType]


def _warn(layer: Layer, reason: str) -> None:
    shape = "x".join(str(size) for size in layer.weight.shape)
    warnings.warn(f"erq: {layer.site.name} [{shape}] {reason}; rounded to nearest, without correction", stacklevel=2)
