"""Residual streams that names suggest, held against the graph of a forward: what else reads or writes them?

A stream may change its basis where three things hold in the traced forward (`s2d.trace`): each norm's output is read by
the named Linears alone; between the first block and the last, the stream is read by sums and by these norms alone; and
each writer's output, times its LayerScale, goes into such sums alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.graph_parts import Norm, Operation
from s2d.models.walks import source_of
from s2d.quant.modules.folding import Branch, Stream

_REMEDY = "use a method that folds nothing, such as gptq or svdquant"


def refuse_contradicted(streams: Sequence[Stream], graph: Graph, method: str) -> None:
    """Raise InputError if the graph shows a reader of a stream, or of a norm, that the names do not tell."""
    for stream in streams:
        for branch in stream.branches:
            _check_norm(branch, graph, method)
        _check_stream(stream, graph, method)


def uses_of(norm: str, graph: Graph) -> list[Norm]:
    """Every use of a norm in the graph, by its gain, or by its module where it has none."""
    return [use for use in graph.norms if f"{norm}.weight" in use.gain or (not use.gain and use.module == norm)]


def _check_norm(branch: Branch, graph: Graph, method: str) -> None:
    uses = uses_of(branch.norm, graph)
    if not uses:
        raise InputError(f"{method} finds {branch.norm} nowhere in what the model did; {_REMEDY}")
    for use in uses:
        for reader in use.readers:
            names = () if reader.call is None else reader.call.parameters
            if reader.kind != "product" or {name.rpartition(".")[0] for name in names}.isdisjoint(branch.readers):
                who = names[0] if names else f"{reader.op} in {reader.module or 'the model'}"
                raise InputError(f"{method} cannot move {branch.norm} into what reads it: {who} does too; {_REMEDY}")


def _check_stream(stream: Stream, graph: Graph, method: str) -> None:
    inside = tuple(f"{block}." for block in stream.blocks)
    norms = tuple(f"{branch.norm}." for branch in stream.branches)
    scales = {branch.scale for branch in stream.branches}
    writers = {branch.writer for branch in stream.branches}
    todo = [source_of(graph, use.input) for branch in stream.branches for use in uses_of(branch.norm, graph)]
    todo += [
        call.output
        for call in graph.products
        if not writers.isdisjoint(name.rpartition(".")[0] for name in call.parameters)
    ]
    seen = set(todo)
    while todo:
        node = todo.pop()
        made = graph.nodes[node].operation
        maker = f"{graph.operations[made].module}." if made >= 0 else ""
        for operation in graph.consumers.get(node, []):
            where = f"{operation.module}."
            if where.startswith(norms):
                continue
            if not where.startswith(inside):
                # In front of the first block and behind the last one the stream has its own basis.
                if not maker.startswith(inside) or maker.startswith(inside[-1]) or operation.kind == "view":
                    continue
                raise _contradiction(stream, operation, method)
            if operation.kind not in ("view", "add") and not _scales(graph, operation, scales):
                raise _contradiction(stream, operation, method)
            fresh = [output for output in operation.outputs if output not in seen]
            seen.update(fresh)
            todo += fresh


def _scales(graph: Graph, operation: Operation, scales: set[str | None]) -> bool:
    """Whether an operation is the product with a LayerScale."""
    return any(call.kind == "gain" and not scales.isdisjoint(call.parameters) for call in graph.at(operation.index))


def _contradiction(stream: Stream, operation: Operation, method: str) -> InputError:
    return InputError(
        f"{method} cannot turn the residual stream of {stream.blocks[0]} to {stream.blocks[-1]}: {operation.name} in "
        f"{operation.module or 'the model'} reads it as well; {_REMEDY}"
    )
