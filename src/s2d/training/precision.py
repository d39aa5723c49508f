"""Precision of a training's products: the faster one on a device, measured once per process.

bfloat16 halves the time of a product where the hardware has it and takes up to twelve times as long where it is
emulated. A device's speed is not looked up by name but timed: forward and backward of a Linear, the best of a few.
"""

from __future__ import annotations

import functools
import time
import warnings
from typing import Literal, TypeAlias

import torch
from torch import nn

from s2d.distributed import processes

Precision: TypeAlias = Literal["fp32", "bf16"]

# bf16 rounds more, so it must be clearly faster; this also avoids a decision by noise of the clock.
GAIN = 1.2
_ROWS, _INPUTS, _OUTPUTS, _TRIES = 256, 384, 1536, 3


def resolved(precision: Literal["fp32", "bf16", "auto"], place: torch.device) -> Precision:
    """The precision itself, or for ``"auto"`` the faster one; the same in all processes.

    Warns where bf16 was asked for and the CPU emulates it.
    """
    if precision == "auto":
        processes.meet(place.type == "cpu")
        return processes.as_first(faster(place))
    if precision == "bf16" and place.type == "cpu" and not _multiplies_bfloat16():
        warnings.warn(
            "this CPU has no bfloat16 products: precision=bf16 is emulated here and many times slower than fp32; "
            "precision=auto takes what is faster",
            stacklevel=3,
        )
    return precision


def faster(place: torch.device) -> Precision:
    """``"bf16"`` where it is `GAIN` times as fast as fp32 on a device, else ``"fp32"``."""
    return "bf16" if speedup(place.type, place.index) >= GAIN else "fp32"


@functools.cache
def speedup(kind: str, index: int | None = None) -> float:
    """Time of a training's product in fp32 divided by that in bf16, on a device."""
    place = torch.device(kind) if index is None else torch.device(kind, index)
    weight = torch.full((_OUTPUTS, _INPUTS), 0.5, device=place, requires_grad=True)  # uses no random numbers
    x = torch.ones(_ROWS, _INPUTS, device=place, requires_grad=True)

    def seconds(half: bool) -> float:
        started = time.perf_counter()
        with torch.enable_grad(), torch.autocast(kind, torch.bfloat16, enabled=half):
            total = nn.functional.linear(x, weight).sum()
        torch.autograd.grad(total, [x, weight])[0].sum().item()  # reading the number waits for the computation
        return time.perf_counter() - started

    fp32, bf16 = (min(seconds(half) for _ in range(_TRIES)) for half in (False, True))
    return fp32 / bf16


def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has bf16 products on this CPU; True without oneDNN in torch, so that no warning is given."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
