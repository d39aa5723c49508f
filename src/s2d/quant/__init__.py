"""Quantizing models: put calibrated quantizers at the sites of a model, take them out, store and restore."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from s2d.errors import InputError
from s2d.quant.calibration import Batches, Job, find_attention
from s2d.quant.ptq import get_method, methods
from s2d.quant.sites import Site, describe, insert, is_quantized, plan, refuse_quantized
from s2d.quant.spec import QuantSpec
from s2d.quant.state import Record, record, remove, switch_on
from s2d.quant.storage import load, save

__all__ = [
    "QuantSpec",
    "Record",
    "Site",
    "describe",
    "is_quantized",
    "load",
    "methods",
    "plan",
    "quantize",
    "record",
    "remove",
    "save",
]


def quantize(
    model: nn.Module,
    spec: str | Mapping[str, Any] | QuantSpec,
    *,
    calibration: Iterable[Any],
    method: str = "rtn",
    observer: str | None = None,
    seed: int = 0,
    inplace: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Quantize a model after training: values are rounded to what their codes can hold, computing stays as it was.

    Args:
        model: Any module. State-dict keys stay the same; the quantizers' scales and zero points are added.
        spec: ``"w4a4"``, a mapping (see `s2d.quant.spec`), or a `QuantSpec`.
        calibration: Batches: dicts of keyword arguments, tensors, or tuples of positional arguments. Tokens that a
            batch's ``attention_mask`` hides do not count. A generator will do for methods that read the data once.
        method: A name out of `methods`.
        observer: The calibrator for activations, in place of the spec's own: ``"minmax"``, ``"percentile"``,
            ``"percentile:99.99"`` or ``"mse"``; see `QuantSpec.with_observer`.
        seed: Of everything random in the method.
        inplace: Quantize this very model instead of a copy. A failed call leaves it as it was.
        progress: Show progress bars.

    Returns:
        The quantized model, in the mode (training or evaluation) it had.

    Raises:
        InputError: Anything wrong with the model, the spec or the data; the message names it and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"quantize needs a torch module, not {type(model).__name__}; load the model first")
    parsed = QuantSpec.parse(spec)
    if observer is not None:
        parsed = parsed.with_observer(observer)
    run_method = get_method(method)
    refuse_quantized(model)
    batches = Batches(calibration)
    seen = find_attention(model, batches) if _wants_attention(parsed) else []
    decided = plan(model, parsed, seen)
    if not inplace:
        model = copy.deepcopy(model)
    quantizers = insert(model, decided)
    try:
        run_method(Job(model, parsed, decided, quantizers, batches, seed, progress))
    except BaseException:
        remove(model)
        raise
    switch_on(model, Record(parsed, method, tuple(decided)))
    return model


def _wants_attention(spec: QuantSpec) -> bool:
    return spec.attention is not None or any(override.attention is not None for _, override in spec.overrides)
