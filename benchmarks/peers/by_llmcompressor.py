"""llm-compressor: `oneshot` on the transformers model inside the task's."""

from __future__ import annotations

from typing import Any

from peers.contract import Job, way
from torch import nn

PACKAGE = "llmcompressor"


def _oneshot(job: Job, *recipe: Any) -> nn.Module:
    from llmcompressor import oneshot
    from loguru import logger
    from torch.utils.data import DataLoader

    logger.remove()  # a line for every layer
    data: Any = job.inputs
    oneshot(model=job.inner, recipe=list(recipe), dataset=DataLoader(data, batch_size=None), pipeline="basic")
    return job.model.eval()


def _scheme(scheme: Any) -> dict[str, Any]:
    return {"scheme": scheme} if isinstance(scheme, str) else {"config_groups": {"linears": scheme}}


def _rounded(job: Job, scheme: Any) -> nn.Module:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return _oneshot(job, QuantizationModifier(targets="Linear", **_scheme(scheme)))


def _gptq(job: Job, scheme: Any) -> nn.Module:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _oneshot(job, GPTQModifier(targets="Linear", **_scheme(scheme)))


def _bits(weights: int, bits: int = 0, group: int = 0, **activations: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    shape: dict[str, Any] = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    given = QuantizationArgs(num_bits=bits, symmetric=False, **activations) if bits else None
    weight = QuantizationArgs(num_bits=weights, symmetric=True, **shape)
    return QuantizationScheme(targets=["Linear"], weights=weight, input_activations=given)


TOKEN = {"strategy": "token", "dynamic": True}
TENSOR = {"strategy": "tensor", "dynamic": False}


@way("w8a8-dynamic", "W8A8: int8 a channel, int8 a token")
def w8a8(job: Job) -> nn.Module:
    """Its preset."""
    return _rounded(job, "W8A8")


@way("w8a8-static", "int8 a channel, one range a tensor, simulated")
def w8a8_static(job: Job) -> nn.Module:
    """Ranges by its min-max."""
    return _rounded(job, _bits(8, 8, **TENSOR))


@way("w4a16", "W4A16: int4 in groups of 128")
def w4(job: Job) -> nn.Module:
    """Its preset, rounded."""
    return _rounded(job, "W4A16")


@way("w4a16", "W4A16: int4 in groups of 128, GPTQ")
def w4_gptq(job: Job) -> nn.Module:
    """Its preset, as its README does."""
    return _gptq(job, "W4A16")


@way("w4a16", "int4 in groups of 32, GPTQ")
def w4_group(job: Job) -> nn.Module:
    """The groups of the other libraries."""
    return _gptq(job, _bits(4, group=32))


@way("w4a8-dynamic", "int4 in groups of 32, int8 a token")
def w4a8(job: Job) -> nn.Module:
    """The groups of the other libraries."""
    return _rounded(job, _bits(4, 8, group=32, **TOKEN))


@way("w4a8-static", "int4 a channel, one 8-bit range a tensor, simulated")
def w4a8_static(job: Job) -> nn.Module:
    """Ranges by its min-max."""
    return _rounded(job, _bits(4, 8, **TENSOR))


@way("w4a4-dynamic", "int4 a channel, int4 a token, simulated")
def w4a4_token(job: Job) -> nn.Module:
    """Rounded; it has no preset for this."""
    return _rounded(job, _bits(4, 4, **TOKEN))


@way("w4a4-static", "int4 a channel, one range a tensor, simulated")
def w4a4_tensor(job: Job) -> nn.Module:
    """Ranges by its min-max."""
    return _rounded(job, _bits(4, 4, **TENSOR))


@way("w4a4-static", "int4 a channel by GPTQ, one range a tensor, simulated")
def w4a4_gptq(job: Job) -> nn.Module:
    """Ranges by its min-max."""
    return _gptq(job, _bits(4, 4, **TENSOR))
