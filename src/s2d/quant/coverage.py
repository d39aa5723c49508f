"""Check the plan against a traced forward: list products without a site, and plan no quantizer that would never run.

A plan is made from modules; a model may use their weights without calling them (``F.linear(x, layer.weight)``), hold
them in one parameter for all experts, or compute them. The traced graph (`s2d.trace`) has every product with a weight,
so that each product at full precision is listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from s2d.models.graph import Graph
from s2d.models.graph_parts import Call
from s2d.models.tracing import unwrapped
from s2d.quant.calibration.observe import Batches, traced
from s2d.quant.modules.products import KEPT, attention_flops, other_products
from s2d.quant.modules.sites import Site, plan, refuse_quantized, weight_name
from s2d.quant.spec import QuantSpec

# The share of unplanned products above which a warning is given.
TELLING = 0.1
PRODUCTS = ("product", "convolution")


def planned(
    model: nn.Module, spec: QuantSpec, calibration: Iterable[Any] | Batches, graph: Graph | None = None
) -> list[Site]:
    """The plan that `quantize` executes: from the modules, completed by one traced forward.

    Args:
        model: A model without quantizers; changes nothing. Data parallelism and compilation are looked through.
        spec: What to quantize.
        calibration: Batches; the first one is traced.
        graph: The graph of the first batch, if it has been traced.

    Raises:
        InputError: As `plan` does, or the model cannot run the first batch.
    """
    model = unwrapped(model)
    refuse_quantized(model)
    if graph is None:
        batches = calibration if isinstance(calibration, Batches) else Batches(calibration)
        graph = traced(model, batches)
    return covered(model, plan(model, spec, graph), graph)


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
    others = other_products(model, graph)
    for name in others:
        what = f"{type(model.get_submodule(name)).__name__} multiplies two activations in what is no attention"
        found.append(Site(name, "input", None, "", "", f"{what}; no quantizer can sit there yet"))
    left = {call.parameter: 0 for call in (*bypassed.values(), *unknown.values())}
    for call in calls:
        if call.parameter in left:
            left[call.parameter] += call.flops
    kept = {site.module for site in sites if KEPT in site.reason}
    _tell(graph.flops, left | {name: attention_flops(graph, name) for name in kept} | others)
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


def _tell(total: int, left: dict[str, int]) -> None:
    """Warn of products that cannot be quantized yet, by name, if there are many."""
    share = sum(left.values()) / total if total else 0.0
    if share > TELLING:
        names = sorted(left, key=lambda name: -left[name])
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        warnings.warn(
            f"{share:.0%} of the products stay at full precision, in places that cannot be quantized yet: "
            f"{', '.join(names[:2])}{more}; the plan (--dry-run) lists them with the reason",
            stacklevel=2,
        )
