"""ModelOpt (NVIDIA's): its fake quantizers, on the CPU."""

from __future__ import annotations

import copy
from typing import Any

from peers.contract import Job, way
from torch import nn

PACKAGE = "modelopt"


def _quantized(
    job: Job, weight: dict[str, Any], inputs: dict[str, Any] | None, algorithm: Any, norms: bool = False
) -> nn.Module:
    """Its presets quantize the inputs of norms as well, which no other library does; ``norms`` leaves that so."""
    import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]

    config: Any = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"] = weight
        if entry["quantizer_name"] == "*input_quantizer":
            entry.update({"cfg": inputs} if inputs else {"enable": False})
            if not inputs:
                entry.pop("cfg", None)
    for kind in ["nn.Conv2d"] + ["nn.LayerNorm"] * (not norms):
        config["quant_cfg"].append({"quantizer_name": "*", "parent_class": kind, "enable": False})
    config["algorithm"] = algorithm
    return job.replace(mtq.quantize(job.inner, config, job.calibrate))


def channel(bits: int) -> dict[str, Any]:
    """A scale a channel."""
    return {"num_bits": bits, "axis": 0}


def tensor(bits: int) -> dict[str, Any]:
    """A scale a tensor; symmetric, as all its integers are."""
    return {"num_bits": bits, "axis": None}


@way("w8a8-static", "INT8_DEFAULT_CFG: inputs of norms too, symmetric ranges by the maximum, simulated")
def w8a8(job: Job) -> nn.Module:
    """Its preset."""
    return _quantized(job, channel(8), tensor(8), "max", norms=True)


@way("w8a8-static", "INT8_SMOOTHQUANT_CFG: inputs of norms too, simulated")
def w8a8_smooth(job: Job) -> nn.Module:
    """Its preset for transformers."""
    return _quantized(job, channel(8), tensor(8), "smoothquant", norms=True)


@way("w8a8-static", "Linears only, int8 a channel, one symmetric range a tensor, simulated")
def w8a8_linears(job: Job) -> nn.Module:
    """Ranges by the maximum."""
    return _quantized(job, channel(8), tensor(8), "max")


@way("w4a16", "INT4_AWQ: int4 in blocks of 128, simulated")
def w4_awq(job: Job) -> nn.Module:
    """Its preset for weights."""
    return _quantized(job, {"num_bits": 4, "block_sizes": {-1: 128}}, None, {"method": "awq_lite", "alpha_step": 0.1})


@way("w4a8-static", "int4 a channel, one symmetric 8-bit range a tensor, simulated")
def w4a8(job: Job) -> nn.Module:
    """Ranges by the maximum."""
    return _quantized(job, channel(4), tensor(8), "max")


@way("w4a4-static", "int4 a channel, one symmetric range a tensor, ranges by the maximum, simulated")
def w4a4(job: Job) -> nn.Module:
    """The plainest."""
    return _quantized(job, channel(4), tensor(4), "max")


@way("w4a4-static", "the same, scales of weights by squared error, simulated")
def w4a4_mse(job: Job) -> nn.Module:
    """Its search of scales."""
    return _quantized(job, channel(4), tensor(4), {"method": "mse"})


@way("w4a4-static", "the same, SmoothQuant, simulated")
def w4a4_smooth(job: Job) -> nn.Module:
    """Its preset for transformers, at 4 bits."""
    return _quantized(job, channel(4), tensor(4), "smoothquant")
