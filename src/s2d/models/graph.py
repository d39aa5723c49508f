"""The graph of a model: the use of every weight, the writers of its inputs, attentions, norms and blocks.

`trace(model, batch)` runs one forward of two rows and returns a `Graph`. A graph is plain data, to print, compare and
save. It is derived from the operations alone, not from names of classes or attributes, or from correlations.

    graph.calls_of("encoder.0.fc1.weight")   every use of a weight, in order
    graph.writers(call)                      the weights that write what a call reads, and how well a scale moves there
    graph.attentions, graph.norms            products, heads, masks; gains with all their readers
    graph.blocks                             repeated blocks: nested, shared, interleaved
    graph.tokens(call), graph.mask_of(call, batch)
    graph.unused, graph.unseen, graph.unknown    weights not read, modules that did not run, unknown operations

A graph belongs to a structure (`Graph.fingerprint`): tying weights, LoRA or a new branch make it stale. What does not
run in the traced batch (a routed expert, a dropped layer) is in `unseen`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from s2d.errors import InputError
from s2d.models.dimensions import Digit
from s2d.models.graph_parts import (
    Attention,
    Axis,
    Blocks,
    Call,
    Mask,
    Node,
    Norm,
    Operation,
    Reader,
    Rows,
    Shape,
    Tokens,
    Writer,
)


@dataclass
class Graph:
    """What a traced forward did; see `trace`."""

    model_class: str
    names: list[tuple[str, ...]]
    shapes: list[Shape]
    axes: list[Axis]
    nodes: list[Node]
    operations: list[Operation]
    calls: list[Call]
    outputs: tuple[int, ...]
    unused: tuple[str, ...]
    unseen: tuple[str, ...]
    unknown: tuple[tuple[str, str], ...]
    masks: tuple[Mask, ...] = ()
    attentions: list[Attention] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    blocks: list[Blocks] = field(default_factory=list)
    inputs: dict[str, Shape] = field(default_factory=dict)

    # -- calls ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _by_name(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {name: [] for names in self.names for name in names}
        for call in self.calls:
            for name in call.parameters:
                found[name].append(call)
        return found

    @cached_property
    def _by_operation(self) -> dict[int, list[Call]]:
        found: dict[int, list[Call]] = defaultdict(list)
        for call in self.calls:
            found[call.operation].append(call)
        return found

    @cached_property
    def consumers(self) -> dict[int, list[Operation]]:
        """The operations that read each node."""
        found: dict[int, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            for node in dict.fromkeys(operation.inputs):
                found[node].append(operation)
        return found

    def calls_of(self, parameter: str) -> list[Call]:
        """Every use of a parameter, by any of its names; empty if it was not read.

        Raises:
            InputError: The model has no parameter of this name.
        """
        if parameter not in self._by_name:
            raise InputError(f"the traced {self.model_class} has no parameter {parameter!r}; see graph.names")
        return self._by_name[parameter]

    def call(self, module: str, ordinal: int = 0, kind: str = "product") -> Call:
        """The call with this id and kind.

        Raises:
            InputError: There is none.
        """
        for call in self.calls:
            if call.module == module and call.ordinal == ordinal and call.kind == kind:
                return call
        raise InputError(f"{module!r} made no {kind} number {ordinal} in the traced forward")

    def at(self, operation: int) -> list[Call]:
        """The calls that one operation makes."""
        return self._by_operation.get(operation, [])

    @property
    def products(self) -> list[Call]:
        """Calls that multiply by a matrix: products and convolutions."""
        return [call for call in self.calls if call.kind in ("product", "convolution")]

    @property
    def flops(self) -> int:
        """Multiplications and additions of all products of the traced rows, counted as torch's flop counter does."""
        return sum(operation.flops for operation in self.operations)

    # -- walks ---------------------------------------------------------------------------------------------------------

    def writers(self, call: Call) -> list[Writer]:
        """The weights that write the channels that a call reads; empty if none is known."""
        from s2d.models.walks import writers_of

        return [] if call.input is None else writers_of(self, call.input)

    def readers(self, node: int) -> list[Reader]:
        """All that reads a value, through views and casts."""
        from s2d.models.walks import readers_of

        return readers_of(self, node)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def tokens(self, call: Call) -> Tokens:
        """Which dimensions of a call's input count tokens."""
        if call.input is None:
            return Tokens((), (), (), False)
        dims: list[int] = []
        axes: list[tuple[int, ...]] = []
        inputs: dict[str, None] = {}
        routed = False
        for position, dim in enumerate(self.nodes[call.input].dims):
            found = tuple(digit.axis for digit in dim if self.axes[digit.axis].kind in ("input", "derived"))
            if found:
                dims.append(position)
                axes.append(found)
            for axis in found:
                while self.axes[axis].kind == "derived":
                    routed |= self.axes[axis].name in ("index", "index_select")
                    axis = self.axes[axis].source
                inputs[self.axes[axis].name] = None
        return Tokens(tuple(dims), tuple(axes), tuple(inputs), routed)

    def mask_of(self, call: Call, batch: Mapping[str, Any] | None = None) -> Mask | None:
        """The mask of the tokens that a call reads: None if nothing masks them.

        Its tokens are those of the call, in the same order, if they were not cut, moved or picked out since.

        Args:
            call: One of this graph.
            batch: If given, only masks that it holds count.
        """
        return None if call.input is None else self.mask_at(call.input, batch)

    def mask_at(self, node: int, batch: Mapping[str, Any] | None = None) -> Mask | None:
        """The mask of the tokens of a value; see `mask_of`."""
        for mask in self.masks:
            if (batch is None or mask.key in batch) and self.has_whole(node, mask.axes, self.inputs[mask.key]):
                return mask
        return None

    def has_whole(self, node: int, axes: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether a value has all positions of some axes, in their order."""
        digits = [digit for dim in self.nodes[node].dims for digit in dim]
        have = [(self.axes[digit.axis].same_as, *digit[1:]) for digit in digits]
        wanted = [(self.axes[axis].same_as, size, 1, 0) for axis, size in zip(axes, sizes, strict=True)]
        return bool(wanted) and all(digit in have for digit in wanted)

    # -- data ----------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A hash of the structure: names, tied names, shapes, operations and who reads what; not of the batch's size.

        A model that was tied anew, got LoRA or another branch has another one.
        """
        structure = (
            self.names,
            self.shapes,
            [(c.module, c.ordinal, c.kind, c.op, c.parameters, c.rows, c.plain, c.applied) for c in self.calls],
        )
        return hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; `from_json` reads it."""
        return {"version": 1, "fingerprint": self.fingerprint()} | {
            f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Graph:
        """Read what `to_json` made.

        Raises:
            InputError: It is not a saved graph.
        """
        try:
            fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no saved graph: {error} is missing; save one with graph.to_json()") from error
        makers: dict[str, Any] = {
            "axes": Axis, "nodes": Node, "operations": Operation, "calls": Call, "masks": Mask,
            "attentions": Attention, "norms": Norm, "blocks": Blocks,
        }  # fmt: skip
        for name, maker in makers.items():
            fields[name] = [_made(maker, row) for row in fields[name]]
        fields["masks"] = tuple(fields["masks"])
        for name in ("names", "shapes"):
            fields[name] = [tuple(row) for row in fields[name]]
        for name in ("outputs", "unused", "unseen"):
            fields[name] = tuple(fields[name])
        fields["unknown"] = tuple((op, module) for op, module in fields["unknown"])
        fields["inputs"] = {key: tuple(shape) for key, shape in fields["inputs"].items()}
        return cls(**fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.to_json() == other.to_json()

    def __str__(self) -> str:
        """A table as text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        total = self.flops or 1
        yield (
            f"{self.model_class}: {len(self.operations)} operations, {len(self.calls)} calls of "
            f"{len(self.names)} parameters, {self.flops / 1e6:.1f} MFLOP for "
            + ", ".join(f"{key} {list(shape)}" for key, shape in self.inputs.items())
        )
        width = max((len(str(call)) for call in self.calls), default=0)
        for call in self.products:
            tokens = self.tokens(call)
            mask = self.mask_of(call)
            written = ", ".join(f"{w.exactness} {w.call.parameter}" for w in self.writers(call)[:3])
            yield (
                f"  {str(call):<{width}}  {list(call.input_shape)} -> {list(call.output_shape)}"
                f"  {100 * call.flops / total:5.1f} %"
                + (f"  tokens of {', '.join(tokens.inputs)}" if tokens.inputs else "")
                + (f" masked by {mask.key}" if mask else "")
                + (f"  written by {written}" if written else "")
            )
        for one in self.attentions:
            parts = [", ".join(dict.fromkeys(w.call.parameter for w in ws)) or "?"
                     for ws in (one.q_calls, one.k_calls, one.v_calls)]  # fmt: skip
            yield (
                f"  attention in {one.module or 'the model'}: {one.form}, {one.heads} heads of {one.head_dim}; "
                f"q {parts[0]}, k {parts[1]}, v {parts[2]}"
                + (f"; mask from {', '.join(one.mask_inputs)}" if one.mask_inputs else "")
            )
        for norm in self.norms:
            read = ", ".join(str(r.call) if r.call else f"{r.op} in {r.module or 'the model'}" for r in norm.readers)
            yield f"  {norm.kind} norm {', '.join(norm.gain) or norm.module} ({norm.applied or 'no gain'}): {read}"
        for blocks in self.blocks:
            yield (
                f"  blocks {', '.join(blocks.containers)}: {len(blocks.members)}"
                + (" (shared)" if blocks.shared else "")
                + (f", inside {blocks.inside}" if blocks.inside else "")
            )
        for title, rows in (
            ("parameters that nothing read", self.unused),
            ("did not run", self.unseen),
            ("unknown operations", [f"{op} in {module or 'the model'}" for op, module in self.unknown]),
        ):
            if rows:
                yield f"  {title}: {', '.join(rows)}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def _made(maker: Any, row: Mapping[str, Any]) -> Any:
    values = {key: _tuples(value) for key, value in row.items()}
    if maker is Node:
        values["dims"] = tuple(tuple(Digit(*digit) for digit in dim) for dim in values["dims"])
    if maker is Mask and isinstance(values["padding"], str):
        values["padding"] = float(values["padding"])
    if maker is Attention:
        for name in ("q_calls", "k_calls", "v_calls"):
            values[name] = tuple(_made(Writer, each) for each in row[name])
    if maker is Norm:
        values["readers"] = tuple(_made(Reader, each) for each in row["readers"])
    if maker is Writer:
        values["call"] = _made(Call, row["call"])
        values["rows"] = None if row["rows"] is None else Rows(row["rows"]["offset"], _tuples(row["rows"]["digits"]))
    if maker is Reader:
        values["call"] = None if row["call"] is None else _made(Call, row["call"])
    return maker(**values)
