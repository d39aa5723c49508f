"""Bit allocation: bits per layer, from the change of the model's output when that layer alone is quantized.

For every layer and every width, only that layer (its weight, and its input unless told otherwise) is quantized and the
calibration data are run through: the error is that of the model's output, ``sum |y - y_fp|^2 / sum |y_fp - mean|^2``,
or the rise of a loss. The errors of layers are assumed to add up, so the choice is a knapsack problem:

    minimise  sum_l error_l(b_l)    subject to  sum_l n_l b_l <= budget * sum_l n_l         n_l weights in layer l

solved exactly by dynamic programming over the layers (after division by the greatest common divisor of the sizes; where
that leaves too many units, sizes are rounded up to coarser ones, so that the budget holds all the same). Layers side by
side that read one activation (q, k and v; gate and up) get one width: runtimes run them as one product.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor, nn

from s2d import quant
from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.masks import token_mask
from s2d.models.running import evaluating, main_output, real_tokens, run
from s2d.models.walks import source_of
from s2d.quant.calibration.observe import Batches, Job, traced
from s2d.quant.modules.sites import Site, insert
from s2d.quant.numerics.formats import IntFormat, integer_format
from s2d.quant.numerics.quantizer import Quantizer, switched_on
from s2d.quant.ptq.rtn import rtn
from s2d.quant.spec import QuantSpec, TensorSpec

CHOICES = (3, 4, 6, 8)
_MOST_UNITS = 200_000
_EXPLAINED = 6
_HOPELESS = 1e12  # stands for an infinite error, so that sums and shares stay finite

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class LayerCost:
    """The error that low bits in one layer cause.

    Attributes:
        name: Dotted name of the module.
        weights: Number of its weights.
        errors: Error of the whole model for each width; it never rises with the bits.
        parts: At the lowest width, the error of its weight alone and of its input alone; None where not measured.
    """

    name: str
    weights: int
    errors: Mapping[int, float]
    parts: tuple[float, float] | None = None


@dataclass(frozen=True)
class Skip:
    """A layer that should stay at full precision, and the reason."""

    module: str
    share: float
    reason: str


@dataclass(frozen=True)
class Sensitivity:
    """The error that low bits cause, layer by layer; made by `sensitivity`.

    Attributes:
        layers: In the model's order.
        choices: The widths that were measured, ascending.
        base: The spec whose layers these are.
        activations: See `allocate`.
        together: Names of layers that get one width.
    """

    layers: tuple[LayerCost, ...]
    choices: tuple[int, ...]
    base: QuantSpec
    activations: Literal["follow", "base"]
    together: tuple[tuple[str, ...], ...] = ()

    def allocate(self, budget: str | float) -> QuantSpec:
        """The spec of least error within a budget; see `allocate`.

        Raises:
            InputError: The budget is not a number of bits, or is below the smallest width.
        """
        bits = affordable(budget, self.choices)
        first = {name: names[0] for names in self.together for name in names}
        groups: dict[str, list[LayerCost]] = {}
        for layer in self.layers:
            groups.setdefault(first.get(layer.name, layer.name), []).append(layer)
        errors = [[sum(layer.errors[b] for layer in group) for b in self.choices] for group in groups.values()]
        weights = [sum(layer.weights for layer in group) for group in groups.values()]
        chosen = dict(zip(groups, knapsack(errors, weights, self.choices, bits), strict=True))
        return self._spec({layer.name: chosen[first.get(layer.name, layer.name)] for layer in self.layers})

    def _spec(self, bits: Mapping[str, int]) -> QuantSpec:
        """The base with these bits: the most common width for all layers, the others as overrides."""
        common = Counter(bits.values()).most_common(1)[0][0]
        follow = self.activations == "follow"
        spec = all_with_bits(self.base, common, follow)
        others = [(name, with_bits(self.base, name, b, follow)) for name, b in bits.items() if b != common]
        return replace(spec, overrides=spec.overrides + tuple(others))

    def skip(self, *, share: float = 0.5, most: int = 8) -> list[Skip]:
        """The fewest layers that cause this share of the error at the lowest width, worst first; at most `most`."""
        lowest = self.choices[0]
        total = sum(layer.errors[lowest] for layer in self.layers)
        found, made = [], 0.0
        for layer in sorted(self.layers, key=lambda layer: -layer.errors[lowest])[:most]:
            if total <= 0 or made >= share * total:
                break
            part = layer.errors[lowest] / total
            made += layer.errors[lowest]
            found.append(Skip(layer.name, part, _reason(layer, part, lowest)))
        return found

    def average_bits(self, spec: QuantSpec) -> float:
        """Average number of bits per weight that these layers have in a spec."""
        total = sum(layer.weights * _weight_bits(spec, layer.name) for layer in self.layers)
        return total / sum(layer.weights for layer in self.layers)

    def explain(self, spec: QuantSpec) -> str:
        """A text for people: how many layers have each width in a spec, and which layers cause most of the error."""
        counts = Counter(_weight_bits(spec, layer.name) for layer in self.layers)
        widths = ", ".join(f"{counts[bits]} of {bits} bits" for bits in sorted(counts))
        lines = [f"{len(self.layers)} layers: {widths}; {self.average_bits(spec):.2f} bits a weight on average"]
        lines += [f"  {skip.module}: {skip.reason}" for skip in self.skip()]
        return "\n".join(lines)


def _weight_bits(spec: QuantSpec, name: str) -> int:
    """Bits of a layer's weight in a spec; 16 where it is left alone."""
    found = spec.override_for(name, "weight")
    tensor = (found[1] if found else spec).weight
    return 16 if tensor is None else tensor.format.bits


def allocate(
    model: nn.Module,
    budget: str | float = "4.5 bits",
    *,
    calibration: Iterable[Any],
    choices: Sequence[int] = CHOICES,
    base: str | Mapping[str, Any] | QuantSpec = "w4a4",
    activations: Literal["follow", "base"] = "follow",
    loss: Loss | None = None,
    progress: bool = False,
) -> QuantSpec:
    """Choose a width for every layer: the least measured error within a budget of bits per weight.

    Args:
        model: A plain model; it is left as it is.
        budget: Bits a weight may have on average over the quantized layers: ``"4.5 bits"``, ``"4.5"`` or ``4.5``.
        calibration: Batches, as for `quantize`; they are run ``len(choices)`` times for every layer.
        choices: The widths to choose from, 2 to 8.
        base: Which layers, and everything but the widths: granularity, observers, the attention operands. Give it the
            observers that the model will be quantized with (`QuantSpec.with_observer`): the best widths for one
            calibrator can be the worst for another.
        activations: ``"follow"``: a layer's input has as many bits as its weight. ``"base"``: inputs stay as the base
            has them, and only weights count.
        loss: ``loss(model, batch)``, a scalar, to measure by its rise instead of by the error of the output.
        progress: Show progress bars.

    Returns:
        A spec for `quantize`: the most common width, the others as overrides by module name.

    Raises:
        InputError: An impossible budget or width; weights that are not integers; anything that `quantize` refuses.
    """
    bits = affordable(budget, choices)  # before the measurement, which takes time
    found = sensitivity(
        model,
        calibration=calibration,
        choices=choices,
        base=base,
        activations=activations,
        loss=loss,
        progress=progress,
    )
    return found.allocate(bits)


def parse_budget(budget: str | float) -> float:
    """A number of bits from ``"4.5 bits"``, ``"4.5"`` or ``4.5``.

    Raises:
        InputError: The text is not a number of bits.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:bits?)?\s*", str(budget))
    if isinstance(budget, bool) or match is None or not 0 < float(match[1]) < math.inf:
        raise InputError(f'a budget is a number of bits a weight, such as "4.5 bits", not {budget!r}')
    return float(match[1])


def affordable(budget: str | float, choices: Sequence[int]) -> float:
    """Parse a budget (`parse_budget`) and check that the narrowest of these widths fits into it.

    Raises:
        InputError: It is not a budget, or is too small.
    """
    bits = parse_budget(budget)
    if choices and bits < min(choices):
        raise InputError(f"a budget of {bits:g} bits is below the smallest choice, {min(choices)}; raise it")
    return bits


def knapsack(
    errors: Sequence[Sequence[float]], weights: Sequence[int], choices: Sequence[int], budget: float
) -> list[int]:
    """The width of every layer that minimises the sum of errors within the budget.

    Args:
        errors: ``[layers][choices]``.
        weights: How many weights each layer has.
        choices: Widths, ascending; the first must be within the budget.
        budget: Bits a weight on average.
    """
    room = math.floor(budget * sum(weights) + 1e-9) - choices[0] * sum(weights)
    sizes = [[count * (b - choices[0]) for b in choices] for count in weights]
    room = min(room, sum(row[-1] for row in sizes))
    unit = math.gcd(*(size for row in sizes for size in row)) or 1
    unit = max(unit, -(-room // _MOST_UNITS))
    units = room // unit
    best = torch.zeros(units + 1, dtype=torch.float64)  # best[u]: least error of the layers so far within u units
    taken: list[Tensor] = []
    for row, error in zip(sizes, errors, strict=True):
        options = torch.full((len(choices), units + 1), math.inf, dtype=torch.float64)
        for index, (size, cost) in enumerate(zip(row, error, strict=True)):
            used = -(-size // unit)
            if used <= units:
                options[index, used:] = best[: units + 1 - used] + cost
        # With equal errors the narrower width wins.
        best, choice = options.min(dim=0)
        taken.append(choice)
    picks, at = [], units
    for row, choice in zip(reversed(sizes), reversed(taken), strict=True):
        pick = int(choice[at])
        picks.append(pick)
        at -= -(-row[pick] // unit)
    picks.reverse()
    _fill(picks, errors, sizes, room)
    return [choices[pick] for pick in picks]


def _fill(picks: list[int], errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], room: int) -> None:
    """Spend the units that rounding up left over: take the step with the largest gain that fits."""
    left = room - sum(row[pick] for row, pick in zip(sizes, picks, strict=True))
    while True:
        steps = [
            (errors[layer][pick] - errors[layer][pick + 1], layer)
            for layer, pick in enumerate(picks)
            if pick + 1 < len(sizes[layer]) and sizes[layer][pick + 1] - sizes[layer][pick] <= left
        ]
        gain, layer = max(steps, default=(0.0, 0))
        if gain <= 0:
            return
        left -= sizes[layer][picks[layer] + 1] - sizes[layer][picks[layer]]
        picks[layer] += 1


def with_bits(base: QuantSpec, module: str | None, bits: int, follow: bool) -> QuantSpec:
    """The base's spec of a module with another width; with None, its spec of all modules without an override."""
    found = None if module is None else base.override_for(module, "weight")
    spec = found[1] if found else base

    def widened(tensor: TensorSpec | None, signed: bool) -> TensorSpec | None:
        return None if tensor is None else replace(tensor, format=integer_format(bits, signed=signed))

    changed = {"weight": widened(spec.weight, True)}
    if follow and spec.activation is not None and isinstance(spec.activation.format, IntFormat):
        changed["activation"] = widened(spec.activation, False)
    return replace(spec, **changed, overrides=())


def all_with_bits(base: QuantSpec, bits: int, follow: bool) -> QuantSpec:
    """The base with another width everywhere, in its overrides too; sites at full precision stay so."""
    overrides = tuple(
        (pattern, override if override.weight is None else with_bits(override, None, bits, follow))
        for pattern, override in base.overrides
    )
    return replace(with_bits(base, None, bits, follow), overrides=overrides)


def sensitivity(
    model: nn.Module,
    *,
    calibration: Iterable[Any],
    choices: Sequence[int] = CHOICES,
    base: str | Mapping[str, Any] | QuantSpec = "w4a4",
    activations: Literal["follow", "base"] = "follow",
    loss: Loss | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Measure what every width costs in every layer; arguments and errors as for `allocate`."""
    widths = tuple(sorted(set(choices)))
    for width in widths:
        integer_format(width, signed=True)
    if not widths:
        raise InputError("choices is empty; give the widths to choose from, such as (3, 4, 6, 8)")
    if activations not in ("follow", "base"):
        raise InputError(f"activations={activations!r} is unknown; choose follow or base")
    parsed = QuantSpec.parse(base)
    if parsed.weight is None or not isinstance(parsed.weight.format, IntFormat):
        raise InputError(f"{parsed} has no integer weights to give bits to; use a base such as w4a4")
    batches = Batches(list(calibration) if isinstance(calibration, Iterator) else calibration)
    graph = traced(model, batches)
    measure = _Measure(model, batches, loss, parsed.prefix, graph)
    follow = activations == "follow"
    errors: dict[str, dict[int, float]] = {}
    sizes, parts = dict[str, int](), dict[str, tuple[float, float]]()
    spec = all_with_bits(parsed, widths[0], follow)
    kept = tuple((name, replace(override, attention=None)) for name, override in spec.overrides)
    spec, together = replace(spec, attention=None, overrides=kept), ()
    sites = quant.planned(model, spec, batches, graph)
    with Progress(disable=not progress, transient=True) as bar:
        for width in widths:
            trial = copy.deepcopy(model)
            at_width = _widened(sites, width, follow)
            job = Job(trial, spec, at_width, insert(trial, at_width), batches, 0, False, traced=graph)
            rtn(job)
            layers = _layers(job)
            if width == widths[0]:
                together = side_by_side(job.graph, layers)
            for name, (members, count) in bar.track(layers.items(), description=f"measuring {width} bits"):
                sizes[name] = count
                errors.setdefault(name, {})[width] = measure.error(trial, members.values())
            if width == widths[0]:
                worst = sorted(layers, key=lambda name: -errors[name][width])[:_EXPLAINED]
                for name in worst:
                    members = layers[name][0]
                    alone = [
                        measure.error(trial, [q] if (q := members.get(what)) else []) for what in ("weight", "input")
                    ]
                    parts[name] = (alone[0], alone[1])
    costs = tuple(LayerCost(name, sizes[name], never_rising(found), parts.get(name)) for name, found in errors.items())
    return Sensitivity(costs, widths, parsed, activations, together)


def _widened(sites: Sequence[Site], bits: int, follow: bool) -> list[Site]:
    """A plan's sites with another width for every rounded weight and, with `follow`, for the input of its layer."""
    rounded = {site.module for site in sites if site.what == "weight" and site.format is not None}

    def widened(site: Site) -> Site:
        moves = site.what == "weight" or (follow and isinstance(site.format, IntFormat))
        if site.format is None or site.module not in rounded or not moves:
            return site
        return replace(site, format=integer_format(bits, signed=site.what == "weight"))

    return [widened(site) for site in sites]


def side_by_side(graph: Graph, layers: Container[str]) -> tuple[tuple[str, ...], ...]:
    """The layers of one parent that read one activation."""
    found: dict[tuple[int | None, str], dict[str, None]] = {}
    for call in (each for each in graph.products if each.module in layers):
        read = None if call.input is None else source_of(graph, call.input)
        found.setdefault((read, call.module.rpartition(".")[0]), {})[call.module] = None
    return tuple(dict.fromkeys(tuple(names) for names in found.values() if len(names) > 1))


def _layers(job: Job) -> dict[str, tuple[dict[str, Quantizer], int]]:
    """For every layer with a quantized weight: its quantizers by operand, and the number of its weights."""
    weights = [site for site in job.quantizers if site.what == "weight"]
    found: dict[str, tuple[dict[str, Quantizer], int]] = {each.module: ({}, math.prod(each.shape)) for each in weights}
    for site, quantizer in job.quantizers.items():
        if site.module in found:
            found[site.module][0][site.what] = quantizer
    return found


def never_rising(errors: Mapping[int, float]) -> dict[int, float]:
    """Make errors monotonic: more bits never cost more, whatever the noise of the measurement."""
    level, found = 0.0, {}
    for width in sorted(errors, reverse=True):
        level = max(level, errors[width])
        found[width] = level
    return dict(sorted(found.items()))


class _Measure:
    """The error of a model with some quantizers on, against the full-precision model."""

    def __init__(self, model: nn.Module, batches: Batches, loss: Loss | None, prefix: int, graph: Graph) -> None:
        self.batches, self.loss, self.prefix, self.graph = batches, loss, prefix, graph
        self.before = self.spread = 0.0
        self.expected: list[Tensor] = []
        if loss is not None:
            self.before = self._loss(model)
            return
        self.expected = [output.double() for output in self._outputs(model)]
        rows = torch.cat([output.flatten(0, -2) if output.ndim > 1 else output[None] for output in self.expected])
        self.spread = float((rows - rows.mean(0)).square().sum())

    def error(self, model: nn.Module, quantizers: Iterable[Quantizer]) -> float:
        with switched_on(quantizers):
            if self.loss is not None:
                return self._loss(model) - self.before
            outputs = self._outputs(model)
            squares = (float((a - b).square().sum()) for a, b in zip(outputs, self.expected, strict=True))
            found = sum(squares) / max(self.spread, 1e-30)
        return _finite(found)

    def _loss(self, model: nn.Module) -> float:
        assert self.loss is not None
        with torch.no_grad(), evaluating(model):
            values = [float(self.loss(model, batch)) for batch in self.batches]
        return _finite(sum(values) / len(values))

    def _outputs(self, model: nn.Module) -> Iterator[Tensor]:
        """The real tokens of what the model returns, batch by batch."""
        held: list[Any] = []
        with token_mask(model, self.graph, self.prefix) as mask, evaluating(model):
            hook = model.register_forward_hook(lambda _, __, output: held.append(output))
            try:
                for index, batch in enumerate(self.batches):
                    run(model, batch, index)
                    output = main_output(held.pop())
                    yield real_tokens(output, mask.of_output(output), "input")
            finally:
                hook.remove()


def _finite(error: float) -> float:
    return min(error, _HOPELESS) if math.isfinite(error) else _HOPELESS


def _reason(layer: LayerCost, share: float, width: int) -> str:
    """Why a layer is on the skip list, in one line."""
    text = f"{share:.0%} of all error at {width} bits"
    if layer.parts is None or layer.errors[width] <= 0:
        return text
    weight, input = layer.parts
    if input > 4 * weight:
        return f"{text}, from its input: outliers widen the range (see max/RMS of its input in the audit)"
    if weight > 4 * input:
        return f"{text}, from its weight: rows with outliers (see its spectrum in the audit)"
    return f"{text}, from weight and input alike"
