"""Nodes of ONNX graphs: others in their place, and what constants are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from s2d.optional import require

PRODUCTS = ("MatMul", "Gemm", "Conv")  # of weights
# Operators that hand a constant on to the scores: arithmetic of masks, and what changes shapes.
_ARITHMETIC = ("Where", "Mul", "Add", "Sub", "Min", "Max", "Clip", "Neg", "Cast", "CastLike", "Identity", "Trilu")
_SHAPES = ("Expand", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Concat", "Tile", "Transpose", "Split", "Flatten")
CARRIERS = frozenset((*_ARITHMETIC, *_SHAPES, "Gather", "GatherND", "ScatterND", "ConstantOfShape"))


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


def inner_graphs(node: Any) -> Iterator[Any]:
    """The branches and bodies that a node holds."""
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)


def constants_held(model: Any) -> Any:
    """A copy of a model whose constants are initializers, not Constant nodes.

    Args:
        model: An ONNX ``ModelProto``.
    """
    onnx = require("onnx", "export")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes, constants = [], []
    for node in made.graph.node:
        tensor = next((each.t for each in node.attribute if each.name == "value"), None)
        if node.op_type != "Constant" or tensor is None:
            nodes.append(node)
            continue
        constants.append(onnx.TensorProto())
        constants[-1].CopyFrom(tensor)
        constants[-1].name = node.output[0]
    if constants:
        put_nodes(made, nodes, constants)
    return made


def _read(nodes: Iterable[Any]) -> Iterator[str]:
    """What nodes read, those in the branches and loops that they hold included."""
    for node in nodes:
        yield from node.input
        for graph in inner_graphs(node):
            yield from (*_read(graph.node), *(each.name for each in graph.output))
