"""The plan against what a model does: products that no site covers are listed, and sites that would never run are not.

A plan is made from modules; a model may use their weights without calling them (``F.linear(x, layer.weight)``), hold
them in one parameter for all experts, or compute them. The traced graph (`s2d.trace`) has every product with a weight,
so that none stays at full precision unseen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.graph_parts import Call
from s2d.models.tracing import trace, unwrapped
from s2d.quant.calibration.observe import Batches, find_attention
from s2d.quant.modules.sites import Site, plan, weight_name
from s2d.quant.spec import QuantSpec

# Products that nobody planned, as a share of all, above which a warning says so.
TELLING = 0.1
PRODUCTS = ("product", "convolution")


def planned(model: nn.Module, spec: QuantSpec, calibration: Iterable[Any] | Batches) -> list[Site]:
    """The plan that `quantize` executes: what the modules say, and what one traced forward adds to it.

    Args:
        model: A model without quantizers; changes nothing.
        spec: What to quantize.
        calibration: Batches; the first one is traced.

    Raises:
        InputError: As `plan` does, or the model cannot run the first batch.
    """
    batches = calibration if isinstance(calibration, Batches) else Batches(calibration)
    attention = spec.attention is not None or any(override.attention is not None for _, override in spec.overrides)
    sites = plan(model, spec, find_attention(model, batches) if attention else [])
    if unwrapped(model) is not model:  # its names are not those of the module inside
        return sites
    try:
        graph = trace(model, batches.first)
    except InputError as error:
        warnings.warn(f"products outside the plan are not listed, as no graph can be traced: {error}", stacklevel=2)
        return sites
    return covered(model, sites, graph)


def covered(model: nn.Module, sites: Sequence[Site], graph: Graph) -> list[Site]:
    """A plan with the sites that would never run kept, and the products without a site listed, each with its reason."""
    owners = {weight_name(model, site): site.module for site in sites if site.what == "weight" and site.shape}
    calls = [call for call in graph.calls if call.kind in PRODUCTS]
    bypassed = {
        owners[name]: call
        for call in calls
        if _bypasses(model, call, owners)
        for name in call.parameters
        if name in owners
    }
    found = [_kept(site, _reason(bypassed[site.module])) if site.module in bypassed else site for site in sites]
    unknown: dict[str, Call] = {}
    for call in calls:
        if not any(name in owners for name in call.parameters):
            unknown.setdefault(call.parameter, call)
    for name, call in unknown.items():
        shape = tuple(model.get_parameter(name).shape)
        found.append(Site(name.removesuffix(".weight"), "weight", None, "", "", _reason(call), shape))
    _tell(calls, {name for call in (*bypassed.values(), *unknown.values()) for name in call.parameters})
    return found


def _kept(site: Site, reason: str) -> Site:
    """The same site at full precision."""
    return replace(site, format=None, granularity="", observer="", reason=site.reason or reason, group=0, prefix=0)


def _bypasses(model: nn.Module, call: Call, owners: dict[str, str]) -> bool:
    """Whether a call uses a planned weight without its module (tied ones have several) being called."""
    mine = {owners[name] for name in call.parameters if name in owners}
    # Torch's attention reads its projections itself, and a quantized one does so through their quantizers.
    parents = [model.get_submodule(owner.rpartition(".")[0]) for owner in mine]
    return call.module not in mine and not any(isinstance(parent, nn.MultiheadAttention) for parent in parents)


def _reason(call: Call) -> str:
    if call.experts:
        return "one parameter for all experts, in which no quantizer can sit yet"
    if not call.plain:
        return "the weight is computed from this parameter, and no quantizer can sit in between yet"
    return f"{call.module_class} uses this weight without calling its module, so a quantizer there would never run"


def _tell(calls: Sequence[Call], left: set[str]) -> None:
    total = sum(call.flops for call in calls)
    mine = [call for call in calls if left & set(call.parameters)]
    share = sum(call.flops for call in mine) / total if total else 0.0
    if share > TELLING:
        names = list(dict.fromkeys(call.parameter for call in mine))
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        warnings.warn(
            f"{share:.0%} of the products stay at full precision, in weights that cannot be quantized yet: "
            f"{', '.join(names[:2])}{more}; the plan (--dry-run) lists them with the reason",
            stacklevel=2,
        )
