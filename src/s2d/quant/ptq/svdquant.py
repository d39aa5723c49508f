"""SVDQuant: the strongest singular directions of a weight are kept beside it at 16 bits, the rest is rounded.

Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", ICLR 2025, arXiv
2411.05007, section 4. With inputs smoothed by s (a grid of strengths, the best per layer) and the top singular
triplets of the smoothed weight, 32 of them or, where that is less, a quarter of its narrower side:

    X^ = X / s,   W^ = W s,   W^ ~ U D  (rank r),        Y = X^ (U D)^T [16 bits] + Q(X^) Q(W^ - U D)^T

The smoothing happens where the input is rounded, so it needs no norm in front and works on every family and layer. The
branch costs r (I + O) products a token against I O, never more than half of them. It is the counterpart of
conditioning: SVDQuant takes the top directions out of the rounded weight, conditioning makes them smaller.

Factors are rounded to bfloat16 before they are subtracted, so the remainder includes their rounding error; the
branch's inputs stay at the model's own precision, which 16-bit kernels round. The strength is chosen for the error of
the layer's output with input and weight rounded to nearest, on up to 512 tokens of the calibration data.

Shapes: I inputs of a layer, O outputs, N tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.masks import token_mask
from s2d.models.running import evaluating, run
from s2d.quant.calibration.observe import Job, least_error, watch_inputs
from s2d.quant.calibration.transforms import rounded_input, rounded_weight
from s2d.quant.calibration.unchanged import function_kept
from s2d.quant.calibration.walk import outside, walk
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.modules.online import make_online
from s2d.quant.modules.sites import Site
from s2d.quant.ptq import register
from s2d.quant.ptq.smoothquant import smoothing_scale

RANK = 32
STRENGTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = 512
ROUNDS = 3


class TokenSample:
    """A uniform sample of up to `TOKENS` rows of all inputs, and the largest magnitude of every channel."""

    def __init__(self, generator: torch.Generator) -> None:
        """Start empty; ``generator`` draws the rows."""
        self.generator = generator
        self.rows: Tensor | None = None
        self.keys = torch.empty(0, dtype=torch.float64)
        self.largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in tokens ``[N, I]``."""
        if not len(x):
            return
        top = x.abs().amax(0)
        self.largest = top if self.largest is None else torch.maximum(self.largest, top)
        # The rows with the largest of one random key each are a uniform sample, however they come.
        keys = torch.cat([self.keys, torch.rand(len(x), generator=self.generator, dtype=torch.float64)])
        rows = x if self.rows is None else torch.cat([self.rows, x])
        chosen = keys.topk(min(TOKENS, len(keys))).indices.sort().values
        self.rows, self.keys = rows[chosen.to(rows.device)].clone(), keys[chosen]


def rank_for(weight: Tensor) -> int:
    """The rank of the branch of a weight ``[O, I]``: 32, or a quarter of its narrower side."""
    return min(RANK, min(weight.shape) // 4)


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation ``up @ down`` of a weight with that rank, factors of equal size, rounded to bfloat16.

    Args:
        weight: ``[O, I]``.
        rank: At most ``min(O, I)``.

    Returns:
        down ``[r, I]`` and up ``[O, r]``, float64.
    """
    # The eigenvectors of the smaller product: faster than an SVD and exact enough for factors of 16 bits.
    weight = weight.double()
    wide = weight.shape[1] > weight.shape[0]
    tall = weight.T if wide else weight
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    right = vectors[:, -rank:]
    root = values[-rank:].clamp(min=0.0).pow(0.25)
    inverse = torch.where(root > 0, 1.0 / root.clamp(min=1e-30), torch.zeros_like(root))
    first, second = (tall @ right) * inverse, (right * root).T
    up, down = (second.T, first.T) if wide else (first, second)
    return down.bfloat16().double(), up.bfloat16().double()


def low_rank_quickly(weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """About what `low_rank` gives, by a few rounds of subspace iteration; good enough to compare strengths with.

    Args:
        weight: ``[O, I]``.
        start: ``[I, r]`` random, of the weight's type.
    """
    basis = start
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(weight.T @ (weight @ basis)).Q
    up = weight @ basis
    return basis.T.bfloat16().to(weight), up.bfloat16().to(weight)


def refuse_without_room(model: nn.Module, sites: Sequence[Site], graph: Graph, earlier: Sequence[str]) -> None:
    """Raise InputError where no weight of a plan gets a branch."""
    rounded = {site.module for site in sites if site.what == "weight" and site.format is not None and not site.summed}
    layers = [module for name in rounded if isinstance(module := model.get_submodule(name), nn.Linear)]
    if not any(_has_room(model, layer.weight) for layer in layers):
        raise _nothing(model)


@register(
    "svdquant",
    f"a 16-bit branch of rank {RANK} or less beside each smoothed, rounded weight",
    stage="transform",
    check=refuse_without_room,
    splits=True,
)
def svdquant(job: Job) -> None:
    """Smooth and split every quantized Linear; reads the data once or twice.

    The fused projection of an `nn.MultiheadAttention` is no Linear and is left to the rounding alone, and so is a head
    that shares its weight with the embedding.

    Own protocol: ranges of least squared error (the paper's are those of groups of 64, found anew in every forward).

    Raises:
        InputError: The model has no quantized Linear of at least 4 inputs and outputs.
    """
    least_error(job)
    done = 0
    with function_kept(job, "svdquant"):
        for block in walk(job):
            modules = {name: module for name, module in block.linears().items() if _worth_it(job, module)}
            samples = {name: TokenSample(job.generator(name)) for name in modules}
            hooks = block.watch_inputs(modules, lambda name, x, samples=samples: samples[name].add(x))  # pyright: ignore[reportArgumentType]
            try:
                for _ in block.stream(block.inputs):
                    pass
            finally:
                for hook in hooks:
                    hook.remove()
            for name, module in modules.items():
                done += split(job, name, module, samples[name])
        for name, module, sample in _outside(job):
            done += split(job, name, module, sample)
    if not done:
        raise _nothing(job.model)


def _nothing(model: nn.Module) -> InputError:
    return InputError(
        f"svdquant finds no quantized Linear of at least 4 inputs and outputs in {type(model).__name__}; "
        "use another method"
    )


def split(job: Job, name: str, module: QuantizedLinear, sample: TokenSample) -> bool:
    """Smooth a layer's input and take the low-rank branch out of its weight, in place; False where no data came by."""
    if sample.rows is None or sample.largest is None:
        return False
    weight, rows = module.weight.detach().float(), sample.rows.float()
    wanted = F.linear(rows, weight)
    best: tuple[float, Tensor] | None = None
    rank = rank_for(weight)
    start = torch.randn(weight.shape[1], rank, generator=sample.generator).to(weight)
    for strength in STRENGTHS:
        scale = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        if strength:
            scale = smoothing_scale(sample.largest, [weight], strength)
            # Only ratios matter to the weight's rounding; centred scales keep both factors in range.
            scale = scale / (scale.max() * scale.min()).sqrt()
        scale = scale.to(weight)
        smoothed = weight * scale
        error = _error(job, name, rows / scale, wanted, smoothed, *low_rank_quickly(smoothed, start))
        if best is None or error < best[0]:
            best = (error, scale)
    assert best is not None
    assert isinstance(module, nn.Module)
    online = make_online(module)
    online.smooth_input(best[1])
    online.split_off(*low_rank(online.weight, rank))
    return True


def _error(job: Job, name: str, x: Tensor, wanted: Tensor, smoothed: Tensor, down: Tensor, up: Tensor) -> float:
    """Squared error of a layer's output on (smoothed) inputs, input and remaining weight rounded to nearest."""
    rest = smoothed - up @ down
    output = F.linear(F.linear(x, down), up)
    for site, quantizer in job.quantizers.items():
        if site.module == name and site.what == "weight":
            rest = rounded_weight(job.observed(site), quantizer, rest)
        elif site.module == name:
            x = rounded_input(job.observed(site), quantizer, x)
    return float((F.linear(x, rest) + output - wanted).double().square().sum())


def _worth_it(job: Job, module: QuantizedLinear) -> bool:
    """Whether the weight is rounded and has room for a branch."""
    return module.weight_quantizer is not None and _has_room(job.model, module.weight)


def _has_room(model: nn.Module, weight: Tensor) -> bool:
    """Whether a weight has room for a branch, and is no other module's too, as a tied head's is."""
    users = sum(weight is other for each in model.modules() for other in each._parameters.values())
    return rank_for(weight) > 0 and users == 1


def _outside(job: Job) -> Iterator[tuple[str, QuantizedLinear, TokenSample]]:
    """The quantized Linears outside the blocks with samples of their inputs, from a pass over the data."""
    names = list(dict.fromkeys(site.module for site in outside(job)))
    modules = {name: module for name in names if isinstance(module := job.model.get_submodule(name), QuantizedLinear)}
    modules = {name: module for name, module in modules.items() if _worth_it(job, module)}
    if not modules:
        return
    samples = {name: TokenSample(job.generator(name)) for name in modules}
    with token_mask(job.model, job.graph) as mask, evaluating(job.model):
        hooks = watch_inputs(modules, lambda name, x: samples[name].add(x), lambda: mask)  # pyright: ignore[reportArgumentType]
        try:
            for index, batch in enumerate(job.batches):
                run(job.model, batch, index)
        finally:
            for handle in hooks:
                handle.remove()
    for name, module in modules.items():
        yield name, module, samples[name]
