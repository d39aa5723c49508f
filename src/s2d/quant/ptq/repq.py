"""RepQ-ViT: calibrate with one scale per channel, then reparametrise to one scale per layer for the hardware.

Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", ICCV 2023, arXiv
2212.08254.

Behind a norm every channel j is calibrated on its own, with a scale s_j and a zero point z_j (section 3.2). With one
scale s and one zero point z for all,

    r_j = s_j / s,  t_j = s (z - z_j):    x'_j = x_j / r_j - t_j,  W' = W diag(r),  b' = b + W' t       (eq. 8-11)

leaves the layer's output as it was, and rounding x' with (s, z) gives the very codes of rounding x_j with (s_j, z_j).
x' comes from the norm's own gain and bias, so nothing is added to the model. Behind the softmax stands log-sqrt2
(section 3.4; see `s2d.quant.numerics.log_and_twin`). The other ranges are the best percentile of a short list.

Where this differs from the released code:

- z is rounded. The release uses the mean as it is, so that its codes are no integers and differ from the channel-wise.
- How s is averaged does not matter: another s multiplies the whole of W' and x', which their own scales take up again.
- A channel that hardly varies keeps at least a hundredth of the mean scale; x / r would blow up the gain.
- A norm or a reader without a bias cannot take a shift; then all channels share the zero point and t is 0.
- Blocks see inputs behind quantized blocks; inside a block all ranges come from one pass, where the release lets each
  quantizer see the rounding of those before it in the block.
- Above 6 bits the probabilities keep uniform steps: neighbours on the log scale are a factor sqrt2 apart whatever the
  bits. The paper has no more than 6.
- Weights keep the spec's format. The paper's rows are asymmetric: ``{"base": "w4a4", "weight": {"format": "uint4"}}``.

In post-norm models the norm's output is the residual too, so its channels cannot be scaled: there norms stay as they
are, with a warning, and only log-sqrt2 and the percentiles remain. Cost: three passes of every block.

When not to use it: one giant channel behind a norm moves into a giant column of W', and low-bit weights fail instead.

Shapes: N tokens, D channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.running import real_tokens
from s2d.quant.calibration.observe import Job, observe, set_weight_range
from s2d.quant.calibration.unchanged import refuse_changed
from s2d.quant.calibration.walk import Block, Call, observe_block, observe_outside, outside, walk
from s2d.quant.modules.folding import NormFold, apply_norm_fold, matrix, norm_folds
from s2d.quant.modules.sites import Site
from s2d.quant.numerics.formats import IntFormat
from s2d.quant.numerics.log_and_twin import LogSqrt2Quantizer
from s2d.quant.numerics.observers import best_percentiles, weight_range
from s2d.quant.numerics.quantizer import SMALLEST_SCALE, Quantizer
from s2d.quant.ptq import register

PUBLISHED = "percentiles:99.9,99.99,99.999"
PERCENTS = (99.9, 99.99, 99.999)
# The widest codes for which log-sqrt2 was published; wider ones only reach further down, not closer.
WIDEST_LOG = 6
# A channel's scale, relative to the mean, is at least this.
SMALLEST_RATIO = 0.01


@dataclass(frozen=True)
class Reparametrisation:
    """From channel-wise to layer-wise.

    Attributes:
        ratio: r, ``[D]`` float32, > 0.
        shift: t, ``[D]`` float32; zeros where no bias can take it.
        scale: s.
        zero_point: z, an integer of the format (int32).
        channel_scale: s_j, ``[D]``.
        channel_zero: z_j, ``[D]``, whole numbers of any size.
    """

    ratio: Tensor
    shift: Tensor
    scale: Tensor
    zero_point: Tensor
    channel_scale: Tensor
    channel_zero: Tensor


def reparametrise(lo: Tensor, hi: Tensor, format: IntFormat, *, shift: bool) -> Reparametrisation:
    """Channel-wise ranges as one scale and zero point, and what makes up for it.

    Args:
        lo: Smallest value of each channel, ``[D]``; a range need not contain 0.
        hi: Largest value.
        format: Of the layer's input.
        shift: Whether norm and readers can take a shift.
    """
    lo, hi = lo.float(), hi.float()
    steps = format.qmax - format.qmin
    if shift and not format.symmetric:
        scale = _floored((hi - lo) / steps)
        zero = format.qmin - torch.round(lo / scale)
        common = torch.round(zero.mean()).clamp(format.qmin, format.qmax)
    else:
        below, above = (-lo).clamp(min=0.0), hi.clamp(min=0.0)
        common = torch.zeros((), device=lo.device)
        if not format.symmetric:
            share = below.sum() / (below + above).sum().clamp(min=SMALLEST_SCALE)
            common = format.qmin + torch.round(share * steps)
        # At the very end of the codes the other side has none; the floor keeps such channels finite, clipped.
        room_below, room_above = (common - format.qmin).clamp(min=1.0), (format.qmax - common).clamp(min=1.0)
        scale = _floored(torch.maximum(below / room_below, above / room_above))
        zero = common.expand_as(scale)
    mean = scale.mean()
    return Reparametrisation(scale / mean, mean * (common - zero), mean, common.to(torch.int32), scale, zero)


def _floored(scale: Tensor) -> Tensor:
    return scale.clamp(min=SMALLEST_SCALE).maximum(SMALLEST_RATIO * scale.mean())


def channel_rounding(format: IntFormat):
    """Asymmetric rounding of ranges that need not contain 0: what a channel behind a norm gets."""

    def rounding(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        scale = ((hi - lo) / (format.qmax - format.qmin)).clamp(min=SMALLEST_SCALE)
        zero = format.qmin - torch.round(lo / scale)
        return (torch.round(x / scale) + zero).clamp_(format.qmin, format.qmax).sub_(zero).mul_(scale)

    return rounding


@torch.no_grad()
def apply_reparametrisation(model: nn.Module, fold: NormFold, found: Reparametrisation) -> None:
    """Change a norm and its readers, in place; their joint function stays what it was (float64, rounded once)."""
    apply_norm_fold(model, fold, found.ratio)
    if not bool(found.shift.any()):
        return
    shift = found.shift.double()
    norm_bias = model.get_submodule(fold.norm).get_parameter("bias")
    norm_bias.copy_(norm_bias.double() - shift)
    for reader in fold.readers:
        weight, bias = matrix(model, reader)
        assert bias is not None
        bias.copy_(bias.double() + weight.double() @ shift)


@register("repq", "RepQ-ViT: channel-wise ranges behind norms folded into the weights, log-sqrt2 behind the softmax")
def repq(job: Job) -> None:
    """RepQ-ViT in pre-norm blocks; without its norms in post-norm ones."""
    begin(job)
    for block in walk(job, reference=job.protocol == "unified"):
        calls = block.inputs if block.reference is None else block.reference
        fitted = reparametrise_block(job, block, calls)
        if job.protocol == "own":
            observe_block(job, block)
        fitted.restore()
        for site, quantizer in block.quantizers.items():
            set_weight(job, site, quantizer)
    for site in outside(job):
        set_weight(job, site, job.quantizers[site])


def begin(job: Job) -> None:
    """Put log-sqrt2 behind every softmax and find the ranges outside the blocks; unified, all ranges."""
    for site, quantizer in list(job.quantizers.items()):
        if site.what == "probs" and plain_integer(quantizer) and quantizer.format.bits <= WIDEST_LOG:
            job.replace_quantizer(site, LogSqrt2Quantizer(quantizer.format, name=site.name))
    if job.protocol == "unified":
        observe(job)
    else:
        job.published = PUBLISHED
        observe_outside(job)
    warn_about_residuals(job)


def plain_integer(quantizer: Quantizer) -> bool:
    """Whether this is a static integer quantizer with one range a tensor."""
    whole = isinstance(quantizer.format, IntFormat) and not quantizer.format.power_of_two
    return whole and quantizer.granularity == "tensor" and quantizer.kind == "affine"


def set_weight(job: Job, site: Site, quantizer: Quantizer, published: str = PUBLISHED) -> None:
    """The range of a weight, by the spec's observer or the published one; other sites are left alone."""
    if site.what != "weight":
        return
    own = job.protocol == "own" and site.observer == "minmax" and site.granularity != "block"
    set_weight_range(replace(site, observer=published) if own else site, quantizer, job.weight(site))


def warn_about_residuals(job: Job) -> None:
    """Say by name which norms cannot be reparametrised because more than the known products reads them."""
    kept = [fold.norm for fold in norm_folds(job.model, job.graph) if fold.residual and _targets(job, fold)]
    if kept:
        more = f" and {len(kept) - 2} more" if len(kept) > 2 else ""
        warnings.warn(
            f"{job.method}: {', '.join(kept[:2])}{more} also feed the residual sum (post-norm) or another reader, so "
            "their channels keep one range for all; the rest of the method runs",
            stacklevel=2,
        )


def _targets(job: Job, fold: NormFold) -> dict[Site, Quantizer]:
    """The input quantizers of a norm's readers that can take a reparametrised range, all of one format."""
    found = {
        site: quantizer
        for site, quantizer in job.quantizers.items()
        if site.module in fold.readers and site.what == "input" and plain_integer(quantizer)
    }
    formats = {quantizer.format for quantizer in found.values()}
    coarsest = min(formats, key=lambda format: format.bits, default=None)
    return {site: quantizer for site, quantizer in found.items() if quantizer.format == coarsest}


@dataclass
class Fitted:
    """Ranges that a reparametrisation has fixed, to be put back after others were observed."""

    ranges: dict[Quantizer, Reparametrisation]

    def restore(self) -> None:
        """Give the quantizers behind reparametrised norms their scale and zero point."""
        for quantizer, found in self.ranges.items():
            quantizer.scale.copy_(found.scale)
            quantizer.zero_point.copy_(found.zero_point)


def reparametrise_block(job: Job, block: Block, calls: Sequence[Call]) -> Fitted:
    """Reparametrise the norms inside a block, from what its readers see in ``calls``.

    Returns:
        The ranges of the readers' inputs; `Fitted.restore` sets them.

    Raises:
        InputError: The data reached no reader, or the block computes something else than before.
    """
    folds = [(fold, _targets(job, fold)) for fold in norm_folds(job.model, job.graph) if not fold.residual]
    folds = [(fold, targets) for fold, targets in folds if targets and f"{fold.norm}.".startswith(f"{block.name}.")]
    seen: dict[Site, list[Tensor]] = {next(iter(targets)): [] for _, targets in folds}
    try:
        for site, parts in seen.items():
            job.quantizers[site].watch = _collector(block, site, parts)
        before = [output for index, output in enumerate(block.stream(calls)) if index == 0] if seen else []
    finally:
        for site in seen:
            job.quantizers[site].watch = None
    ranges: dict[Quantizer, Reparametrisation] = {}
    for fold, targets in folds:
        site, quantizer = next(iter(targets.items()))
        if not seen[site]:
            raise InputError(
                f"the calibration data never reached {site.name}; feed data that does, or override it with keep"
            )
        channels = torch.cat(seen.pop(site)).float().T.contiguous()  # [D, N]
        found = _reparametrisation(job, fold, site, channels)
        apply_reparametrisation(job.model, fold, found)
        ranges.update(dict.fromkeys(targets.values(), found))
    for output in before:
        refuse_changed(job, job.method, block.name, output, next(block.stream(calls)))
    return Fitted(ranges)


def _collector(block: Block, site: Site, into: list[Tensor]):
    return lambda x: into.append(real_tokens(x.detach(), block.padding()(site.module), "input").flatten(0, -2))


def _reparametrisation(job: Job, fold: NormFold, site: Site, channels: Tensor) -> Reparametrisation:
    format = job.quantizers[site].format
    assert isinstance(format, IntFormat)
    if not bool(torch.isfinite(channels).all()):
        raise InputError(f"{site.name} received NaN or infinite values; check the weights and the calibration data")
    observer = job.observer_of(site)
    if observer == PUBLISHED:
        lo, hi = best_percentiles(channels, PERCENTS, channel_rounding(format))
    else:
        lo, hi = weight_range(channels, observer, format, name=site.name)
    norm = job.model.get_submodule(fold.norm)
    biases = [norm._parameters.get("bias"), *(matrix(job.model, reader)[1] for reader in fold.readers)]
    return reparametrise(lo, hi, format, shift=all(bias is not None for bias in biases))
