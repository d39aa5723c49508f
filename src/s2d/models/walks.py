"""Walks over a graph: back from what is read to the weights that write it, forward from a value to all its readers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from s2d.models.dimensions import positions
from s2d.models.graph import Graph
from s2d.models.graph_parts import Call, Exactness, Node, Operation, Reader, Rows, Writer

_ORDER: dict[Exactness, int] = {"exact": 0, "near": 1, "none": 2}
_WRITES = frozenset(("product", "convolution", "embedding", "lookup", "gain"))
_MOST_STEPS = 20_000
# How far back a statistic (the root mean square of a norm) is looked for.
_STATISTIC_STEPS = 16


def is_number(node: Node) -> bool:
    """Whether a node holds activations, not indices or conditions."""
    return node.dtype.startswith(("float", "bfloat", "complex"))


def activations(graph: Graph, operation: Operation) -> list[Node]:
    """The floating-point operands of an operation that come from the model's inputs."""
    nodes = [graph.nodes[i] for i in operation.inputs]
    return [node for node in nodes if node.state == "activation" and is_number(node)]


def weaker(a: Exactness, b: Exactness) -> Exactness:
    """The less exact of two."""
    return a if _ORDER[a] >= _ORDER[b] else b


def writers_of(graph: Graph, start: int) -> list[Writer]:
    """The calls that write the channels of a node, the nearest first; see `Writer`."""
    found: dict[tuple[int, str, str, tuple[int, int] | None], Writer] = {}
    seen: set[tuple[int, Exactness, int]] = set()
    # node, how exact so far, operations passed, node after the last fork (whose channels the reader has)
    todo: deque[tuple[int, Exactness, tuple[str, ...], int]] = deque([(start, "exact", (), start)])
    while todo and len(seen) < _MOST_STEPS:
        number, how, path, since = todo.popleft()
        key = (number, how, since if how != "none" else -1)
        if key in seen:
            continue
        seen.add(key)
        node = graph.nodes[number]
        if node.operation < 0 or node.state != "activation":
            continue
        operation = graph.operations[node.operation]
        stops = False
        for call in graph.at(operation.index):
            if call.output != number:
                continue
            wrote = call.kind in _WRITES
            if wrote or (call.kind in ("bias", "inserted") and operation.kind != "product"):
                _note(found, Writer(call, how, path, rows_read(graph, since, call) if wrote else None))
            stops |= wrote
        if stops:
            continue
        step = (*path, operation.name) if operation.kind != "view" else path
        for back, exact, fork in _steps(graph, operation, node, since):
            todo.append((back, weaker(how, exact), step, back if fork else since))
    return list(found.values())


def _note(found: dict[tuple[int, str, str, tuple[int, int] | None], Writer], writer: Writer) -> None:
    """Keep a writer once for the channels that it writes, as the least exact of the ways to it."""
    call, rows = writer.call, writer.rows
    key = (call.operation, call.kind, call.parameter, None if rows is None else (rows.offset, len(rows.digits)))
    known = found.get(key)
    if known is None or weaker(known.exactness, writer.exactness) != known.exactness:
        found[key] = writer


_SAME_CHANNELS = frozenset(
    ("alias", "detach", "lift_fresh", "lift", "clone", "_to_copy", "contiguous", "view", "_unsafe_view", "dropout")
    + ("native_dropout",)
)


def roots(graph: Graph, number: int) -> frozenset[int]:
    """The values that a node is a function of, channel by channel: what comes before its elementwise operations."""
    out: set[int] = set()
    todo, seen = [number], {number}
    for _ in range(_STATISTIC_STEPS * 4):
        if not todo:
            return frozenset(out)
        current = todo.pop()
        node = graph.nodes[current]
        operation = graph.operations[node.operation] if node.operation >= 0 else None
        through = (
            operation is not None
            and not graph.at(operation.index)
            and (
                operation.kind in ("activation", "multiply", "add", "homogeneous")
                or (operation.kind == "view" and operation.name in _SAME_CHANNELS)
            )
        )
        if not through or operation is None:
            out.add(current)
            continue
        for one in activations(graph, operation):
            if one.id not in seen:
                seen.add(one.id)
                todo.append(one.id)
    return frozenset((*out, *todo))


def _steps(graph: Graph, operation: Operation, node: Node, since: int) -> Iterator[tuple[int, Exactness, bool]]:
    """One step back: the node, how exactly a scale passes, and whether the way forks."""
    kind, inputs = operation.kind, operation.inputs
    live = activations(graph, operation)
    if kind in ("multiply", "add") and len(live) > 1:
        one = roots(graph, live[0].id)
        if len(one) == 1 and all(roots(graph, other.id) == one for other in live[1:]):
            yield next(iter(one)), "near", False  # an activation function in several operations
            return
    if kind == "view":
        yield inputs[0], "exact", False
    elif kind == "activation":
        if len(live) == 1:
            yield live[0].id, "near", False
    elif kind == "homogeneous":
        for each in live:
            yield each.id, "exact" if len(live) == 1 else "none", len(live) > 1
    elif kind == "multiply":
        yield from _factors(graph, operation, node, live)
    elif kind == "add":
        others = any(graph.nodes[i].state == "constant" and graph.nodes[i].shape for i in inputs)
        moved = bool(operation.arguments) and len(inputs) == 1
        biases = [each for each in live if _is_bias_of_stack(graph, each)]
        live = live if len(biases) == len(live) else [each for each in live if each not in biases]
        for each in live:
            yield each.id, "none" if len(live) > 1 or others or moved else "exact", len(live) > 1
    elif kind == "attention":
        yield inputs[2], "exact", False
    elif kind == "product":
        follows = _channel_operand(graph, operation, since)
        if follows is not None:
            yield follows, "exact", False
    elif kind == "reduction":
        for each in live[:1]:
            if node.shape and each.shape and node.shape[-1] == each.shape[-1]:
                yield each.id, "exact", False
    elif kind == "norm":
        yield inputs[0], "none", False
    elif kind == "join":
        for each in live[:1] if operation.name.startswith("masked_fill") else live:
            yield each.id, "exact", len(live) > 1
    elif kind == "lookup" and live and node.shape and live[0].shape and node.shape[-1] == live[0].shape[-1]:
        yield live[0].id, "exact", False


def _is_bias_of_stack(graph: Graph, node: Node) -> bool:
    """Whether rows of a bias ``[E, O]`` were picked as the matrices of a stack of the same module are."""
    made = graph.nodes[source_of(graph, node.id)].operation
    tables = [call for call in graph.at(made) if call.kind == "lookup"] if made >= 0 else []
    return any(
        call.experts and call.module == table.module
        for table in tables
        for call in graph.products
        if call.operation > made
    )


def _factors(graph: Graph, operation: Operation, node: Node, live: list[Node]) -> Iterator[tuple[int, Exactness, bool]]:
    divides = operation.name.startswith(("div", "true_div")) and len(operation.inputs) > 1
    wide = node.shape[-1] if node.shape else 1
    full = [one for one in live if (one.shape[-1] if one.shape and not _is_expanded(graph, one) else 1) == wide]
    narrow = [one for one in live if one not in full]
    if len(operation.inputs) == 2 and operation.inputs[0] == operation.inputs[1]:
        yield operation.inputs[0], "near", False
        return
    for one in full:
        # What is divided by its own root mean square does not keep a scale, nor does a divisor.
        lost = (divides and one.id == operation.inputs[1]) or any(reads(graph, other, one.id) for other in narrow)  # pyright: ignore[reportGeneralTypeIssues]
        yield one.id, "none" if lost else "exact", len(full) > 1


def _is_expanded(graph: Graph, node: Node) -> bool:
    """Whether a value is one number a token, expanded to all channels."""
    before = graph.nodes[source_of(graph, node.id)].shape
    return before[-1:] == (1,) and math.prod(before) < math.prod(node.shape)


def reads(graph: Graph, node: Node, wanted: int, steps: int = _STATISTIC_STEPS) -> bool:
    """Whether a node is computed from another one, without products in between."""
    origin = source_of(graph, wanted)
    level = {node.id}
    for _ in range(steps):
        ahead: set[int] = set()
        for number in level:
            if source_of(graph, number) == origin:
                return True
            made = graph.nodes[number].operation
            if made >= 0 and graph.operations[made].kind not in ("product", "convolution", "attention"):
                ahead |= {i for i in graph.operations[made].inputs if graph.nodes[i].state == "activation"}
        if not ahead:
            return False
        level = ahead
    return False


def source_of(graph: Graph, number: int) -> int:
    """The node before views and casts."""
    while True:
        node = graph.nodes[number]
        if node.operation < 0 or graph.operations[node.operation].kind != "view":
            return number
        operation = graph.operations[node.operation]
        if not operation.inputs:
            return number
        number = operation.inputs[0]


def picked_from(graph: Graph, number: int) -> int:
    """The node whose tokens a mask hides, before rows of it were picked by number; the node itself if there is none."""
    start = number
    while graph.mask_at(number) is None:
        node = graph.nodes[number]
        operation = graph.operations[node.operation] if node.operation >= 0 else None
        if operation is None or operation.kind not in ("lookup", "view") or not operation.inputs:
            return start
        number = operation.inputs[0]
    return number


def _channel_operand(graph: Graph, operation: Operation, since: int) -> int | None:
    """The factor of a product of activations whose channels the reader has; the right one if that is not known.

    It keeps the columns of its right factor and the rows of its left one. Channels that it sums over (attention among
    channels, as in XCiT) are not those of the result.
    """
    factors = [i for i in operation.inputs if graph.nodes[i].state == "activation"][-2:]
    if len(factors) < 2:
        return factors[0] if factors else None
    last = graph.nodes[since].dims[-1:] or ((),)
    wanted = {digit.axis for digit in last[0] if graph.axes[digit.axis].kind == "features"}
    for number, kept in ((factors[1], -1), (factors[0], -2)):
        dims = graph.nodes[number].dims
        if len(dims) >= -kept and wanted & {digit.axis for digit in dims[kept]}:
            return number
    return factors[1]


def readers_of(graph: Graph, start: int) -> list[Reader]:
    """All that reads a value, through views, casts and copies, in order; the model's output is the last reader."""
    found: list[tuple[int, Reader]] = []
    todo, seen = [start], {start}
    while todo:
        number = todo.pop(0)
        if number in graph.outputs:
            found.append((len(graph.operations), Reader("output", "output", "")))
        for operation in graph.consumers.get(number, []):
            if operation.kind == "view":
                for out in operation.outputs:
                    if out not in seen:
                        seen.add(out)
                        todo.append(out)
                continue
            found.append((operation.index, _reader(graph, operation, number)))
    return [reader for _, reader in sorted(found, key=lambda pair: pair[0])]


def _reader(graph: Graph, operation: Operation, number: int) -> Reader:
    calls: list[Call] = [c for c in graph.at(operation.index) if c.input == number and c.kind != "bias"]
    if not calls:
        calls = [c for c in graph.at(operation.index) if c.input == number]
    if calls:
        return Reader(operation.name, calls[0].kind, operation.module, calls[0])
    return Reader(operation.name, operation.kind, operation.module)


def rows_read(graph: Graph, node: int, call: Call) -> Rows | None:
    """Which output channels of a call a node holds."""
    found = positions(graph.nodes[node].dims, call.features) if call.features else None
    return None if found is None else Rows(*found)


__all__ = ["activations", "is_number", "readers_of", "reads", "source_of", "weaker", "writers_of"]
