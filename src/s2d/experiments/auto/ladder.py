"""The ladder: ways to make a file, from cheap to dear.

Only candidates that the runtime's file allows are proposed. A rung is a function from the results so far to candidates;
to add one, add a row to `RUNGS`. Which candidate is tried next is decided by its forecast, not by its rung.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2d.experiments.auto.candidates import Candidate
from s2d.export.runtime import Layer, Runtime
from s2d.quant import QuantSpec
from s2d.quant.allocate import Sensitivity
from s2d.quant.numerics.formats import IntFormat, get_format

OBSERVERS = ("minmax", "percentile", "mse")
ROUNDINGS = ("gptq", "erq", "repq")
EQUALIZED = ("smoothquant", "smoothquant+gptq")  # static inputs; large channels move into the weights
PRODUCTS = ("rotation+gptq", "svdquant+gptq")  # rotations, or a branch of low rank, in every forward
BUDGETS = (7.0, 6.5, 6.0, 5.5, 5.0, 4.5)
KEPT = (1, 2, 4, 8)


@dataclass(frozen=True)
class View:
    """What a rung may use.

    Attributes:
        runtime: Where the file will run.
        tables: Bits of the embedding tables while weights are searched: the widest that the file rounds, 0 where the
            model has none.
        legal: Whether a spec fits the model and the runtime.
        error: Divergence of a candidate: measured where it was tried, else predicted.
        sensitivity: The error of each width in each layer of a spec, from the scores.
        worst: The layers of a spec whose inputs cost most, worst first.
    """

    runtime: Runtime
    tables: int
    legal: Callable[[QuantSpec], bool]
    error: Callable[[Candidate], float]
    sensitivity: Callable[[QuantSpec, Sequence[int]], Sensitivity]
    worst: Callable[[QuantSpec], Sequence[str]]

    def forms(self, narrow: bool = False) -> list[QuantSpec]:
        """The forms that fit."""
        return [spec for spec in forms(self.runtime, narrow) if self.legal(spec)]

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The candidate of least error."""
        return min(candidates, key=self.error)


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


def first(runtime: Runtime, tables: int, legal: Callable[[QuantSpec], bool] = lambda spec: True) -> Candidate:
    """The candidate before any search: the widest weights; inputs in full precision where that is legal, else with
    ranges per token, else with static ranges; embedding tables with this many bits.
    """
    order = ("keep", "token", "tensor")
    found = sorted(forms(runtime), key=lambda spec: order.index(_kind(spec)) if _kind(spec) in order else len(order))
    return Candidate(next((spec for spec in found if legal(spec)), found[0]), "rtn", tables, "first")


def observed(spec: QuantSpec) -> list[QuantSpec]:
    """A spec with every way to find static ranges; weights keep theirs."""
    if _kind(spec) != "tensor" or spec.activation is None:
        return [spec]
    return [replace(spec, activation=replace(spec.activation, observer=observer)) for observer in OBSERVERS]


def scored_specs(runtime: Runtime) -> list[QuantSpec]:
    """The specs whose sites are scored: with them, every candidate that rounds to nearest."""
    return [each for narrow in (False, True) for spec in forms(runtime, narrow) for each in observed(spec)]


def _ranges(view: View) -> list[Candidate]:
    return [Candidate(each, "rtn", view.tables, "ranges") for spec in view.forms() for each in observed(spec)]


def _narrow(view: View) -> list[Candidate]:
    """The narrowest weights, for each kind of inputs with the ranges of least error."""
    if min(view.runtime.weight_bits) == max(view.runtime.weight_bits):
        return []
    kinds = [
        [Candidate(each, "rtn", view.tables, "narrow weights") for each in observed(spec)]
        for spec in view.forms(narrow=True)
    ]
    return [view.best(candidates) for candidates in kinds]


def _roundings(view: View) -> list[Candidate]:
    """Better roundings of the narrowest weights; with static ranges also methods that move ranges."""
    return [
        replace(each, method=method, rung="roundings")
        for each in _narrow(view) or _static(view)
        for method in (ROUNDINGS if _kind(each.spec) == "tensor" else ROUNDINGS[:1])
    ]


def _equalized(view: View) -> list[Candidate]:
    """Equalized channels, for static inputs of wide and narrow weights."""
    wide = [replace(each, method=EQUALIZED[0], rung="equalize") for each in _static(view)]
    narrow = [each for each in _narrow(view) if _kind(each.spec) == "tensor"]
    return [*wide, *(replace(each, method=EQUALIZED[1], rung="equalize") for each in narrow)]


def _static(view: View) -> list[Candidate]:
    """The widest weights with static inputs, with the ranges of least error."""
    found = [each for each in _ranges(view) if _kind(each.spec) == "tensor"]
    return [view.best(found)] if found else []


def _products(view: View) -> list[Candidate]:
    """Methods that add products to every forward."""
    return [replace(each, method=method, rung="products") for each in _narrow(view) for method in PRODUCTS]


def _mixed(view: View) -> list[Candidate]:
    """Mixed widths by the exact knapsack, at a few average widths, for each kind of inputs."""
    found = {}
    for best in _narrow(view):
        widths = _widths(view.runtime, best.spec)
        if len(widths) < 2:
            continue
        known = view.sensitivity(best.spec, widths)
        for bits in (bits for bits in BUDGETS if widths[0] < bits < widths[-1]):
            made = Candidate(known.allocate(bits), "gptq", view.tables, "mixed widths")
            found[made.key] = made
    return list(found.values())


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
    """Inputs of the worst layers in floating point, where the runtime lets layers differ."""
    found = []
    for best in _static(view):
        if max(view.runtime.weight_bits) not in _widths(view.runtime, replace(best.spec, activation=None)):
            continue
        worst, kept = view.worst(best.spec), QuantSpec(weight=best.spec.weight)
        for count in (count for count in KEPT if count < len(worst)):
            spec = replace(best.spec, overrides=tuple((name, kept) for name in worst[:count]))
            found.append(replace(best, spec=spec, rung="kept inputs"))
    return found


def _small_tables(view: View) -> list[Candidate]:
    """Narrower embedding tables with everything else."""
    narrower = [bits for bits in view.runtime.embedding_bits if 0 < bits < view.tables]
    others = [each for rung in RUNGS if rung.propose is not _small_tables for each in rung.propose(view)]
    return [replace(each, embeddings=bits, rung="small tables") for bits in narrower for each in others]


RUNGS = (
    Rung(
        "ranges", "the widest weights; min-max, percentile and MSE ranges, ranges of every token, inputs kept", _ranges
    ),
    Rung("narrow weights", "the narrowest weights that are stored", _narrow),
    Rung("equalize", "large channels moved into the weights (smoothquant)", _equalized),
    Rung("roundings", "GPTQ, ERQ and RepQ", _roundings),
    Rung("products", "rotations and branches of low rank (svdquant), which add products to the file", _products),
    Rung("mixed widths", "widths per layer, by the exact knapsack", _mixed),
    Rung("kept inputs", "the worst layers' inputs in floating point", _kept),
    Rung("small tables", "tables of embeddings in 4 bits", _small_tables),
)
