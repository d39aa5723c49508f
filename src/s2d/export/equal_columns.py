"""Give the columns of a weight one size, for quantizers that take one range for the whole tensor.

``x W`` is ``(x W diag(s)) / s``. With ``s`` the largest column over each, no column loses bits to a larger one: the
file itself holds what a scale per channel would keep. The division follows the product in full precision, because
neither onnxruntime's nor NNCF's quantizer chooses a ``Div``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from s2d.export.onnx_nodes import put_nodes
from s2d.optional import require

MOST = 64.0  # a smaller column, or one of zeros, is not scaled further: its outputs do not count


def equal_columns(model: Any, beyond: float = 1.0) -> int:
    """Scale the columns of constant weights of MatMul to the largest one, and divide behind the product.

    Args:
        model: An ONNX ``ModelProto``, its constants initializers; changed.
        beyond: Only weights whose largest column is more than so many times the median one.

    Returns:
        The products that were rewritten.
    """
    onnx = require("onnx", "export")
    held = {each.name: each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT}
    written, made, count = [], [], 0
    for node in model.graph.node:
        written.append(node)
        if node.op_type != "MatMul" or node.input[1] not in held or len(held[node.input[1]].dims) != 2:
            continue
        weight_IO = onnx.numpy_helper.to_array(held[node.input[1]])
        largest_O = np.abs(weight_IO).max(0)
        if largest_O.max() <= beyond * np.median(largest_O) or largest_O.max() == largest_O.min():
            continue
        scale_O = largest_O.max() / np.maximum(largest_O, largest_O.max() / MOST)
        weight, scale, wide = (f"columns_{count}.{what}" for what in ("weight", "scale", "wide"))
        made.append(onnx.numpy_helper.from_array(weight_IO * scale_O, weight))
        made.append(onnx.numpy_helper.from_array(scale_O, scale))
        written.append(onnx.helper.make_node("Div", [wide, scale], list(node.output), name=f"columns_{count}.Div"))
        node.input[1], node.output[0] = weight, wide
        count += 1
    put_nodes(model, written, made)
    return count
