"""Walks over a graph: back from what is read to the weights that write it, forward from a value to all its readers."""

from __future__ import annotations

from collections.abc import Iterator

from s2d.models.graph import Call, Exactness, Graph, Node, Operation, Reader, Rows, Writer, rows_read

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
    found: dict[tuple[int, str, str, tuple[int, int] | None], tuple[Writer, set[tuple[tuple[int, int], ...]]]] = {}
    seen: set[tuple[int, Exactness, tuple[tuple[int, int], ...]]] = set()
    # node, how exact so far, operations passed, node after the last fork, factors taken of products of activations
    todo: list[tuple[int, Exactness, tuple[str, ...], int, tuple[tuple[int, int], ...]]] = [
        (start, "exact", (), start, ())
    ]
    for _ in range(_MOST_STEPS):
        if not todo:
            break
        number, how, path, since, factors = todo.pop(0)
        if (number, how, factors) in seen:
            continue
        seen.add((number, how, factors))
        node = graph.nodes[number]
        if node.operation < 0 or node.state != "activation":
            continue
        operation = graph.operations[node.operation]
        stops = False
        for call in graph.at(operation.index):
            if call.output != number:
                continue
            wrote = call.kind in _WRITES
            if wrote or call.kind in ("bias", "inserted") and operation.kind != "product":
                rows = rows_read(graph, since, call) if wrote else None
                _note(found, graph, Writer(call, how, path, rows), factors)
            stops |= wrote
        if stops:
            continue
        for back, exact, fork, factor in _steps(graph, operation, node, since):
            reached = weaker(how, exact)
            taken = () if reached == "none" else factors if factor is None else (*factors, factor)
            step = (*path, operation.name) if operation.kind != "view" else path
            todo.append((back, reached, step, back if fork else since, taken))
    return [writer for writer, _ in found.values()]


def _note(
    found: dict[tuple[int, str, str, tuple[int, int] | None], tuple[Writer, set[tuple[tuple[int, int], ...]]]],
    graph: Graph,
    writer: Writer,
    factors: tuple[tuple[int, int], ...],
) -> None:
    """Keep a writer once; one that is both factors of a product (x sigmoid(x)) is near at best."""
    call, rows = writer.call, writer.rows
    key = (call.operation, call.kind, call.parameter, None if rows is None else (rows.offset, len(rows.digits)))
    if key not in found:
        found[key] = (writer, {factors})
        return
    known, ways = found[key]
    how = weaker(known.exactness, writer.exactness)
    forks = {fork for way in ways for fork, _ in way} & {fork for fork, _ in factors}
    if any(dict(way).get(fork) != dict(factors).get(fork) for way in ways for fork in forks):
        how = weaker(how, "near")
    ways.add(factors)
    found[key] = (Writer(known.call, how, known.path, known.rows), ways)


def _steps(
    graph: Graph, operation: Operation, node: Node, since: int
) -> Iterator[tuple[int, Exactness, bool, tuple[int, int] | None]]:
    """One step back: the node, how exactly a scale passes, whether the way forks, the factor of a product taken."""
    kind, inputs = operation.kind, operation.inputs
    live = activations(graph, operation)
    if kind == "view":
        yield inputs[0], "exact", False, None
    elif kind in ("activation", "softmax"):
        if kind == "activation" and len(live) == 1:
            yield live[0].id, "near", False, None
    elif kind == "homogeneous":
        for one in live:
            yield one.id, "exact" if len(live) == 1 else "none", len(live) > 1, None
    elif kind == "multiply":
        yield from _factors(graph, operation, node, live)
    elif kind == "add":
        others = any(graph.nodes[i].state == "constant" and graph.nodes[i].shape for i in inputs)
        moved = bool(operation.arguments) and len(inputs) == 1
        for one in live:
            yield one.id, "none" if len(live) > 1 or others or moved else "exact", len(live) > 1, None
    elif kind == "attention":
        yield inputs[2], "exact", False, None
    elif kind == "product":
        follows = _channel_operand(graph, operation, since)
        if follows is not None:
            yield follows, "exact", False, None
    elif kind == "reduction":
        for one in live[:1]:
            if node.shape and one.shape and node.shape[-1] == one.shape[-1]:
                yield one.id, "exact", False, None
    elif kind == "norm":
        yield inputs[0], "none", False, None
    elif kind == "join":
        for one in live[:1] if operation.name.startswith("masked_fill") else live:
            yield one.id, "exact", len(live) > 1, None
    elif kind == "lookup" and live and node.shape and live[0].shape and node.shape[-1] == live[0].shape[-1]:
        yield live[0].id, "exact", False, None


def _factors(
    graph: Graph, operation: Operation, node: Node, live: list[Node]
) -> Iterator[tuple[int, Exactness, bool, tuple[int, int] | None]]:
    divisor = operation.inputs[1] if operation.name.startswith(("div", "true_div")) and len(operation.inputs) > 1 else -1
    if len(operation.inputs) == 2 and operation.inputs[0] == operation.inputs[1]:
        yield operation.inputs[0], "near", False, None
        return
    wide = node.shape[-1] if node.shape else 1
    full = [one for one in live if (one.shape[-1] if one.shape else 1) == wide]
    narrow = [one for one in live if one not in full]
    for place, one in enumerate(full):
        if one.id == divisor:
            how: Exactness = "none"
        else:
            # What is divided by its own root mean square does not keep a scale.
            how = "none" if any(reads(graph, other, one.id) for other in narrow) else "exact"
        yield one.id, how, len(full) > 1, (operation.index, place) if len(full) > 1 else None


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


def _channel_operand(graph: Graph, operation: Operation, since: int) -> int | None:
    """Of two activations that are multiplied the one whose channels the reader has; the right one if none can tell."""
    factors = [i for i in operation.inputs if graph.nodes[i].state == "activation"][-2:]
    if len(factors) < 2:
        return factors[0] if factors else None
    last = graph.nodes[since].dims[-1:] or ((),)
    wanted = {digit.axis for digit in last[0] if graph.axes[digit.axis].kind == "features"}
    for number in (factors[1], factors[0]):
        if wanted & {digit.axis for dim in graph.nodes[number].dims for digit in dim}:
            return number
    return factors[1]


def readers_of(graph: Graph, start: int) -> list[Reader]:
    """All that reads a value, through views, casts and copies; the model's output is a reader."""
    found: list[Reader] = []
    todo, seen = [start], {start}
    while todo:
        number = todo.pop(0)
        if number in graph.outputs:
            found.append(Reader("output", "output", ""))
        for operation in graph.consumers.get(number, []):
            if operation.kind == "view":
                for out in operation.outputs:
                    if out not in seen:
                        seen.add(out)
                        todo.append(out)
                continue
            found.append(_reader(graph, operation, number))
    return found


def _reader(graph: Graph, operation: Operation, number: int) -> Reader:
    calls: list[Call] = [c for c in graph.at(operation.index) if c.input == number and c.kind != "bias"]
    if not calls:
        calls = [c for c in graph.at(operation.index) if c.input == number]
    if calls:
        return Reader(operation.name, calls[0].kind, operation.module, calls[0])
    return Reader(operation.name, operation.kind, operation.module)


__all__ = ["Rows", "activations", "is_number", "readers_of", "reads", "source_of", "weaker", "writers_of"]
