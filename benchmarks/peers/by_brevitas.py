"""Brevitas: every Linear of the encoder as its own, simulated; input ranges at its percentile (99.999)."""

from __future__ import annotations

from typing import Any

import torch
from peers.contract import ENCODERS, Job, way
from torch import nn

PACKAGE = "brevitas"


def _layers(job: Job, weights: int, activations: int | None) -> Any:
    from brevitas import nn as brevitas_nn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    settings: dict[str, Any] = {"weight_quant": Int8WeightPerChannelFloat.let(bit_width=weights)}
    if activations:
        settings["input_quant"] = ShiftedUint8ActPerTensorFloat.let(bit_width=activations)
    return layerwise_quantize(job.inner, {nn.Linear: (brevitas_nn.QuantLinear, settings)})


def _observed(job: Job, weights: int, activations: int) -> nn.Module:
    from brevitas.graph.calibrate import calibration_mode

    model = job.replace(_layers(job, weights, activations))
    with torch.no_grad(), calibration_mode(job.inner):
        job.calibrate()
    return model


@torch.no_grad()
def _gptq(job: Job) -> nn.Module:
    from brevitas.graph.gptq import gptq_mode

    with gptq_mode(job.inner, use_quant_activations=True, create_weight_orig=False) as mode:
        for _ in range(mode.num_layers):
            for batch in job.inputs:
                mode.model(**batch)  # it ends behind the layer that is rounded
            mode.update()
    return job.model


@way("w8a8-static", "int8 a channel, one range a tensor, simulated")
def w8a8(job: Job) -> nn.Module:
    """Rounded."""
    return _observed(job, 8, 8)


@way("w4a8-static", "int4 a channel, one 8-bit range a tensor, simulated")
def w4a8(job: Job) -> nn.Module:
    """Rounded."""
    return _observed(job, 4, 8)


@way("w4a4-static", "int4 a channel, one range a tensor, simulated")
def w4a4(job: Job) -> nn.Module:
    """Rounded."""
    return _observed(job, 4, 4)


@way("w4a4-static", "the same, weights by its GPTQ", beds=ENCODERS)
def w4a4_gptq(job: Job) -> nn.Module:
    """Layer after layer, activations quantized."""
    _observed(job, 4, 4)
    return _gptq(job)


@way("w4a16", "int4 a channel, simulated")
def w4(job: Job) -> nn.Module:
    """Rounded."""
    return job.replace(_layers(job, 4, None))
