"""s2d itself, as a user would call it without tuning.

"Linears" rows quantize what the other libraries do: every Linear of the encoder. The others also quantize the products
of attention, as s2d does by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.contract import ENCODERS, Job, way
from torch import nn

PACKAGE = "s2d"


def _quantized(job: Job, base: str, method: str = "rtn", observer: str | None = None, **more: Any) -> nn.Module:
    import s2d

    spec = {"base": base, "attention": False, **more}
    return s2d.quantize(job.model, spec, calibration=job.inputs, method=method, observer=observer, inplace=True)


def _file(job: Job, model: nn.Module) -> Path:
    import s2d
    from s2d.export import example_of

    target = job.folder / "model.onnx"
    s2d.export(model, target, example=example_of(job.inputs), time_it=False, describe=False, force=True)
    return target


@way("w8a8-static", "the default for onnxruntime: Linears, tables of embeddings at 8 bits", file=True, beds=ENCODERS)
def w8a8(job: Job) -> Path:
    """`s2d quantize --for onnxruntime`."""
    return _file(job, _quantized(job, "w8a8"))


@way("w8a8-static", "Linears, ranges by squared error, simulated")
def w8a8_mse(job: Job) -> nn.Module:
    """As the others' rows."""
    return _quantized(job, "w8a8", observer="mse")


@way("w8a8-static", "Linears and attention, simulated", beds=ENCODERS)
def w8a8_attention(job: Job) -> nn.Module:
    """The default spec."""
    return _quantized(job, "w8a8", attention=True)


@way("w8a8-dynamic", "Linears, a range a token, simulated")
def w8a8_token(job: Job) -> nn.Module:
    """Rounded."""
    return _quantized(job, "w8a8-token")


GROUP = {"bits": 4, "granularity": "group-32"}


@way("w4a16", "Linears, int4 a channel, GPTQ, simulated")
def w4_channel(job: Job) -> nn.Module:
    """With data."""
    return _quantized(job, "w4a16", "gptq")


@way("w4a16", "Linears, int4 in groups of 32, simulated")
def w4_group(job: Job) -> nn.Module:
    """Rounded."""
    return _quantized(job, "w4a16", weight=GROUP)


@way("w4a16", "Linears, int4 in groups of 32, GPTQ, simulated")
def w4_group_gptq(job: Job) -> nn.Module:
    """With data."""
    return _quantized(job, "w4a16", "gptq", weight=GROUP)


@way("w4a8-static", "Linears, int4 a channel, squared error; tables at 4 or 8 bits", file=True, beds=ENCODERS)
def w4a8_file(job: Job) -> Path:
    """README's file."""
    return _file(job, _quantized(job, "w4a8", observer="mse"))


@way("w4a8-static", "Linears, int4 a channel, GPTQ, simulated")
def w4a8_gptq(job: Job) -> nn.Module:
    """With data."""
    return _quantized(job, "w4a8", "gptq")


@way("w4a8-dynamic", "Linears, int4 in groups of 32, a range a token, simulated")
def w4a8_token(job: Job) -> nn.Module:
    """Rounded."""
    return _quantized(job, "w4a8-token", weight=GROUP)


@way("w4a8-dynamic", "the same, GPTQ, simulated")
def w4a8_token_gptq(job: Job) -> nn.Module:
    """With data."""
    return _quantized(job, "w4a8-token", "gptq", weight=GROUP)


@way("w4a4-static", "Linears, rtn, min-max ranges, simulated")
def w4a4_minmax(job: Job) -> nn.Module:
    """The plainest."""
    return _quantized(job, "w4a4", observer="minmax")


@way("w4a4-static", "Linears, rtn, ranges by squared error, simulated")
def w4a4_mse(job: Job) -> nn.Module:
    """The recommended ranges."""
    return _quantized(job, "w4a4", observer="mse")


@way("w4a4-static", "Linears, GPTQ, simulated")
def w4a4_gptq(job: Job) -> nn.Module:
    """Its own ranges, by squared error."""
    return _quantized(job, "w4a4", "gptq")


@way("w4a4-static", "Linears, ERQ, simulated", beds=ENCODERS)
def w4a4_erq(job: Job) -> nn.Module:
    """Made for vision encoders."""
    return _quantized(job, "w4a4", "erq")


@way("w4a4-static", "Linears, rotation, GPTQ, simulated")
def w4a4_rotation(job: Job) -> nn.Module:
    """A rotation that stays in the model."""
    return _quantized(job, "w4a4", "rotation+gptq")


@way("w4a4-static", "Linears, ERQ, QwT, simulated", beds=ENCODERS)
def w4a4_qwt(job: Job) -> nn.Module:
    """A full-precision linear map a block stays in the model."""
    return _quantized(job, "w4a4", "erq+qwt")


@way("w4a4-dynamic", "Linears, a range a token, simulated")
def w4a4_token(job: Job) -> nn.Module:
    """Rounded."""
    return _quantized(job, "w4a4-token")


@way("w4a4-dynamic", "Linears, GPTQ, a range a token, simulated")
def w4a4_token_gptq(job: Job) -> nn.Module:
    """With data."""
    return _quantized(job, "w4a4-token", "gptq")
