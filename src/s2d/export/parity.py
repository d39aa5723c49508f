"""Parity: exported layers against simulated ones, on the inputs that the runtime itself saw.

A whole network of rounded layers is chaotic: one code that flips in an early layer changes the output as much as a
perturbation of 1e-6 does. So layers are compared one by one, row by row: a row either agrees to floating-point accuracy
or holds a code that fell on the other side of a tie, and the share of such rows is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.export.lowering import LoweredLinear, LoweredOnlineLinear, Rounded
from s2d.export.onnx import session
from s2d.export.operators import Form
from s2d.optional import require
from s2d.quant.modules.linear import QuantizedLinear

TOLERANCE = 1e-5
FLIPS = 0.01
HELD = 2**28  # bytes of layers' inputs and outputs that are held at once
FEW = 2  # rows; in a small batch a single row exceeds the share
_TOKEN_BEFORE = ("Cast", "Clip", "Add", "Round", "Div")
_TOKEN_AFTER = ("Cast", "Sub", "Mul", "Mul")


@dataclass(frozen=True)
class LayerParity:
    """How one layer compares.

    Attributes:
        name: The module.
        error: Median over rows of ``max |y - y_ref| / max |y_ref|``.
        flipped: Share of rows that differ by more than the tolerance: a code on the other side of a tie.
        rows: How many were compared.
    """

    name: str
    error: float
    flipped: float
    rows: int

    @property
    def passed(self) -> bool:
        """Whether rows agree, ties aside."""
        return self.error <= TOLERANCE and self.flipped <= max(FLIPS, FEW / self.rows)


def compare_layers(
    path: Path, lowered: nn.Module, reference: nn.Module, feed: dict[str, Tensor], form: Form = "qdq"
) -> tuple[list[LayerParity], list[str]]:
    """Run a file once with every layer's input and output shown, and the reference's layers on those inputs.

    Args:
        path: The ONNX file.
        lowered: The model that the file was written from.
        reference: The quantized model.
        feed: A batch.
        form: The file's.

    Returns:
        A row for every quantized Linear, and the names of those that could not be found in the graph.
    """
    onnx = require("onnx", "export")
    model = onnx.load(str(path))
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    read_by: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(node)
    pairs: list[tuple[str, tuple[str, str]]] = []  # a layer that the model runs more than once has more than one
    missing = []
    for name, module in lowered.named_modules():
        if isinstance(module, (LoweredLinear, LoweredOnlineLinear)):
            found = _ends(f"model.{name}.weight_codes.codes", module, made_by, read_by, form)
            if not found:
                missing.append(name)
            pairs += [(name, ends) for ends in found]
    shown = {each.name for each in graph.output}
    for value in dict.fromkeys(value for _, pair in pairs for value in pair):
        if value not in shown:
            graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    content = model.SerializeToString()
    del model, graph
    run = session(path, content=content)
    inputs = {each.name: feed[each.name].numpy() for each in run.get_inputs()}
    rows: list[LayerParity] = []
    count = 1
    while len(rows) < len(pairs):  # each run is a whole forward, so it shows as many layers as memory allows
        part = pairs[len(rows) : len(rows) + count]
        values = iter(run.run([value for _, ends in part for value in ends], inputs))
        largest = 0
        for (name, _), x, y in zip(part, values, values, strict=True):
            largest = max(largest, x.nbytes + y.nbytes)
            rows.append(_compare(name, reference.get_submodule(name), torch.from_numpy(x), torch.from_numpy(y)))
        count = max(1, HELD // largest)
    return rows, missing


@torch.no_grad()
def compare_modules(
    quantized: nn.Module, found: nn.Module, whole: nn.Module, prefix: str, feed: Mapping[str, Tensor]
) -> tuple[list[LayerParity], list[str]]:
    """Compare the Linears of a model that another library read with the quantized ones, on equal inputs.

    Args:
        quantized: The quantized model.
        found: The other one; its layers have the same names.
        whole: A model around the quantized one, or that itself, on the same weights: what the inputs come from.
        prefix: Of the quantized one's names in it.
        feed: A batch for it.

    Returns:
        A row for every quantized Linear, and the names of those that the other model lacks.
    """
    layers = {name: each for name, each in quantized.named_modules() if isinstance(each, QuantizedLinear)}
    theirs = dict(found.named_modules())
    names = {whole.get_submodule(f"{prefix}{name}"): name for name in layers}
    rows: dict[str, LayerParity] = {}

    def compare(module: Any, inputs: tuple[Tensor, ...]) -> None:
        name = names[module]
        if name in theirs and name not in rows:
            rows[name] = _compare(name, layers[name], inputs[0], theirs[name](inputs[0]))

    handles = [module.register_forward_pre_hook(compare) for module in names]
    try:
        whole(**feed)
    finally:
        for handle in handles:
            handle.remove()
    return [rows[name] for name in layers if name in rows], [name for name in layers if name not in rows]


@torch.no_grad()
def _compare(name: str, layer: Any, x: Tensor, y: Tensor) -> LayerParity:
    expected = layer.quantized_product(x).flatten(0, -2)
    layer.eval()  # its quantizer forgets the rounded weight that it keeps
    difference = (y.flatten(0, -2) - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(min=1e-12)
    flipped = float((difference > TOLERANCE).float().mean())
    return LayerParity(name, float(difference.median()), flipped, len(difference))


def _ends(
    codes: str, module: Any, made_by: dict[str, Any], read_by: dict[str, list[Any]], form: Form
) -> list[tuple[str, str]]:
    """The names of a layer's (transformed) input and of its output before any low-rank branch, for every use of it.

    Empty when any use of it is not understood.
    """

    def only(value: str, kind: str) -> Any:
        found = [node for node in read_by.get(value, ()) if node.op_type == kind]
        return found[0] if len(found) == 1 else None

    values = [codes]
    # Skip any of these nodes in between. A product with a scale per token takes the codes unpacked.
    integer = module.token is not None or module.written_out
    between = ("Cast",) if integer else ("Cast", "DequantizeLinear", "Cast", "Mul", "Reshape")
    for kind in between:
        after_it: list[str] = []
        for value in values:
            outputs = [node.output[0] for node in read_by.get(value, ()) if node.op_type == kind]
            outputs = [each for each in outputs if not integer or each.endswith(".int8")]
            after_it += outputs or [value]
        values = after_it
    kind = "MatMulInteger" if integer else "MatMul"
    products = [node for value in values for node in read_by.get(value, ()) if node.op_type == kind]
    if module.token is not None:
        before, after = _TOKEN_BEFORE, _TOKEN_AFTER
    else:
        rounded = isinstance(module.input_quantizer, Rounded)
        clipped = rounded and module.input_quantizer.clips
        codes_of = ("QuantizeLinear",) if module.written_out else ("DequantizeLinear", "QuantizeLinear")
        before = (codes_of if rounded else ()) + (("Clip",) if clipped else ())
        after = ("Cast", "Mul") if module.written_out else ()
    ends = []
    for product in products:
        x, y = product.input[0], product.output[0]
        for kind in before:
            node = made_by.get(x)
            if node is None or node.op_type != kind:
                return []
            x = node.input[0]
        for kind in (*after, *(("Add",) if module.bias is not None else ())):
            node = only(y, kind)
            if node is None:
                return []
            y = node.output[0]
        ends.append((x, y))
    return ends
