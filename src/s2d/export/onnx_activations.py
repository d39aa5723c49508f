"""Find activations of an ONNX file that one range does not fit: one channel is many times the others.

A static quantizer gives one range to a tensor. Eight bits over a range that a single channel sets leave little to the
typical channel. Weights show such channels only in part, so the file is run and the inputs of its products and sums
are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2d.errors import InputError, first_line
from s2d.export.float_stream import stream_nodes
from s2d.export.onnx_nodes import CARRIERS, PRODUCTS, constants_held
from s2d.optional import require

# Operators whose inputs static quantizers give a range, and of products their outputs too.
_RANGED = (*PRODUCTS, "Add", "LayerNormalization")


@dataclass(frozen=True)
class WideActivation:
    """An activation with a channel beyond the others.

    Attributes:
        name: The tensor.
        operator: The type of the first node for which it gets a range.
        channel: The channel with the largest value.
        largest: That value.
        ratio: It over the largest value of the median channel.
        in_stream: Whether it gets a range for nodes of the residual stream alone, which `float_stream` rewrites.
    """

    name: str
    operator: str
    channel: int
    largest: float
    ratio: float
    in_stream: bool


def wide_activations(
    model: Any, feed: Mapping[str, np.ndarray], limit: float, path: str | os.PathLike[str]
) -> list[WideActivation]:
    """Activations whose largest channel is more than ``limit`` times the median one: the stream's, then others, the
    widest first.

    Args:
        model: An ONNX ``ModelProto``.
        feed: Inputs by name.
        limit: The ratio above which an activation counts.
        path: Name of the file, for messages.

    Raises:
        InputError: The file does not run on these inputs.
    """
    onnx = require("onnx", "export")
    probe = constants_held(model)
    held = {each.name for each in probe.graph.initializer}
    scores = _scores(probe)
    stream = {node.output[0] for node in stream_nodes(probe)}
    ranged: dict[str, str] = {}  # tensor -> the operator for which it gets a range
    axes: dict[str, int] = {}
    outside: set[str] = set()  # what gets a range for an operator that is not the stream's
    for node in probe.graph.node:
        if node.op_type not in _RANGED:
            continue
        names = [*node.input, *(node.output if node.op_type in PRODUCTS else ())]
        for name in names:
            if name and name not in held and name not in scores:
                ranged.setdefault(name, node.op_type)
                axes[name] = 1 if node.op_type == "Conv" else axes.get(name, -1)
        outside.update(names if node.output[0] not in stream else ())
    inner = {name for node in probe.graph.node for name in node.output}
    known = {each.name for each in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ranged if name in inner - known)
    values = outputs_of(probe, feed, path) | dict(feed)
    found = []
    for name, operator in ranged.items():
        value = values.get(name)
        # Tokens and pixels have their channels last or, before a convolution, second; heads of attention have neither.
        axis = axes[name]
        dims = (4,) if axis == 1 else (2, 3)
        if value is None or value.ndim not in dims or value.dtype not in (np.float32, np.float16):
            continue
        sizes_C = np.abs(np.moveaxis(value, axis, -1).astype(np.float64)).reshape(-1, value.shape[axis]).max(0)
        alive = sizes_C[sizes_C > 0]
        if len(alive) < 3 or not np.isfinite(alive).all():
            continue
        largest, ratio = float(alive.max()), float(alive.max() / np.median(alive))
        if ratio > limit:
            found.append(WideActivation(name, operator, int(sizes_C.argmax()), largest, ratio, name not in outside))
    return sorted(found, key=lambda each: (not each.in_stream, -each.ratio))


def _scores(model: Any) -> set[str]:
    """Scores of attention, their masks and their softmax: their last axis holds tokens, not channels."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    found = {name for node in model.graph.node if node.op_type == "Softmax" for name in node.output}
    open_ = [name for node in model.graph.node if node.op_type == "Softmax" for name in node.input]
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            node = made_by.get(name)
            open_ += node.input if node is not None and node.op_type in CARRIERS else ()
    return found


def outputs_of(model: Any, feed: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """What a model gives for inputs, by name.

    Raises:
        InputError: It does not run on them.
    """
    from s2d.export.onnx import session

    run = session(Path(path), content=model.SerializeToString())
    names = [each.name for each in run.get_outputs()]
    missing = [each.name for each in run.get_inputs() if each.name not in feed]
    if missing:
        raise InputError(f"{path} reads {', '.join(missing)}, which the inputs lack; they have {', '.join(feed)}")
    try:
        found = run.run(None, {each.name: feed[each.name] for each in run.get_inputs()})
    except Exception as error:  # onnxruntime's own
        raise InputError(f"{path} does not run on these inputs: {first_line(error)}") from error
    return dict(zip(names, (np.asarray(each) for each in found), strict=True))
