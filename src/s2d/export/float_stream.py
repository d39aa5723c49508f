"""Keep the residual stream of an ONNX file in full precision under quantizers that would give it one range.

The last blocks of a transformer write a few channels that are a hundred times the others. A static quantizer gives one
range to a tensor, so 8 bits of the stream hold little of the other channels, and the error passes through every later
addition. Quantizers choose by the type of a node and by its number format. What makes the stream is therefore written
in standard operators that neither onnxruntime's nor NNCF's quantizer chooses: ``a + b`` as ``Mean(a, b) / 0.5``, which
is exact in binary numbers, ``a * s`` as ``a / (1 / s)``, and a norm in float64. Products stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from s2d.export.onnx_nodes import PRODUCTS, put_nodes
from s2d.optional import require


def keep_stream(model: Any) -> int:
    """Write the nodes of the residual stream in operators that static quantizers leave.

    Only models with additions of two computed tensors of which a LayerNormalization reads the sum are changed.

    Args:
        model: An ONNX ``ModelProto`` at opset 18 or later, its constants initializers; changed.

    Returns:
        The nodes that were rewritten.
    """
    onnx = require("onnx", "export")
    held = _floats(model)
    found = {node.output[0] for node in stream_nodes(model)}
    if not found:
        return 0
    written, made = [], []
    for index, node in enumerate(model.graph.node):
        if node.output and node.output[0] in found:
            values = {name: onnx.numpy_helper.to_array(held[name]) for name in node.input if name in held}
            written += _instead(node, f"stream_{index}", values, made)
        else:
            written.append(node)
    put_nodes(model, written, made)
    return len(found)


def stream_nodes(model: Any) -> list[Any]:
    """The nodes that make the residual stream: sums that a norm reads, these norms, biases and scales of branches.

    Args:
        model: An ONNX ``ModelProto``, its constants initializers.
    """
    nodes, held = list(model.graph.node), _floats(model)
    made_by = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def vector(node: Any, kinds: tuple[str, ...]) -> bool:
        """Whether a node combines a computed tensor with a constant ``[C]``."""
        found = [len(held[name].dims) for name in node.input if name in held]
        return found == [1] and node.op_type in kinds and len(node.input) == 2

    def computed(node: Any) -> str:
        return next(name for name in node.input if name not in held)

    norms = [node for node in nodes if node.op_type == "LayerNormalization" and set(node.input[1:]) <= set(held)]
    read = {node.input[0] for node in norms}
    sums = [
        node for node in nodes if node.op_type == "Add" and node.output[0] in read and not set(node.input) & {*held}
    ]
    if not sums:
        return []
    chosen = [*norms, *sums]
    for node in sums:
        for name in node.input:
            branch = made_by.get(name)
            while branch is not None and vector(branch, ("Add", "Mul")) and len(readers[branch.output[0]]) == 1:
                chosen.append(branch)
                branch = made_by.get(computed(branch))
    chosen += [
        node
        for node in nodes
        if vector(node, ("Add",)) and getattr(made_by.get(computed(node)), "op_type", "") in PRODUCTS
    ]
    return chosen


def _floats(model: Any) -> dict[str, Any]:
    """The initializers in float32, by name."""
    floats = require("onnx", "export").TensorProto.FLOAT
    return {each.name: each for each in model.graph.initializer if each.data_type == floats}


def _instead(node: Any, name: str, held: dict[str, np.ndarray], made: list[Any]) -> list[Any]:
    """The nodes that compute what one node did; their constants are added to ``made``."""
    onnx = require("onnx", "export")
    make = onnx.helper.make_node

    def constant(what: str, values: Any) -> str:
        made.append(onnx.numpy_helper.from_array(np.asarray(values), f"{name}.{what}"))
        return made[-1].name

    if node.op_type == "Add":
        half = constant("half", np.float32(0.5))
        mean = make("Mean", list(node.input), [f"{name}.mean"], name=f"{name}.Mean")
        return [mean, make("Div", [f"{name}.mean", half], list(node.output), name=f"{name}.Div")]
    if node.op_type == "Mul":
        (scale,) = held
        other = next(each for each in node.input if each != scale)
        with np.errstate(divide="ignore"):
            inverse = constant("inverse", 1.0 / held[scale])  # infinite for a scale of 0: the product is 0
        return [make("Div", [other, inverse], list(node.output), name=f"{name}.Div")]
    double = onnx.TensorProto.DOUBLE
    inputs = [
        f"{name}.double",
        *(constant(f"norm{at}", held[each].astype(np.float64)) for at, each in enumerate(node.input[1:])),
    ]
    norm = make(node.op_type, inputs, [f"{name}.norm"], name=node.name)
    norm.attribute.extend(node.attribute)
    return [
        make("Cast", [node.input[0]], [inputs[0]], name=f"{name}.Cast", to=double),
        norm,
        make("Cast", [f"{name}.norm"], [node.output[0]], name=f"{name}.Cast_1", to=onnx.TensorProto.FLOAT),
    ]
