"""Quantizing models: put calibrated quantizers at the sites of a model, take them out, store and restore."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from s2d.distributed.sharding import Groups, all_ranks, in_common, is_dtensor
from s2d.errors import InputError
from s2d.models.running import outside_inference_mode
from s2d.models.saved import fingerprint
from s2d.models.tracing import unwrapped
from s2d.quant.calibration.observe import Batches, Job, Protocol, traced
from s2d.quant.calibration.resume import Snapshot, Store, fingerprint_batches
from s2d.quant.calibration.stack_ranges import set_stack_ranges
from s2d.quant.coverage import planned
from s2d.quant.estimate import Estimate, estimate
from s2d.quant.modules.record import Record, record, remove, switch_on
from s2d.quant.modules.sites import Site, decide, describe, insert, is_quantized, plan, refuse_quantized
from s2d.quant.modules.storage import load, save
from s2d.quant.numerics.formats import IntFormat
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.ptq import Entry, get_methods, methods, refuse_undivided
from s2d.quant.spec import QuantSpec

__all__ = [
    "Estimate",
    "QuantSpec",
    "Record",
    "Site",
    "describe",
    "estimate",
    "get_methods",
    "is_quantized",
    "load",
    "methods",
    "plan",
    "planned",
    "quantize",
    "quantize_loaded",
    "record",
    "refuse_undivided",
    "remove",
    "save",
]


@outside_inference_mode()
def quantize(
    model: nn.Module,
    spec: str | Mapping[str, Any] | QuantSpec,
    *,
    calibration: Iterable[Any],
    method: str = "rtn",
    observer: str | None = None,
    protocol: str = "own",
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    inplace: bool = False,
    shared: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Quantize a model after training; low bits are simulated: values are rounded, products stay in floating point.

    Args:
        model: Any module. State-dict keys stay the same; the quantizers' scales and zero points are added. From a
            data-parallel or compiled model the inner module is quantized and returned.
        spec: ``"w4a4"``, a mapping (see `s2d.quant.spec`), or a `QuantSpec`.
        calibration: Batches: dicts of keyword arguments, tensors, or tuples of positional arguments. Tokens that a
            batch's ``attention_mask`` hides do not count. A generator is enough for methods that read the data once.
        method: A name from `methods`, or several joined, ``"rotation+gptq"``: transforms, then one rounding (``rtn``
            when none is named), then corrections, which hold a copy of the model while they work.
        observer: The calibrator for activations, in place of the spec's own: ``"minmax"``, ``"percentile"``,
            ``"percentile:99.99"`` or ``"mse"``; see `QuantSpec.with_observer`.
        protocol: ``"own"``: ranges and defaults as each method's authors published them. ``"unified"``: the ranges of
            the spec's observers on the full-precision model, the same for every method, so that methods compare.
        seed: Seed of all random numbers in the method.
        resume: A folder that keeps every finished block, for methods that go block by block. The same call with the
            same folder continues an interrupted one; the result is bit-identical.
        inplace: Quantize this very model instead of a copy. A failed call leaves it as it was (for which methods
            that change weights hold a copy of them).
        shared: Under torchrun: every rank calls this with the same model and its own share of the calibration batches,
            and gets the same quantized model. The statistics of the data (extremes, counts, Hessians) are reduced over
            the ranks.
        progress: Show progress bars.

    Returns:
        The quantized model, in the mode (training or evaluation) it had.

    Raises:
        InputError: The model, the spec or the data cannot be used; the message names the fault and the remedy.
    """
    return _quantize(
        model, spec, calibration, method, observer, protocol, seed, resume, "snapshot" if inplace else "copy", shared,
        progress,
    )  # fmt: skip


@outside_inference_mode()
def quantize_loaded(
    model: nn.Module,
    spec: str | Mapping[str, Any] | QuantSpec,
    *,
    calibration: Iterable[Any],
    method: str = "rtn",
    protocol: str = "own",
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    shared: bool = False,
    progress: bool = False,
) -> nn.Module:
    """`quantize` in place, for a model that nobody needs after a failed call: no copy of the weights is held."""
    return _quantize(model, spec, calibration, method, None, protocol, seed, resume, "nothing", shared, progress)


def _quantize(
    model: nn.Module,
    spec: str | Mapping[str, Any] | QuantSpec,
    calibration: Iterable[Any],
    method: str,
    observer: str | None,
    protocol: str,
    seed: int,
    resume: str | os.PathLike[str] | None,
    held: Literal["copy", "snapshot", "nothing"],
    shared: bool,
    progress: bool,
) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(f"quantize needs a torch module, not {type(model).__name__}; load the model first")
    if protocol not in get_args(Protocol):
        raise InputError(f"unknown protocol {protocol!r}; use own or unified")
    parsed = QuantSpec.parse(spec)
    if observer is not None:
        parsed = parsed.with_observer(observer)
    entries = get_methods(method)
    name = "+".join(entry.name for entry in entries)
    model = unwrapped(model)
    refuse_quantized(model)
    ranks = _ranks(model, entries, resume) if shared else ()
    batches = Batches(calibration)
    decide(model, parsed)  # a spec that does not fit the modules fails before any work
    graph = traced(model, batches)
    decided = planned(model, parsed, batches, graph, name)
    store = None if resume is None else Store(resume, _belongs(model, parsed, batches, name, protocol, seed))
    snapshot = Snapshot(model) if held == "snapshot" and name != "rtn" else None
    if held == "copy":
        model = copy.deepcopy(model)
    quantizers = insert(model, decided)
    job = Job(
        model, parsed, decided, quantizers, batches, seed, progress, name, cast(Protocol, protocol), store, ranks=ranks,
        traced=graph,
    )  # fmt: skip
    try:
        for entry in entries:
            if entry.stage == "rounding" and entries[-1].stage == "correction":
                job.original = copy.deepcopy(model)
            job.stage = entry.stage
            if entry.stage == "rounding":
                set_stack_ranges(job)
            entry.method(job)
        _check_powers(quantizers, name)
    except BaseException:
        remove(model)
        if snapshot is not None:
            snapshot.restore()
        raise
    switch_on(model, Record(parsed, name, tuple(decided)))
    return model


def _check_powers(quantizers: Mapping[Site, Quantizer], method: str) -> None:
    """Refuse a method that multiplies scales by what is no power of two where the format has no others."""
    for site, quantizer in quantizers.items():
        powers = isinstance(quantizer.format, IntFormat) and quantizer.format.power_of_two and not quantizer.dynamic
        if powers and bool((torch.frexp(quantizer.scale).mantissa != 0.5).any()):
            raise InputError(
                f"{site.name}: {method} finds scales off the powers of two of {quantizer.format.name}; use rtn"
            )


def _ranks(model: nn.Module, entries: Sequence[Entry], resume: str | os.PathLike[str] | None) -> Groups:
    """The processes that share the data; methods and options that cannot share them are refused first."""
    refuse_undivided(entries)
    if resume is not None:
        raise InputError("resume keeps the blocks of one process; leave it out, or quantize in one process")
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise InputError("the weights are sharded (DTensors), and each rank needs all of them here; gather them first")
    ranks = all_ranks(model)
    if not in_common([fingerprint(model)], ranks):
        raise InputError("the ranks hold different models; load the same one on each")
    return ranks


def _belongs(
    model: nn.Module, spec: QuantSpec, batches: Batches, method: str, protocol: str, seed: int
) -> dict[str, str]:
    """What the kept work of an interrupted call depends on."""
    return {
        "spec": json.dumps(spec.to_dict()),
        "method": method,
        "protocol": protocol,
        "seed": str(seed),
        "model": fingerprint(model),
        "calibration data": fingerprint_batches(batches),
    }
