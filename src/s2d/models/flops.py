"""Multiplications and additions of one product, 2 a multiply-add, as `torch.utils.flop_counter` counts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from s2d.models.operations import ADDED, CONVOLUTIONS, FUSED_ATTENTION, GROUPED, PRODUCTS


def flops_of(name: str, tensors: Sequence[Tensor], outs: Sequence[Tensor], kwargs: Any, args: Any) -> int:
    """FLOPs of an operation; 0 for all that multiply no matrices."""
    if name in GROUPED:
        rows = tensors[0].shape[0]
        return 2 * rows * tensors[1].shape[-2] * tensors[1].shape[-1]
    if name in PRODUCTS:
        factors = [t for i, t in enumerate(tensors) if i != ADDED.get(name)]
        return 2 * outs[0].numel() * factors[0].shape[-1]
    if name in CONVOLUTIONS:
        x, weight = tensors[0], tensors[1]
        positions = x if args[6] else outs[0]  # a transposed one goes over its input
        return 2 * len(x) * math.prod(positions.shape[2:]) * weight.numel()
    if name in FUSED_ATTENTION and len(tensors) > 2:
        q, k, v = tensors[:3]
        return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    return 0
