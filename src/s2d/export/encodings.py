"""Encodings: the model in float32, and the ranges of its tensors beside it, for tools that quantize from these.

The file ``NAME.encodings`` follows AIMET's quantization encoding specification, version 1.0.0, which Qualcomm's QAIRT
reads (``--quantization_overrides``). A value is ``(code + offset) * scale`` with codes from 0; symmetric ranges have
the offset ``-2^(bw-1)``. ``NAME.onnx`` holds the weights as their codes stand for them, so rounding them again finds
the same codes. Both come from one traced graph: its pairs of QuantizeLinear and DequantizeLinear are taken out of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export.copies import shared_copy
from s2d.export.gate import Check, ExportReport, give_back, judge_layers
from s2d.export.lowering import lower
from s2d.export.onnx import TWO_GB, OnnxModel, tensors_of, write_onnx
from s2d.export.parity import compare_layers
from s2d.export.plain_layers import plain_layers
from s2d.io.files import in_place_of
from s2d.optional import require
from s2d.quant.modules.record import remove

NAME = "the encodings file"
SUFFIX = ".encodings"
VERSION = "1.0.0"
# Types of ONNX: the width of their codes, and whether they are signed.
_BITS = {21: (4, False), 22: (4, True), 2: (8, False), 3: (8, True), 4: (16, False), 5: (16, True)}
TYPES = (4, 8, 16)  # bits of a tensor; a narrower grid inside a type would be lost with its Clip
SAME = 1e-4  # of the largest output: float32 in another order of sums


def export_encodings(
    model: nn.Module, target: Path, report: ExportReport, example: Mapping[str, Tensor], check: Check
) -> None:
    """Write ``NAME.onnx`` in float32 and ``NAME.encodings``.

    Args:
        model: Quantized; static ranges, one a tensor, and weights with a scale a tensor or a channel.
        target: ``NAME.encodings``.
        report: Filled in; its layers are those of the traced graph with the codes still in it.
        example: A batch of keyword inputs.
        check: The comparisons and consequences.

    Raises:
        InputError: A site has no encoding; the float32 file does not compute what the model of rounded weights does.
    """
    onnx = require("onnx", "export")
    for layer in plain_layers(model, NAME):
        if layer.weight.granularity == "group" or (layer.activation is not None and layer.activation.dynamic):
            raise InputError(
                f"{layer.name}: {NAME} has static ranges for inputs, and a scale a channel or a tensor for weights; "
                "the nearest spec is w8a8"
            )
        if layer.activation is not None and layer.activation.format.bits not in TYPES:
            raise InputError(
                f"{layer.name} rounds its input to {layer.activation.format.name}, and {NAME} describes activations of "
                f"{', '.join(map(str, TYPES))} bits; the nearest spec is '{{base: w8a8, attention: false}}'"
            )
    if (size := sum(each.numel() for each in model.parameters()) * 4) > TWO_GB:
        raise InputError(f"{type(model).__name__} has {size / 1e9:.1f} GB in float32, and one ONNX file holds 2 GB")
    report.embeddings = 0
    with in_place_of(target) as made:
        traced = made.with_suffix(".traced.onnx")
        check.notes("tracing")
        lowered = lower(model, "types")
        write_onnx(lowered, example, traced, form="types")
        check.notes("comparing every layer")
        reference = shared_copy(model)
        judge_layers(report, *compare_layers(traced, lowered, reference, dict(example), "types"))
        del lowered
        give_back()
        graph, content = take_out(onnx.load(os.fspath(traced)))
        traced.unlink()
        onnx.save(graph, os.fspath(made.with_suffix(".onnx")))
        made.write_text(json.dumps(content, indent=1), encoding="utf-8")
        report.file_mb = sum(each.stat().st_size for each in made.parent.iterdir()) / 1e6
        report.fp32_mb = sum(each.numel() for each in model.parameters()) * 4 / 1e6
        report.about = [
            f"the multiply: up to the tool that reads it; {len(content['param_encodings'])} weights and "
            f"{len(content['activation_encodings'])} other tensors have encodings"
        ]
        with torch.no_grad():
            (name, expected), *_ = tensors_of(remove(_with_rounded_weights(model))(**example)).items()
            output = OnnxModel(made.with_suffix(".onnx"))(**example)
        found = output if isinstance(output, Tensor) else output[name]
        moved = float((found - expected).abs().max() / expected.abs().max())
        report.parity = {"metric": "distance", "split": "example", "simulated": 0.0, "exported": moved}
        report.parity["perturbed"] = 0.0
        if not moved <= SAME:
            report.failures.append(f"the float32 file is {moved:.1e} from the model of rounded weights")
        report.refuse(target, check.force)


def take_out(model: Any) -> tuple[Any, dict[str, Any]]:
    """Take the quantization out of a traced graph.

    Args:
        model: An ONNX ``ModelProto`` in the form of types; changed.

    Returns:
        The model in float32, and the content of the encodings file.
    """
    onnx = require("onnx", "export")
    graph = model.graph
    held = {each.name: each for each in graph.initializer}
    known = dict(held)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            known[node.output[0]] = node.attribute[0].t
    cast = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}  # zero points of 4-bit grids

    def value(name: str) -> np.ndarray:
        return onnx.numpy_helper.to_array(known[cast[name].input[0] if name in cast else name])

    def bits_of(name: str) -> tuple[int, bool]:
        return _BITS[cast[name].attribute[0].i if name in cast else known[name].data_type]

    made_by = {output: node for node in graph.node for output in node.output}
    weights, activations, gone, renamed = [], {}, set(), {}
    for node in list(graph.node):
        if node.op_type != "DequantizeLinear":
            continue
        scale = value(node.input[1])
        if node.input[0] in held:
            codes = value(node.input[0])
            name = node.input[0].removesuffix("_codes.codes").removesuffix(".codes")
            weights.append(_entry(name, *bits_of(node.input[0]), scale))
            graph.initializer.append(onnx.numpy_helper.from_array(codes.astype(np.float32) * scale, name))
            renamed[node.output[0]] = name
            gone.add(node.input[0])
        else:
            pair = made_by[node.input[0]]
            source = pair.input[0]
            clip = made_by.get(source)
            if clip is not None and clip.op_type == "Clip":
                source = clip.input[0]
                graph.node.remove(clip)
            typed = next(each for each in (pair.input[2], node.input[2]) if each)
            found = _entry(source, *bits_of(typed), scale, -int(value(typed)))
            if activations.setdefault(source, found) != found:
                raise InputError(f"{source} is rounded in two ways, and {NAME} holds one a tensor")
            renamed[node.output[0]] = source
            graph.node.remove(pair)
    kept = [node for node in graph.node if node.op_type != "DequantizeLinear"]
    for node in kept:
        node.input[:] = [_final(each, renamed) for each in node.input]
    read: set[str] = set()
    while (now := {name for node in kept for name in node.input} | {each.name for each in graph.output}) != read:
        read = now
        kept = [node for node in kept if set(node.output) & read]  # what only the codes needed goes with them
    outputs = {name for node in kept for name in node.output}
    for index in range(len(graph.node) - 1, -1, -1):
        if not set(graph.node[index].output) & outputs:
            del graph.node[index]
    for index in range(len(graph.initializer) - 1, -1, -1):
        if graph.initializer[index].name in gone or graph.initializer[index].name not in read:
            del graph.initializer[index]
    graph.ClearField("value_info")
    return model, {
        "version": VERSION,
        "activation_encodings": list(activations.values()),
        "param_encodings": weights,
        "excluded_layers": [],
        "producer": "s2d",
    }


def _final(name: str, renamed: Mapping[str, str]) -> str:
    while name in renamed:
        name = renamed[name]
    return name


def _entry(name: str, bits: int, symmetric: bool, scale: np.ndarray, offset: int = 0) -> dict[str, Any]:
    """One encoding; of a symmetric range the offset is that of the specification."""
    scales = [float(each) for each in scale.reshape(-1)]
    return {
        "name": name,
        "dtype": "INT",
        "bw": bits,
        "enc_type": "PER_CHANNEL" if scale.ndim else "PER_TENSOR",
        "is_sym": symmetric,
        "scale": scales,
        "offset": [-(2 ** (bits - 1)) if symmetric else offset] * len(scales),
    }


def _with_rounded_weights(model: nn.Module) -> nn.Module:
    made = shared_copy(model)
    for layer in plain_layers(made, NAME):
        linear: Any = made.get_submodule(layer.name)
        linear.weight = nn.Parameter(linear.weight_quantizer(linear.weight.detach()), requires_grad=False)
    return made
