"""Sites: the places of quantizers, and the weight that writes the channels of each, found in a model's graph.

A site is the input of a linear layer, or an operand of attention's products. Its outlier channels are shrunk in the
weight that writes them: a norm's gain, the values of an attention, the linear factor of a gate, fc1 before GELU. A sum
of several (the residual stream) has no single writer and is left alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from s2d.decay.written_stacks import StackSite, stack_sites
from s2d.distributed.sharding import is_dtensor
from s2d.models.dimensions import positions
from s2d.models.graph import Graph
from s2d.models.graph_parts import Call, Exactness, Mask, Writer
from s2d.models.walks import source_of, writers_of
from s2d.targets.lora import AdaptedTarget
from s2d.targets.stacked import StackTarget
from s2d.targets.weights import Target, clean_name

_WRITES = ("product", "gain", "embedding", "convolution")
# By what reads a weight's output, the most telling first.
_NO_SITE = {
    "add": "part of a sum: no weight alone writes those channels",
    "gain": "a norm follows, whose gain writes the channels",
    "norm": "a norm follows, which rescales the channels",
    "convolution": "only convolutions read it, which are kept in full precision by default",
    "output": "the model's output",
    "multiply": "a factor of a product whose other factor is shrunk",
}


@dataclass(frozen=True)
class Site:
    """The channels that one weight writes.

    Attributes:
        writer: Name of the target.
        rows: The row (or gain) that makes each channel; None: one to one. Grouped-query attention repeats rows.
    """

    writer: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Placed:
    """A mask of a call's tokens: the model input that holds it, and whether the batch dimension follows the tokens."""

    key: str
    turned: bool


@dataclass
class Uses:
    """One call of a target's module: the site that it reads, the sites observed at its output, its mask.

    Where several weights read the same tensor, it is observed at the first one.
    """

    read: Site | None = None
    written: list[Site] = field(default_factory=list)
    mask: Placed | None = None


@dataclass
class Sites:
    """The targets in a graph.

    Attributes:
        uses: By target, the calls of its module in order.
        offsets: The number that a norm adds to its gain; NaN where its output is no linear function of the gain.
        masks: Inputs of the model that mask tokens.
        without: Targets that ran and write no site, with the reason.
        stacks: Sites inside experts.
    """

    uses: dict[str, list[Uses]] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    masks: tuple[Mask, ...] = ()
    without: dict[str, str] = field(default_factory=dict)
    stacks: list[StackSite] = field(default_factory=list)

    def writers(self) -> set[str]:
        """The targets that write a site."""
        every = [uses for calls in self.uses.values() for uses in calls]
        return {site.writer for uses in every for site in (uses.read, *uses.written) if site is not None}


def sites_of(graph: Graph, targets: Sequence[Target], prefix: str = "") -> Sites:
    """Read a graph.

    Args:
        graph: Graph of the model, or of one of its modules.
        targets: Targets of the model.
        prefix: Path of the module that was traced, empty for the model.
    """
    return _Reading(graph, targets, prefix).sites()


class _Reading:
    def __init__(self, graph: Graph, targets: Sequence[Target], prefix: str) -> None:
        self.graph, self.prefix = graph, f"{prefix}." if prefix else ""
        self.targets = [target for target in targets if not isinstance(target, StackTarget)]  # see `stack_sites`
        self.by_parameter: dict[str, list[Target]] = defaultdict(list)
        for target in self.targets:
            path = f"{target.module_name}.{target.parameter_name}" if target.module_name else target.parameter_name
            self.by_parameter[path].append(target)
        self.divided = any(is_dtensor(target.parameter) for target in self.targets)
        self.adapted = {
            target.module_name.rpartition(".")[0]: target
            for target in self.targets
            if isinstance(target, AdaptedTarget)
        }
        self.calls: dict[str, list[Call]] = defaultdict(list)  # that a target's own module makes
        self.elsewhere: list[
            Call
        ] = []  # products with targets' weights, or with experts, that no target's module makes
        for call in graph.calls:
            self._sort_in(call)

    def _sort_in(self, call: Call) -> None:
        if call.kind not in _WRITES:
            return
        owners = [t for t in self._owners(call) if call.rows is None or _part(t)[0] in range(*call.rows)]
        inside = [t for t in owners if self._runs(t, call)]
        for target in inside:
            self.calls[target.name].append(call)
        experts = bool(call.experts)
        if call.kind == "product" and not inside and (owners or experts) and call.side == "right":
            self.elsewhere.append(call)

    def _owners(self, call: Call) -> list[Target]:
        names = [clean_name(self.prefix + name) for name in call.parameters]
        return next((self.by_parameter[name] for name in names if name in self.by_parameter), [])

    def _runs(self, target: Target, call: Call) -> bool:
        """Whether a call is made by the module at which a target is watched."""
        here = clean_name(self.prefix + call.module)
        path = target.module_name.rpartition(".")[0] if isinstance(target, AdaptedTarget) else target.module_name
        return here == path or here.startswith(f"{path}.") or not path

    def sites(self) -> Sites:
        graph, found = self.graph, Sites(masks=self.graph.masks, stacks=stack_sites(self.graph))
        for name, calls in self.calls.items():
            found.uses[name] = [Uses(mask=self._mask(call, name)) for call in calls]
        for target in self.targets:
            if target.kind == "norm" and self.calls[target.name]:
                found.offsets[target.name] = _offset(self.calls[target.name])
        read: set[int] = set()
        readers = [
            (call, uses)
            for target in self.targets
            if target.kind == "linear"
            for call, uses in zip(self.calls[target.name], found.uses.get(target.name, []), strict=True)
        ]
        for call, uses in sorted(readers, key=lambda pair: pair[0].operation):
            if call.input is None or (node := source_of(graph, call.input)) in read:
                continue
            uses.read, _ = self.written(call)
            if uses.read is not None:
                read.add(node)
        for call in self.elsewhere:
            if call.input is not None and (node := source_of(graph, call.input)) not in read:
                read.add(node)
                self._watch_writer(found, *self.written(call))
        for attention in graph.attentions:
            for operand in (attention.q_calls, attention.k_calls):
                self._operand(found, operand)
        sited = found.writers()
        found.without = {name: self._why(calls) for name, calls in self.calls.items() if calls and name not in sited}
        return found

    def _why(self, calls: Iterable[Call]) -> str:
        """Why a weight writes no site: what reads its output, behind activations."""
        kinds, todo, seen = set(), [call.output for call in calls], set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            kinds |= {"output"} if node in self.graph.outputs else set()
            for operation in self.graph.consumers.get(node, []):
                inside = {c.kind for c in self.graph.at(operation.index) if c.kind != "bias"}
                through = operation.kind in ("view", "activation", "homogeneous", "reduction") and not inside
                kinds |= set() if through else inside or {operation.kind}
                todo += operation.outputs if through else ()
        return next((reason for kind, reason in _NO_SITE.items() if kind in kinds), "no quantizer's input")

    # -- who writes ----------------------------------------------------------------------------------------------------

    def written(self, call: Call) -> tuple[Site | None, Call | None]:
        """The site that a product reads, and the call that writes it."""
        assert call.input is not None
        node = self.graph.nodes[call.input]
        width = node.shape[-1] if node.shape else 0
        found = [w for w in writers_of(self.graph, call.input) if w.call.kind in _WRITES]
        wanted: tuple[Exactness, ...] = ("exact", "near")
        for exactness in wanted:
            for writer in found:
                rows = self._rows(call.input, writer, width) if writer.exactness == exactness else None
                if rows is not None:  # if the writer is no target, no other weight is shrunk in its place
                    return self._on_target(writer.call, rows), writer.call
        base = self._under_adapters(found)
        rows = None if base is None else self._rows(call.input, base, width)
        return (None, None) if base is None or rows is None else (self._on_target(base.call, rows), base.call)

    def _under_adapters(self, writers: Iterable[Writer]) -> Writer | None:
        """The frozen weight of a sum with adapters, where all that is written is that sum."""
        layers, base = set(), None
        for writer in writers:
            path = clean_name(self.prefix + writer.call.module)
            layer = next((layer for layer in self.adapted if path.startswith(f"{layer}.")), None)
            layers.add(layer)
            if layer is not None and path == self.adapted[layer].module_name:
                base = writer
        return base if len(layers) == 1 else None

    def _rows(self, node: int, writer: Writer, width: int) -> tuple[int, ...] | None:
        """The output channel of a writer for each channel of a node; None where that is not known."""
        call, dims = writer.call, self.graph.nodes[node].dims
        if writer.rows is not None and len(rows := writer.rows.indices()) == width:
            return tuple(rows)
        found = positions(dims, call.features) if call.features and dims else None
        if found is not None and sum(d.axis == call.features for d in dims[-1]) == len(found[1]):
            rows = [found[0]]
            for digit in dims[-1]:
                step = digit.stride if digit.axis == call.features else 0  # others repeat what is there
                rows = [row + i * step for row in rows for i in range(digit.size)]
        elif found is None and writer.rows is None and self.divided and call.output_shape[-1] == width:
            rows = list(range(width))  # this rank's part of the channels; its views are not followed
        else:
            return None
        return tuple(rows) if len(rows) == width else None

    def _on_target(self, call: Call, rows: Sequence[int]) -> Site | None:
        for target in self._owners(call):
            first, last = _part(target)
            if all(first <= row < last for row in rows):
                inside = tuple(row - first for row in rows)
                return Site(target.name, None if inside == tuple(range(last - first)) else inside)
        return None

    # -- sites that are watched where they are written -----------------------------------------------------------------

    def _watch_writer(self, found: Sites, site: Site | None, call: Call | None) -> None:
        if site is None or call is None:
            return
        for uses, made in zip(found.uses.get(site.writer, []), self.calls[site.writer], strict=True):
            if made.operation == call.operation:
                kept = None if site.rows is None else tuple(sorted(set(site.rows)))
                if (at := Site(site.writer, kept)) not in uses.written:
                    uses.written.append(at)

    def _operand(self, found: Sites, writers: Sequence[Writer]) -> None:
        """Queries or keys, as they come from the weight that makes them."""
        made = [w for w in writers if w.call.kind in _WRITES]
        base = made[0] if len({w.call.operation for w in made}) == 1 else self._under_adapters(made)
        if base is None:
            return
        span = {row for w in made if w.rows is not None and w.call is base.call for row in w.rows.indices()}
        rows = sorted(span) if span else range(base.call.output_shape[-1])
        self._watch_writer(found, self._on_target(base.call, rows), base.call)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _mask(self, call: Call, name: str) -> Placed | None:
        mask = self.graph.mask_of(call)
        if mask is None or call.input is None:
            return None
        axes = self.graph.axes
        order = [axes[d.axis].same_as for dim in self.graph.nodes[call.input].dims for d in dim]
        places = [order.index(axes[axis].same_as) for axis in mask.axes]
        turned = places != sorted(places)
        # Torch's own attention transposes its inputs itself; its arguments are observed.
        module = next(target.module for target in self.targets if target.name == name)
        return Placed(mask.key, not module.batch_first if isinstance(module, nn.MultiheadAttention) else turned)


def _part(target: Target) -> tuple[int, int]:
    """First row of a target in its parameter, and the one after the last."""
    if target.rows is not None:
        return target.rows.start, target.rows.stop
    turned = target.transposed or target.kind == "embedding"
    return 0, target.parameter.shape[1 if turned else 0]


def _offset(calls: Iterable[Call]) -> float:
    """The number added to a gain before it multiplies."""
    forms = {call.applied for call in calls if call.kind == "gain"}
    if len(forms) != 1 or (form := next(iter(forms))) in ("other", ""):
        return math.nan
    return 0.0 if form == "w" else float(form.removesuffix("+w"))
