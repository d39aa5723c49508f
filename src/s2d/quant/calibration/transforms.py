"""Transforms: statistics of a layer's input channels, and rounding to nearest on trial."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from s2d.errors import InputError
from s2d.models.masks import token_mask
from s2d.models.running import evaluating, run
from s2d.quant.calibration.observe import Job, set_weight_range, watch_inputs
from s2d.quant.modules.sites import Site
from s2d.quant.numerics.observers import make_observer
from s2d.quant.numerics.quantizer import Quantizer, affine_parameters, fake_quantize


@dataclass
class ChannelStatistics:
    """Magnitudes of every channel of an input, over all real tokens.

    Attributes:
        largest: ``[I]`` float32.
        total: Sum of magnitudes, ``[I]`` float64.
        tokens: How many were seen.
    """

    largest: Tensor
    total: Tensor
    tokens: int

    @property
    def mean(self) -> Tensor:
        """Mean magnitude ``[I]``, float32."""
        return (self.total / max(self.tokens, 1)).float()


def channel_statistics(job: Job, names: Sequence[str]) -> dict[str, ChannelStatistics]:
    """The magnitudes of the inputs of Linears (or of `nn.MultiheadAttention`), in one pass over the data.

    Args:
        job: The call's job; the model runs as it is.
        names: Dotted names of the modules.

    Raises:
        InputError: NaN or infinite activations, or a module that no data reached; both are named.
    """
    found: dict[str, ChannelStatistics] = {}

    def see(name: str, x: Tensor) -> None:
        magnitudes = x.abs()
        if not len(magnitudes):
            return
        largest = magnitudes.amax(0).float()
        if not bool(torch.isfinite(largest).all()):
            raise InputError(f"{name} received NaN or infinite values; check the weights and the calibration data")
        total, tokens = magnitudes.double().sum(0), len(magnitudes)
        before = found.get(name)
        if before is not None:
            largest = torch.maximum(largest, before.largest)
            total, tokens = total + before.total, tokens + before.tokens
        found[name] = ChannelStatistics(largest, total, tokens)

    with token_mask(job.model, job.graph) as mask, evaluating(job.model):
        hooks = watch_inputs({name: job.model.get_submodule(name) for name in names}, see, lambda: mask)
        try:
            total = len(job.batches) or None
            batches = track(job.batches, "channels", total=total, disable=not job.progress, transient=True)
            for index, batch in enumerate(batches):
                run(job.model, batch, index)
        finally:
            for hook in hooks:
                hook.remove()
    missed = [name for name in names if name not in found]
    if missed:
        raise InputError(
            f"the calibration data never reached {missed[0]}; feed data that does, or override it with keep"
        )
    return found


def rounded_weight(site: Site, quantizer: Quantizer | None, weight: Tensor) -> Tensor:
    """``weight [out, in]`` rounded to nearest as its site asks; itself where it is kept at full precision."""
    if quantizer is None:
        return weight
    trial = copy.deepcopy(quantizer)
    set_weight_range(site, trial, weight)
    return fake_quantize(weight, *trial.parameters_for(weight), trial.format)


def rounded_input(site: Site, quantizer: Quantizer | None, x: Tensor) -> Tensor:
    """Inputs ``[N, in]`` rounded as their site asks, with the range that its observer finds in them."""
    if quantizer is None:
        return x
    if quantizer.dynamic:
        return fake_quantize(x, *quantizer.parameters_for(x), quantizer.format)
    observer = make_observer(site.observer, site.name)
    observer.update(x)
    scale, zero_point = affine_parameters(
        *observer.range(quantizer.format), quantizer.format, quantizer.format.symmetric
    )
    return fake_quantize(x, scale, zero_point, quantizer.format)
