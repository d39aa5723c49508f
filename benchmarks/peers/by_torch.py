"""What comes with torch: torch.ao's dynamic quantization, and its fake quantizers with its observers."""

from __future__ import annotations

import torch
from peers.contract import Job, way
from torch import Tensor, nn

PACKAGE = "torch"


@way("w8a8-dynamic", "quantize_dynamic: int8 a tensor, one range a tensor and call", alone=True)
def dynamic(job: Job) -> nn.Module:
    """FBGEMM's kernels."""
    made = torch.ao.quantization.quantize_dynamic(job.inner, {nn.Linear}, dtype=torch.qint8)
    return job.replace(made)


def _static(job: Job, observer: type, weights: int, activations: int) -> nn.Module:
    """Fake quantizers on inputs and weights of every Linear, ranges observed on the calibration data."""
    from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver

    def weight_of(layer: nn.Linear) -> Tensor:
        rows = {"ch_axis": 0, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
        half = 2 ** (weights - 1)
        fake = FakeQuantize(MovingAveragePerChannelMinMaxObserver, quant_min=-half, quant_max=half - 1, **rows)
        return fake(layer.weight)

    layers = [module for module in job.inner.modules() if isinstance(module, nn.Linear)]
    quantizers = []
    for layer in layers:
        fake = FakeQuantize(observer, quant_min=0, quant_max=2**activations - 1, dtype=torch.quint8)
        fake.disable_fake_quant()
        layer.register_forward_pre_hook(lambda _, args, fake=fake: (fake(args[0]), *args[1:]))
        quantizers.append(fake)
    job.calibrate()
    with torch.no_grad():
        for layer, fake in zip(layers, quantizers, strict=True):
            fake.disable_observer()
            fake.enable_fake_quant()
            layer.weight.copy_(weight_of(layer))
    return job.model


@way("w8a8-static", "int8 a channel, one range a tensor, HistogramObserver, simulated")
def w8a8(job: Job) -> nn.Module:
    """Its recommended observer for servers."""
    return _static(job, torch.ao.quantization.HistogramObserver, 8, 8)


@way("w4a8-static", "int4 a channel, one 8-bit range a tensor, HistogramObserver, simulated")
def w4a8(job: Job) -> nn.Module:
    """Its recommended observer for servers."""
    return _static(job, torch.ao.quantization.HistogramObserver, 4, 8)


@way("w4a4-static", "int4 a channel, one range a tensor, MinMaxObserver, simulated")
def w4a4_minmax(job: Job) -> nn.Module:
    """The plainest."""
    return _static(job, torch.ao.quantization.MinMaxObserver, 4, 4)


@way("w4a4-static", "int4 a channel, one range a tensor, HistogramObserver, simulated")
def w4a4_histogram(job: Job) -> nn.Module:
    """Its recommended observer for servers."""
    return _static(job, torch.ao.quantization.HistogramObserver, 4, 4)
