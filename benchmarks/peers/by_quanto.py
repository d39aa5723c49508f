"""optimum-quanto."""

from __future__ import annotations

import torch
from peers.contract import Job, way
from torch import nn

PACKAGE = "optimum.quanto"


def _quantized(job: Job, weights: str, activations: str | None = None) -> nn.Module:
    from optimum import quanto

    types = {"weights": weights} if activations is None else {"weights": weights, "activations": activations}
    quanto.quantize(job.inner, **{name: getattr(quanto, each) for name, each in types.items()})
    if activations is not None:
        with torch.no_grad(), quanto.Calibration():
            job.calibrate()
    quanto.freeze(job.inner)
    return job.model


@way("w8a8-static", "int8 a channel, int8 activations, one scale a tensor")
def w8a8(job: Job) -> nn.Module:
    """Symmetric activations; outputs as well as inputs."""
    return _quantized(job, "qint8", "qint8")


@way("w4a8-static", "int4 in groups, int8 activations, one scale a tensor")
def w4a8(job: Job) -> nn.Module:
    """Groups of 128 where they fit."""
    return _quantized(job, "qint4", "qint8")


@way("w4a16", "int4 in groups")
def w4(job: Job) -> nn.Module:
    """Groups of 128 where they fit."""
    return _quantized(job, "qint4")
