"""The ladder: the order in which candidates are tried, cheap ones first; each rung uses the results of the rungs below.

Only candidates that the runtime's file allows are proposed. A rung is a function from the results so far to candidates;
to add one, add a row to `RUNGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2d.experiments.auto.candidates import Candidate, Scored
from s2d.export.runtime import Layer, Runtime
from s2d.quant import QuantSpec
from s2d.quant.allocate import Sensitivity
from s2d.quant.numerics.formats import IntFormat, get_format

OBSERVERS = ("minmax", "percentile", "mse")
ROUNDINGS = ("gptq", "erq", "repq")
BUDGETS = (7.0, 6.0, 5.0)
KEPT = (2, 4, 8)


@dataclass(frozen=True)
class View:
    """The results that a rung may use.

    Attributes:
        runtime: Where the file will run.
        scored: Candidates tried so far.
        tables: Bits of the embedding tables while weights are searched: the widest that the file rounds, 0 where the
            model has none.
        sensitivity: Measures at its first call the error of each stored width in each layer of a spec.
    """

    runtime: Runtime
    scored: Sequence[Scored]
    tables: int
    sensitivity: Callable[[QuantSpec, Sequence[int]], Sensitivity]

    def best(self, bits: int, *kinds: str) -> Scored | None:
        """The candidate of least error with this many bits for all weights, and the widest embedding tables.

        Args:
            bits: Bits of the weights.
            kinds: Allowed kinds of inputs: ``tensor`` (static), ``token``, ``keep``; empty for any.
        """

        def fits(each: Scored) -> bool:
            spec = each.candidate.spec
            same = spec.weight is not None and spec.weight.format.bits == bits and not spec.overrides
            return same and each.candidate.embeddings == self.tables and (not kinds or _kind(spec) in kinds)

        return min(filter(fits, self.scored), key=lambda each: each.error, default=None)


@dataclass(frozen=True)
class Rung:
    """One step of the ladder."""

    name: str
    about: str
    propose: Callable[[View], list[Candidate]]


def forms(runtime: Runtime, narrow: bool = False) -> list[QuantSpec]:
    """A spec for each kind of product of integers that a runtime has, attention in full precision.

    Args:
        runtime: The runtime.
        narrow: Take the narrowest stored weights instead of the widest.
    """
    found: list[QuantSpec] = []
    for layer in runtime.layers:
        stored = _weight_format(layer, runtime, narrow)
        if stored is None:
            continue
        granularity = "channel" if "channel" in layer.weights.granularity else layer.weights.granularity[0]
        size = f"-{layer.weights.groups[0]}" if granularity == "group" and layer.weights.groups else ""
        weight: dict[str, Any] = {"format": stored, "granularity": f"{granularity}{size}", "observer": "mse"}
        for kind in [None] if layer.inputs is None else layer.inputs.granularity:
            activation: Any = "keep"
            if layer.inputs is not None:
                widest = max(layer.inputs.formats, key=lambda name: get_format(name).bits)
                activation = {"format": widest, "granularity": kind}
            spec = QuantSpec.parse({"weight": weight, "activation": activation, "attention": "keep"})
            if spec not in found:
                found.append(spec)
    return found


def _weight_format(layer: Layer, runtime: Runtime, narrow: bool) -> str | None:
    """The widest, or the narrowest, stored integers that a product takes; None where its weights are no integers."""
    known = [each for name in layer.weights.formats if isinstance(each := get_format(name), IntFormat)]
    stored = [each for each in known if each.bits in runtime.weight_bits]
    found = (min if narrow else max)(stored, key=lambda each: each.bits, default=None)
    return None if found is None else found.name


def _kind(spec: QuantSpec) -> str:
    return "keep" if spec.activation is None else spec.activation.granularity


def first(runtime: Runtime, tables: int) -> Candidate:
    """The candidate before any search: the widest weights; inputs in full precision where that is legal, else with
    ranges per token, else with static ranges; embedding tables with this many bits.
    """
    order = ("keep", "token", "tensor")
    found = sorted(forms(runtime), key=lambda spec: order.index(_kind(spec)) if _kind(spec) in order else len(order))
    return Candidate(found[0], "rtn", tables, "first")


def _ranges(view: View) -> list[Candidate]:
    return [each for spec in forms(view.runtime) for each in _observed(spec, view.tables, "ranges")]


def _observed(spec: QuantSpec, tables: int, rung: str) -> list[Candidate]:
    """A spec with every way to find static ranges; weights keep theirs."""
    if _kind(spec) != "tensor" or spec.activation is None:
        return [Candidate(spec, "rtn", tables, rung)]
    return [
        Candidate(replace(spec, activation=replace(spec.activation, observer=observer)), "rtn", tables, rung)
        for observer in OBSERVERS
    ]


def _narrow(view: View) -> list[Candidate]:
    """Weights of 4 bits, with the ranges that were best at 8."""
    found = []
    for spec in forms(view.runtime, narrow=True):
        wide = view.best(max(view.runtime.weight_bits), "tensor") if _kind(spec) == "tensor" else None
        if wide is not None and spec.activation is not None and wide.candidate.spec.activation is not None:
            observer = wide.candidate.spec.activation.observer
            spec = replace(spec, activation=replace(spec.activation, observer=observer))
        found.append(Candidate(spec, "rtn", view.tables, "narrow weights"))
    return found


def _roundings(view: View) -> list[Candidate]:
    """Better rounding methods for the narrowest weights; with static ranges also methods that move ranges."""
    found = []
    for kind in ("tensor", "token", "keep"):
        best = view.best(min(view.runtime.weight_bits), kind)
        if best is not None:
            known = ROUNDINGS if kind == "tensor" else ROUNDINGS[:1]
            found += [replace(best.candidate, method=method, rung="roundings") for method in known]
    return found


def _mixed(view: View) -> list[Candidate]:
    """Mixed widths by the exact knapsack, at a few average widths."""
    widths = sorted(view.runtime.weight_bits)
    best = view.best(widths[0], "tensor") or view.best(widths[0], "token") or view.best(widths[0])
    if best is None:
        return []
    widths = _widths(view.runtime, best.candidate.spec)
    if len(widths) < 2:
        return []
    found = view.sensitivity(best.candidate.spec, widths)
    budgets = [bits for bits in BUDGETS if widths[0] < bits < widths[-1]]
    specs = {str(spec.to_dict()): spec for spec in (found.allocate(bits) for bits in budgets)}
    return [replace(best.candidate, spec=spec, rung="mixed widths") for spec in specs.values()]


def _widths(runtime: Runtime, spec: QuantSpec) -> list[int]:
    """The stored widths, ascending, that weights may have with the inputs of a spec."""
    assert spec.weight is not None
    widths = set()
    for layer in runtime.layers:
        inputs = spec.activation
        if inputs is None or layer.inputs is None:
            fits = inputs is None and layer.inputs is None
        else:
            fits = inputs.format.name in layer.inputs.formats and inputs.granularity in layer.inputs.granularity
        if fits and spec.weight.granularity in layer.weights.granularity:
            widths |= {get_format(name).bits for name in layer.weights.formats}
    return sorted(widths & set(runtime.weight_bits))


def _kept(view: View) -> list[Candidate]:
    """Inputs of the most sensitive layers in floating point, where the runtime lets layers differ."""
    best = view.best(max(view.runtime.weight_bits), "tensor")
    widest = max(view.runtime.weight_bits)
    if best is None or widest not in _widths(view.runtime, replace(best.candidate.spec, activation=None)):
        return []
    spec = best.candidate.spec
    found = view.sensitivity(spec, [widest])
    worst = sorted(found.layers, key=lambda layer: -layer.errors[widest])
    kept = QuantSpec(weight=spec.weight)
    return [
        replace(
            best.candidate,
            spec=replace(spec, overrides=tuple((layer.name, kept) for layer in worst[:count])),
            rung="kept inputs",
        )
        for count in KEPT
        if count < len(worst)
    ]


def _small_tables(view: View) -> list[Candidate]:
    """Narrower embedding tables for the best candidate of each width."""
    narrower = [bits for bits in view.runtime.embedding_bits if 0 < bits < view.tables]
    found = [view.best(bits, *kinds) for bits in view.runtime.weight_bits for kinds in (("tensor",), ())]
    mixed = min((s for s in view.scored if s.candidate.rung == "mixed widths"), key=lambda s: s.error, default=None)
    made = [
        replace(each.candidate, embeddings=bits, rung="small tables")
        for bits in narrower
        for each in (*found, mixed)
        if each is not None
    ]
    return list({each.key: each for each in made}.values())


RUNGS = (
    Rung(
        "ranges", "the widest weights; min-max, percentile and MSE ranges, ranges of every token, inputs kept", _ranges
    ),
    Rung("narrow weights", "the narrowest weights that are stored", _narrow),
    Rung("roundings", "GPTQ, ERQ and RepQ on the narrowest weights", _roundings),
    Rung("mixed widths", "widths per layer, by the exact knapsack", _mixed),
    Rung("kept inputs", "the worst layers' inputs in floating point", _kept),
    Rung("small tables", "tables of embeddings in 4 bits", _small_tables),
)
