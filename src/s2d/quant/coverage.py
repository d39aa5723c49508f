"""Check the plan against a traced forward: list products without a site, and plan no quantizer that would never run.

A plan is made from modules; a model may use their weights without calling them (``F.linear(x, layer.weight)``), or
compute them. The traced graph (`s2d.trace`) has every product with a weight,
so that each product at full precision is listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from s2d.models.graph import Graph
from s2d.models.graph_parts import Call
from s2d.models.tracing import unwrapped
from s2d.quant.calibration.observe import Batches, traced
from s2d.quant.modules.products import KEPT, attention_flops, other_products
from s2d.quant.modules.sites import MORE, TURNED, Site, plan, refuse_quantized, weight_name
from s2d.quant.ptq import refuse_unfit
from s2d.quant.spec import QuantSpec

# The share of products that cannot be quantized above which a warning is given.
TELLING = 0.1
_STUCK = ("no quantizer can sit", "would never run", "already", KEPT, MORE, TURNED)  # in the reasons of such sites
PRODUCTS = ("product", "convolution")


def planned(
    model: nn.Module,
    spec: QuantSpec,
    calibration: Iterable[Any] | Batches,
    graph: Graph | None = None,
    method: str = "rtn",
) -> list[Site]:
    """The plan that `quantize` executes: from the modules, completed by one traced forward.

    Args:
        model: A model without quantizers; changes nothing. Data parallelism and compilation are looked through.
        spec: What to quantize.
        calibration: Batches; the first one is traced.
        graph: The graph of the first batch, if it has been traced.
        method: As for `quantize`.

    Raises:
        InputError: As `plan` does, the model cannot run the first batch, or the method cannot work on it.
    """
    model = unwrapped(model)
    refuse_quantized(model)
    if graph is None:
        batches = calibration if isinstance(calibration, Batches) else Batches(calibration)
        graph = traced(model, batches)
    sites = covered(model, plan(model, spec, graph), graph)
    refuse_unfit(method, model, sites, graph)
    return sites


def covered(model: nn.Module, sites: Sequence[Site], graph: Graph) -> list[Site]:
    """A plan with the sites that would never run kept, and the products without a site listed, each with its reason
    and its share of the products.
    """
    owners = {weight_name(model, site): site for site in sites if site.what == "weight" and site.shape}
    calls = [call for call in graph.calls if call.kind in PRODUCTS]
    bypassed = {
        owners[name].module: call
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
    flops = {site: _flops(graph, site, others) for site in found if site.format is None}
    _tell(graph.flops, {site.module: n for site, n in flops.items() if n and any(why in site.reason for why in _STUCK)})
    return [_with_share(site, flops.get(site, 0), graph.flops) for site in found]


def _flops(graph: Graph, site: Site, others: Mapping[str, int]) -> int:
    """Floating-point operations of the products that a kept site keeps; those of an attention are at its ``q``."""
    if site.what == "q":
        return attention_flops(graph, site.module)
    if site.what != "weight":
        return others.get(site.module, 0) if "no quantizer" in site.reason else 0
    names = {f"{site.module}{end}".lstrip(".") for end in ("", ".weight", ".in_proj_weight")}
    return sum({c.operation: c.flops for c in graph.products if not names.isdisjoint(c.parameters)}.values())


def _with_share(site: Site, flops: int, total: int) -> Site:
    return replace(site, reason=f"{site.reason} ({flops / total:.1%} of the products)") if flops else site


def _kept(site: Site, reason: str) -> Site:
    """The same site at full precision."""
    return replace(site, format=None, granularity="", observer="", reason=site.reason or reason, group=0, prefix=0)


def _bypasses(model: nn.Module, call: Call, owners: dict[str, Site]) -> bool:
    """Whether a call uses a planned weight without its module (tied ones have several) being called."""
    mine = {owners[name].owner for name in call.parameters if name in owners}
    # Torch's attention reads its projections itself, and a quantized one does so through their quantizers.
    parents = [model.get_submodule(owner.rpartition(".")[0]) for owner in mine]
    return call.module not in mine and not any(isinstance(parent, nn.MultiheadAttention) for parent in parents)


def _reason(call: Call) -> str:
    if call.experts and call.summed == 0:
        return "a parameter of three dimensions that is no stack of matrices, in which no quantizer can sit yet"
    if not call.plain:
        return "the weight is computed from this parameter, and no quantizer can sit in between yet"
    if call.module in {name.rpartition(".")[0] for name in call.parameters}:
        return f"a parameter that {call.module_class} multiplies by itself; no quantizer can sit there yet"
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
