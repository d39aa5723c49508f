"""torchao: `quantize_` on the encoder, and its static PT2E path."""

from __future__ import annotations

from typing import Any

import torch
from peers.contract import ENCODERS, Job, way
from torch import nn

PACKAGE = "torchao"


def _quantized(job: Job, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(job.inner, config)
    return job.model


@way("w8a8-dynamic", "int8 a channel, int8 a token")
def w8a8(job: Job) -> nn.Module:
    """Its configuration for servers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _quantized(job, Int8DynamicActivationInt8WeightConfig())


@way("w4a8-dynamic", "int4 in groups of 32, int8 a token")
def w4a8(job: Job) -> nn.Module:
    """Its configuration for phones."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    return _quantized(job, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))


def _weights(job: Job, granularity: Any, **more: Any) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig

    return _quantized(job, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity, **more))


@way("w4a16", "int4 a channel")
def w4_channel(job: Job) -> nn.Module:
    """Rounded."""
    from torchao.quantization.granularity import PerAxis

    return _weights(job, PerAxis(0))


@way("w4a16", "int4 in groups of 32")
def w4_group(job: Job) -> nn.Module:
    """Rounded."""
    from torchao.quantization.granularity import PerGroup

    return _weights(job, PerGroup(32))


@way("w4a16", "int4 in groups of 32, scales by HQQ")
def w4_hqq(job: Job) -> nn.Module:
    """Its better choice of scales."""
    from torchao.quantization.granularity import PerGroup

    return _weights(job, PerGroup(32), intx_choose_qparams_algorithm="hqq_scale_only")


@way("w4a4-dynamic", "int4 a channel, int4 a token, simulated")
def w4a4(job: Job) -> nn.Module:
    """The fake quantizers of its QAT; it has no kernel for this."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activation = IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True)
    return _quantized(job, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))


@way("w8a8-static", "PT2E, X86InductorQuantizer: int8 a channel, one range a tensor, simulated", beds=ENCODERS)
def pt2e(job: Job) -> nn.Module:
    """Exported, observed, converted; run as written, without inductor."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    example = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in job.inputs[0].items()}
    auto = torch.export.Dim.AUTO
    shapes = {name: [auto, auto if value.dim() == 2 else None] for name, value in example.items()}
    shapes = {name: each + [None] * (example[name].dim() - 2) for name, each in shapes.items()}
    graph = torch.export.export(job.model, (), example, dynamic_shapes=shapes).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    job.model = prepare_pt2e(graph, quantizer)
    job.calibrate()
    return convert_pt2e(job.model)
