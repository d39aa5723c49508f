"""Other nodes in the place of an ONNX graph's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from s2d.optional import require


def put_nodes(model: Any, nodes: Iterable[Any], constants: Iterable[Any] = ()) -> None:
    """Let a graph have these nodes, and no constant that nothing reads any more.

    Args:
        model: An ONNX ``ModelProto``; changed.
        nodes: All of them, in order; those of the graph may be among them.
        constants: Initializers to add.
    """
    graph = model.graph
    copies = require("onnx", "export").GraphProto()  # the graph's own are gone once they are taken out
    copies.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(copies.node)
    graph.initializer.extend(constants)
    read = {*_read(graph.node), *(each.name for each in graph.output)}
    for index in reversed(range(len(graph.initializer))):  # in place: weights are not copied
        if graph.initializer[index].name not in read:
            del graph.initializer[index]


def _read(nodes: Iterable[Any]) -> Iterator[str]:
    """What nodes read, those in the branches and loops that they hold included."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from (*_read(graph.node), *(each.name for each in graph.output))
