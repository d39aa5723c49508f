"""Trying a rounding out on tensors, without touching the quantizers that sit in the model."""

from __future__ import annotations

import copy

from torch import Tensor

from s2d.quant.observers import make_observer
from s2d.quant.ptq.rtn import set_weight_range
from s2d.quant.quantizer import Quantizer, affine_parameters, fake_quantize
from s2d.quant.sites import Site


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
