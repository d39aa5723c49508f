"""AdaRound with block reconstruction and QDrop: learn for every weight whether it is rounded up or down.

Sources: AdaRound (arXiv 2004.10568, eq. 21-24), reconstruction of whole blocks as in BRECQ (arXiv 2102.05426), inputs
as in QDrop (arXiv 2203.05740). For each block in turn, with its quantizers on:

    W_soft = s * (clip(floor(W / s) + h(V) + z, qmin, qmax) - z)        h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    loss   = mean over tokens |block(x) - block_fp(x_fp)|^2 + 0.01 * sum(1 - |2 h(V) - 1|^beta)

V starts where h(V) is the fraction that rounding would cut off, and beta falls from 20 to 2 after a first part without
the penalty. An entry of x is that of the stream behind quantized blocks, or with probability 0.5 that of the
full-precision model. The steps of activations are learned too (LSQ; not under the unified protocol). In the end every
weight is on its grid, up where h >= 0.5.

Differences: the papers take 20,000 steps of 32 images at a rate of 1e-3. Here it is `STEPS`, at a rate with which V can
move as far, so that a block takes seconds on a CPU: the total movement matters, not the number of steps. A step is one
calibration batch. All errors have weight 1, not a Fisher estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from s2d.models.running import evaluating, main_output, real_tokens
from s2d.quant.calibration.corrections import write
from s2d.quant.calibration.observe import Job, observe, observing, set_weight_range
from s2d.quant.calibration.readings import Layer, layers_of
from s2d.quant.calibration.walk import Block, Call, each_tensor, invoke, observe_outside, outside, walk
from s2d.quant.modules.sites import Site
from s2d.quant.numerics.formats import IntFormat
from s2d.quant.numerics.lsq import LearnedQuantizer
from s2d.quant.numerics.quantizer import WeightQuantizer
from s2d.quant.ptq import register

TOKENS = 512  # run at a time, of a batch
STEPS = 100  # twice as many gained 0.1 points on MiniLM at W3A3, in twice the time
TRAVEL = 10.0  # how far Adam can move a V in all steps, from the papers' 20,000 * 1e-3 / 2 (the rate falls linearly)
STEP_LR = 1e-3
FROM_QUANTIZED = 0.5
PENALTY = 0.01
FIRST_BETA, LAST_BETA = 20.0, 2.0
WITHOUT_PENALTY = 0.2
_LOW, _HIGH = -0.1, 1.1


def rectified(V: Tensor) -> Tensor:
    """``h(V)``, in [0, 1], with both ends reached."""
    return (torch.sigmoid(V) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def start_at(fraction: Tensor) -> Tensor:
    """The V whose ``h(V)`` is ``fraction``, each in [0, 1)."""
    return torch.logit((fraction - _LOW) / (_HIGH - _LOW))


class _Roundness(torch.autograd.Function):
    """Written out: its gradient shares the power with its value, which takes half the time of the whole step."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, beta: float, counts: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        u = (2.0 * h - 1.0).mul_(counts)
        power = u.abs().pow_(beta - 1.0)
        ctx.save_for_backward(power.mul(u.sign()).mul_(-2.0 * beta))
        return counts.sum() - power.mul_(u.abs_()).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0] * grad, None, None


def roundness(h: Tensor, beta: float, counts: Tensor) -> Tensor:
    """The penalty ``sum(1 - |2h - 1|^beta)`` over the entries that count (1.0, the others 0.0); 0 where h is 0 or 1."""
    return _Roundness.apply(h, beta, counts)  # pyright: ignore[reportReturnType]


def beta_at(progress: float) -> float | None:
    """The exponent at a share of the steps; None while there is no penalty yet."""
    if progress < WITHOUT_PENALTY:
        return None
    share = (progress - WITHOUT_PENALTY) / (1.0 - WITHOUT_PENALTY)
    return FIRST_BETA + (LAST_BETA - FIRST_BETA) * share


class SoftRounding(WeightQuantizer):
    """Stands for a weight's quantizer while its rounding is learned; V has the weight's shape."""

    def __init__(self, plain: WeightQuantizer, weight: Tensor) -> None:
        """For a quantizer that has its range, and the weight as it is before rounding."""
        super().__init__(plain.format, "tensor", name=plain.name)
        assert isinstance(plain.format, IntFormat)
        self.integers = plain.format
        self.enabled = True
        self.grid_scale, self.grid_zero = plain.parameters_for(weight)
        codes = weight.detach().float() / self.grid_scale
        floor = torch.floor(codes)
        self.V = nn.Parameter(start_at(codes.sub_(floor)))
        # One below the lowest code and the highest are clipped whichever way they go, as all beyond them.
        floor = floor.add_(self.grid_zero).clamp_(plain.format.qmin - 1, plain.format.qmax)
        self.floor = floor.to(torch.int16 if plain.format.bits <= 8 else torch.int32)

    @property
    def free(self) -> Tensor:
        """1.0 where the weight has a choice; one clipped to the same code both ways gets no gradient and no penalty."""
        return ((self.floor >= self.integers.qmin) & (self.floor < self.integers.qmax)).float()

    def forward(self, weight: Tensor) -> Tensor:
        """The soft weight; what is passed in does not matter."""
        return _Soft.apply(self.V, self).to(weight.dtype)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def values(self, h: Tensor) -> Tensor:
        """The weight for these roundings, in [0, 1]."""
        codes = (self.floor + h).clamp(self.integers.qmin, self.integers.qmax)
        return (codes - self.grid_zero) * self.grid_scale

    def penalty(self, beta: float) -> Tensor:
        """`roundness` of the weights that have a choice."""
        return roundness(rectified(self.V), beta, self.free)


class _Soft(torch.autograd.Function):
    """The soft weight. Its gradient is computed from V anew: a step then holds one tensor a weight, not six."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, rounding: SoftRounding) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(V)
        ctx.rounding = rounding
        return rounding.values(rectified(V))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.enable_grad():
            V = ctx.saved_tensors[0].detach().requires_grad_()
            values = ctx.rounding.values(rectified(V))
        return torch.autograd.grad(values, V, grad)[0], None


@register("adaround", f"AdaRound: rounding up or down learned block by block on QDrop inputs, {STEPS} steps a block")
def adaround(job: Job) -> None:
    """Reconstruct every block; weights outside the blocks are rounded to nearest.

    Own protocol: all ranges by least squared error, activations on the inputs behind quantized blocks.
    """
    if job.protocol == "unified":
        observe(job)
    else:
        observe_outside(job)
    for site in outside(job):
        if site.what == "weight":
            _set_weight_range(job, site)
    for block in walk(job, reference=True):
        reconstruct(job, block)


def reconstruct(job: Job, block: Block, steps: int = STEPS) -> None:
    """Learn the rounding of a block's weights, and the steps of its activations."""
    if job.protocol == "own":
        by_error = {_by_error(job, site): quantizer for site, quantizer in block.quantizers.items()}
        with observing(job, by_error, block.padding) as observers, evaluating(block.module):
            for _ in block.stream(block.inputs) if observers else ():
                pass
    for site in block.quantizers:
        if site.what == "weight":
            _set_weight_range(job, site)
    layers = [layer for layer in layers_of(job, block.quantizers) if _possible(layer)]
    if not layers:
        return
    soft = {layer: SoftRounding(layer.quantizer, layer.weight).to(layer.weight.device) for layer in layers}

    def penalise(progress: float) -> None:
        beta = beta_at(progress)
        if beta is None:
            return
        for module in soft.values():  # one after the other, for memory's sake
            (PENALTY * module.penalty(beta)).backward(inputs=[module.V])

    with replaced(job, block, soft) as ranges:
        rates = {"params": [module.V for module in soft.values()], "lr": 2 * TRAVEL / steps}
        descend(job, block, [rates], ranges, steps, penalise)
        rounded = {layer: module.values((rectified(module.V) >= 0.5).float()) for layer, module in soft.items()}
    for layer, values in rounded.items():
        write(layer, values)


def descend(
    job: Job,
    block: Block,
    weights: list[dict[str, Any]],
    ranges: list[nn.Parameter],
    steps: int,
    penalise: Callable[[float], None] = lambda progress: None,
) -> None:
    """Steps of Adam on QDrop's inputs, towards what the full-precision block gives; the rates fall linearly to 0.

    Args:
        job: The call's job.
        block: Walked with a reference.
        weights: Parameter groups of what stands for the weights, with their rates.
        ranges: The learned steps of activations.
        steps: How many.
        penalise: Adds to the gradients at a share of the steps.
    """
    assert block.reference is not None
    generator = job.generator(block.name)
    optimizer = torch.optim.Adam([*weights, *([{"params": ranges, "lr": STEP_LR}] if ranges else [])])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    trained = [parameter for group in weights for parameter in group["params"]] + ranges
    parts_of: dict[int, list[slice]] = {}
    with evaluating(block.module), torch.enable_grad():
        for step in range(steps):
            index = int(torch.randint(len(block.inputs), (), generator=generator))
            call = mixed(block.inputs[index], block.reference[index], generator)
            if index not in parts_of:
                parts_of[index] = _parts(block, call)
            optimizer.zero_grad()
            _add_gradients(block, index, call, parts_of[index], trained, ranges)
            penalise(step / steps)
            optimizer.step()
            scheduler.step()


def _add_gradients(
    block: Block, index: int, call: Call, parts: list[slice], trained: list[nn.Parameter], ranges: list[nn.Parameter]
) -> None:
    """The gradients of a batch's loss, from some rows at a time: what a block keeps for them grows with the rows."""
    assert block.outputs is not None
    expected, mask = block.outputs[index], block.mask_of(index)
    tokens = expected[..., 0].numel() if mask is None else real_tokens(expected, mask, "input")[..., 0].numel()
    sums = [torch.zeros_like(parameter) for parameter in ranges]
    for rows in parts:
        output = main_output(invoke(block.module, _some(call, rows) if len(parts) > 1 else call))
        here = None if mask is None else mask[rows]
        found, wanted = (real_tokens(y, here, "input") for y in (output, expected[rows].to(output.device)))
        ((found - wanted).float().square().sum() / tokens).backward(inputs=trained)
        # The gradient of a step has a factor of 1 / sqrt(values that it rounds), which are fewer here.
        share = math.sqrt(len(output) / len(expected))
        for parameter, total in zip(ranges, sums, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad, alpha=share)
            parameter.grad = None
    for parameter, total in zip(ranges, sums, strict=True):
        parameter.grad = total


def _parts(block: Block, call: Call) -> list[slice]:
    """Rows that are run at a time, `TOKENS` or a little more; all at once, unless parts give what the whole gives."""
    with torch.no_grad():
        whole = main_output(invoke(block.module, call))
        size = max(1, TOKENS * len(whole) // max(whole[..., 0].numel(), 1))
        parts = [slice(start, start + size) for start in range(0, len(whole), size)]
        if len(parts) > 1:
            try:
                found = torch.cat([main_output(invoke(block.module, _some(call, rows))) for rows in parts])
            except (RuntimeError, ValueError, IndexError):
                found = None
            if found is not None and found.shape == whole.shape and bool((found - whole).norm() <= 1e-3 * whole.norm()):
                return parts
    return [slice(None)]


def _some(call: Call, rows: slice) -> Call:
    """Some rows of every tensor that has as many as the hidden states."""
    first = next(value for value in call.slots().values() if isinstance(value, Tensor) and value.is_floating_point())
    return each_tensor(call, lambda value: value[rows] if value.ndim > 0 and len(value) == len(first) else value)


def mixed(quantized: Call, full: Call, generator: torch.Generator) -> Call:
    """A call whose floating-point tensors take every entry from the one or the other, as QDrop does."""

    def mix(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a is not b:
            return torch.where(torch.rand(a.shape, generator=generator) < FROM_QUANTIZED, a, b)
        return a

    args = tuple(mix(a, b) for a, b in zip(quantized.args, full.args, strict=True))
    return Call(args, {name: mix(value, full.kwargs[name]) for name, value in quantized.kwargs.items()})


@contextmanager
def replaced(job: Job, block: Block, weights: Mapping[Layer, WeightQuantizer]) -> Iterator[list[nn.Parameter]]:
    """While active, the block's quantizers are on: these in place of the layers', learned steps in place of the others.

    Gives the parameters of the steps (none under the unified protocol). Afterwards the quantizers are back, off, those
    of activations with the steps that were learned.
    """
    plain = dict(block.quantizers)
    learned: dict[Site, LearnedQuantizer] = {}
    try:
        for layer, module in weights.items():
            job.replace_quantizer(layer.site, module)
        for site, quantizer in plain.items():
            quantizer.enabled = True
            if job.protocol == "own" and site.what != "weight" and LearnedQuantizer.suits(quantizer):
                learned[site] = LearnedQuantizer(quantizer)
                job.replace_quantizer(site, learned[site])
        yield [parameter for quantizer in learned.values() for parameter in quantizer.parameters()]
        for site, quantizer in learned.items():
            done = quantizer.plain()
            plain[site].scale.copy_(done.scale)
            plain[site].zero_point.copy_(done.zero_point)
    finally:
        for site, quantizer in plain.items():
            quantizer.enabled = False
            job.replace_quantizer(site, quantizer)


def _possible(layer: Layer) -> bool:
    """Whether a weight's rounding can be learned: integers, found beforehand, of a weight that nobody else reads."""
    quantizer = layer.quantizer
    return isinstance(quantizer.format, IntFormat) and not quantizer.dynamic and not layer.shared_with


def _by_error(job: Job, site: Site) -> Site:
    """The site, with the observer of this method's own protocol."""
    fixed = job.protocol == "unified" or site.granularity in ("token", "block")
    return site if fixed else replace(site, observer="mse")


def _set_weight_range(job: Job, site: Site) -> None:
    set_weight_range(_by_error(job, site), job.quantizers[site], job.weight(site))
