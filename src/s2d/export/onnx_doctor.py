"""Find what spoils static quantization of an ONNX file from any exporter, and write a repaired file.

Static quantizers give every tensor one range, from its smallest to its largest value. Exporters write a mask as a
constant of -3.4e38 (or minus infinity) that is added to the scores of attention: the range of the masked scores is then
so wide that all scores are one code. A softmax does not tell -3.4e38 from -100 behind scores of ordinary size, so the
constant can be bounded; the file is run before and after to see that it computes the same. Run on inputs, the file also
shows activations with a channel that is many times the others. Where the residual stream makes them, it can be kept in
full precision (see `float_stream`); weights with one large column can have columns of one size (see `equal_columns`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2d.errors import InputError, first_line
from s2d.export.equal_columns import equal_columns
from s2d.export.float_stream import keep_stream
from s2d.export.onnx_activations import outputs_of, wide_activations
from s2d.export.onnx_nodes import CARRIERS, PRODUCTS, constants_held, inner_graphs
from s2d.optional import require

HUGE = 1e4  # no score of an attention is that large; masks in float16 are -65504
BOUNDS = (100.0, 1000.0, 10000.0)  # exp(-100) is 4e-44; the later ones are for models whose scores are enormous
SAME = 1e-6
SAME_SUMS = 1e-5  # where sums and products are rewritten: float32 in another order
OUTLIER = 8.0  # largest channel over the median one: under one range 3 bits of the others are gone
# Opsets: a scale per channel; norms as nodes; codes of 4 bits and blocks.
OLDEST, NORMS, NEEDED = 13, 17, 21
ROWS = 16  # of given inputs: each inner tensor of theirs is held at once


@dataclass(frozen=True)
class Finding:
    """One thing that spoils a range.

    Attributes:
        kind: ``"mask"``, ``"channels"``, ``"activation"``, ``"stream"`` (an activation that the residual stream makes),
            ``"shared"``, ``"values"``, ``"opset"`` or ``"quantized"``.
        where: The constant, the weight, the activation, or the opset.
        text: The problem and its effect, in one line.
        fixed_by: ``"--fix"``, or another remedy.
    """

    kind: str
    where: str
    text: str
    fixed_by: str

    def to_dict(self) -> dict[str, str]:
        """JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Repair:
    """What was changed in a repaired file.

    Attributes:
        masks: Mask constants that were bounded.
        bound: Their new size.
        stream: Nodes of the residual stream that are now in operators that quantizers leave in floats.
        columns: Products whose weights have columns of one size now.
        opset: The opset, if it was converted; else 0.
        moved: How far the outputs are from the file's, relative to their largest value.
    """

    masks: int
    bound: float
    stream: int
    columns: int
    opset: int
    moved: float

    def __str__(self) -> str:
        """One line."""
        parts = (
            (self.masks, f"mask constants at -{self.bound:.0f}: {self.masks}"),
            (self.stream, f"nodes of the residual stream in floats: {self.stream}"),
            (self.columns, f"products with equal columns of weights: {self.columns}"),
            (self.opset, f"opset {self.opset}"),
        )
        done = ", ".join(text for count, text in parts if count) or "nothing in it that --fix repairs; a copy"
        return f"{done}; outputs moved by {self.moved:.1e} of their largest value"


@dataclass(frozen=True)
class _Constant:
    """A constant of floats: its tensor, and the name under which nodes read it."""

    name: str
    tensor: Any

    @property
    def values(self) -> np.ndarray:
        return require("onnx", "export").numpy_helper.to_array(self.tensor)


def open_file(path: str | os.PathLike[str]) -> Any:
    """An ONNX file as protobuf, weights included.

    Raises:
        InputError: No such file, not ONNX, or damaged.
    """
    onnx = require("onnx", "export")
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source} is not there; name a file ending in .onnx")
    try:
        model = onnx.load(os.fspath(source))
        if not model.graph.node:
            raise InputError(f"{source} is no ONNX file, or holds no graph; name a file ending in .onnx")
        for weight in model.graph.initializer:
            onnx.checker.check_tensor(weight)
        return model
    except InputError:
        raise
    except Exception as error:  # protobuf's own, and missing weights beside the file
        raise InputError(f"{source} cannot be read as ONNX: {first_line(error)}") from error


def examine(
    model: Any, feed: Mapping[str, np.ndarray] | None = None, path: str | os.PathLike[str] = "the file"
) -> list[Finding]:
    """What spoils the static ranges of a model.

    Args:
        model: An ONNX ``ModelProto`` with its weights.
        feed: Inputs by name, to look at activations too.
        path: Name of the file, for messages.

    Raises:
        InputError: The model does not run on the inputs.
    """
    if already := _quantized(model):
        return [already]
    wide = () if feed is None else _wide(model, feed, path)
    return [*_masks_found(model), *_values(model), *wide, *_channels(model), *_shared(model), *_opset(model)]


def unexamined(model: Any) -> int:
    """The number of nodes inside branches and loops, which are not looked at."""
    return sum(len(graph.node) for node in model.graph.node for graph in inner_graphs(node))


def mend(model: Any, bound: float = BOUNDS[0]) -> Any:
    """A copy of a model with its mask constants at ``-bound``, no constant of a mask shared, and opset 13 or later.

    Raises:
        InputError: The opset is too old and cannot be converted.
    """
    onnx = require("onnx", "export")
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if _version(made) < OLDEST:
        try:
            made = onnx.version_converter.convert_version(made, NEEDED)
        except Exception as error:  # the converter's own
            raise InputError(f"opset {_version(model)} cannot be converted: {first_line(error)}") from error
    for constant, nodes, left in _masks(made):
        values = constant.values
        bounded = np.where(values <= -HUGE, values.dtype.type(-bound), values)
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(bounded), constant.tensor.name)
        if not left:
            constant.tensor.CopyFrom(tensor)
            continue
        # Another node reads it and may need the value: the mask gets its own constant.
        tensor.name = f"{constant.name}.mask"
        made.graph.initializer.append(tensor)
        for node in nodes:
            for index, name in enumerate(node.input):
                if name == constant.name:
                    node.input[index] = tensor.name
    return made


def fix(
    path: str | os.PathLike[str], target: str | os.PathLike[str], feed: Mapping[str, np.ndarray] | None = None
) -> Repair:
    """Write a repaired file that computes the same.

    Args:
        path: The file.
        target: Path of the repaired file.
        feed: Inputs by name, on which the files are compared; made where none are given.

    Raises:
        InputError: The file cannot be read, run or repaired; or no bound keeps its outputs.
    """
    onnx = require("onnx", "export")
    model = open_file(path)
    feed = inputs_for(model) if feed is None else feed
    before = outputs_of(model, feed, path)
    kinds = {each.kind for each in examine(model, feed, path)}
    # The stream's norms are rewritten in float64, which ONNX has since opset 17.
    rewritten = kinds & ({"stream", "channels"} if _version(model) >= NORMS else {"channels"})
    apart, masks = float("inf"), len([*_masks(model)])
    for bound in BOUNDS:
        made, stream, columns = mend(model, bound), 0, 0
        if rewritten:
            made = constants_held(made)
            stream = keep_stream(made) if "stream" in rewritten else 0
            columns = equal_columns(made, beyond=OUTLIER)
        # An exporter's shapes of inner tensors: quantizers infer their own, and stop where they differ.
        del made.graph.value_info[:]
        apart = _apart(before, outputs_of(made, feed, target))
        if apart <= (SAME_SUMS if rewritten else SAME):
            onnx.save(made, os.fspath(target))
            converted = _version(made) if _version(made) != _version(model) else 0
            return Repair(masks, bound, stream, columns, converted, apart)
    raise InputError(
        f"{target} was not written: with masks of {-BOUNDS[-1]:.0f} outputs of {path} still move by {apart:.1e}; "
        "its scores are larger than that, so leave its attention out of the quantizer (nodes_to_exclude)"
    )


def read_inputs(path: str | os.PathLike[str], model: Any) -> dict[str, np.ndarray]:
    """The first rows of a file of inputs, an array a name; as many as a model with a fixed batch reads.

    Raises:
        InputError: No such file, or not one that numpy wrote with arrays of numbers.
    """
    first = [each.type.tensor_type.shape.dim for each in model.graph.input]
    fixed = [sizes[0].dim_value for sizes in first if sizes and sizes[0].dim_value > 0]
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name][: min(fixed, default=ROWS)] for name in held.files}
    except Exception as error:  # numpy's and zip's own
        raise InputError(f"{path} cannot be read as inputs: {first_line(error)}; give an .npz of arrays") from error


def inputs_for(model: Any, batch: int = 2, length: int = 16) -> dict[str, np.ndarray]:
    """Random inputs that a model takes: ids that its tables hold, a mask with padding at the end, normal floats."""
    onnx = require("onnx", "export")
    random = np.random.default_rng(0)
    weights = {each.name for each in model.graph.initializer}
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    rows = [each.dims[0] for each in model.graph.initializer if len(each.dims) == 2 and each.name in tables]
    feed: dict[str, np.ndarray] = {}
    for each in model.graph.input:
        if each.name in weights:
            continue
        kind = each.type.tensor_type
        free = (batch, *([length] * len(kind.shape.dim)))
        shape = [size.dim_value if size.dim_value > 0 else free[index] for index, size in enumerate(kind.shape.dim)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if np.issubdtype(dtype, np.floating):
            feed[each.name] = random.standard_normal(shape).astype(dtype)
        elif "mask" in each.name:
            feed[each.name] = np.ones(shape, dtype)
            feed[each.name][-1, ..., -(shape[-1] // 3) :] = 0
        elif "type" in each.name or dtype == np.bool_:
            feed[each.name] = np.zeros(shape, dtype)
        elif "position" in each.name:
            feed[each.name] = np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
        else:
            feed[each.name] = random.integers(0, max(rows, default=2), shape).astype(dtype)
    return feed


def _apart(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> float:
    """The largest distance of two models' floats, relative to their largest value; values that are not finite must be
    the same.
    """
    found = 0.0
    for name, a in before.items():
        b = after[name]
        if not np.issubdtype(a.dtype, np.floating) or not a.size:
            continue
        finite = np.isfinite(a)
        if a.shape != b.shape or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        if not np.isfinite(b[finite]).all():
            return float("inf")
        largest = float(np.abs(a[finite]).max(initial=0.0))
        found = max(found, float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / max(largest, 1e-12))
    return found


def _version(model: Any) -> int:
    return next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)


def _is_float(tensor: Any) -> bool:
    types = require("onnx", "export").TensorProto
    return tensor.data_type in (types.FLOAT, types.FLOAT16, types.DOUBLE)


def _constants(model: Any) -> Iterator[_Constant]:
    """Constants of floats, wherever they are held."""
    onnx = require("onnx", "export")
    for each in model.graph.initializer:
        if _is_float(each):
            yield _Constant(each.name, each)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type in ("Constant", "ConstantOfShape") else ():
            if attribute.name == "value_float":  # a tensor holds the same value, and is changed like all others
                value = onnx.numpy_helper.from_array(np.array(attribute.f, np.float32), "value")
                attribute.CopyFrom(onnx.helper.make_attribute("value", value))
            if attribute.name == "value" and _is_float(attribute.t):
                yield _Constant(node.output[0], attribute.t)


def _masks(model: Any) -> Iterator[tuple[_Constant, list[Any], list[Any]]]:
    """Constants whose huge negative values reach a softmax: the constant, the nodes on that path, its other readers."""
    read_by: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            read_by.setdefault(name, []).append(node)

    def reaches(node: Any, seen: set[str]) -> bool:
        if node.op_type == "Softmax":
            return True
        if node.op_type not in CARRIERS:
            return False
        for output in node.output:
            if output not in seen:
                seen.add(output)
                if any(reaches(each, seen) for each in read_by.get(output, ())):
                    return True
        return False

    for constant in list(_constants(model)):
        if constant.tensor.dims and int(np.prod(constant.tensor.dims)) > 2**24:
            continue
        values = constant.values
        if not values.size or not bool((values <= -HUGE).any()):
            continue
        readers = read_by.get(constant.name, [])
        through = [node for node in readers if reaches(node, set())]
        if through:
            yield constant, through, [node for node in readers if not any(node is each for each in through)]


def _quantized(model: Any) -> Finding | None:
    """Whether a file holds quantizers already."""
    marks = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul")
    found = sum(node.op_type in marks for node in model.graph.node)
    if not found:
        return None
    text = f"the file is quantized already ({found} such nodes): its ranges are chosen, so nothing else was looked at"
    return Finding("quantized", f"{found} nodes", text, "examine the file before quantization")


def _values(model: Any) -> Iterator[Finding]:
    """Weights of products with values that are not finite."""
    onnx = require("onnx", "export")
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    read = {name for node in products for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in read and _is_float(tensor):
            lost = int((~np.isfinite(onnx.numpy_helper.to_array(tensor))).sum())
            if lost:
                text = f"{lost} values are not finite: every range that they reach is lost"
                yield Finding("values", tensor.name, text, "export a model whose weights are finite")


def _masks_found(model: Any) -> Iterator[Finding]:
    for constant, through, _ in _masks(model):
        lowest = float(constant.values.min())
        yield Finding(
            "mask",
            constant.name,
            f"mask constant of {lowest:.3g} reaches a softmax through {through[0].op_type}: a static range measured "
            "there leaves all scores one code",
            "--fix bounds it",
        )


def _wide(model: Any, feed: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> Iterator[Finding]:
    """Activations with one channel so large that a range for the whole tensor leaves little to the others."""
    for each in wide_activations(model, feed, OUTLIER, path):
        yield Finding(
            "stream" if each.in_stream else "activation",
            each.name,
            f"channel {each.channel} reaches {each.largest:.3g}, {each.ratio:.0f} times the median one ("
            f"{each.operator}): one range for the tensor takes {np.log2(each.ratio):.1f} bits from the others",
            "--fix keeps the stream in floats"
            if each.in_stream
            else "s2d condition, before the export; or leave its readers out of the quantizer",
        )


def _channels(model: Any) -> Iterator[Finding]:
    """Weights of products with one channel so large that a range for the whole tensor leaves little to the others."""
    onnx = require("onnx", "export")
    held = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or len(node.input) < 2 or node.input[1] not in held:
            continue
        tensor = held.pop(node.input[1])  # once, if several products read it
        if len(tensor.dims) < 2 or not _is_float(tensor):
            continue
        values = np.abs(onnx.numpy_helper.to_array(tensor).astype(np.float32))
        turned = node.op_type == "Conv" or any(each.name == "transB" and each.i for each in node.attribute)
        axis = 0 if turned else values.ndim - 1
        largest = values.max(tuple(each for each in range(values.ndim) if each != axis))
        ratio = float(largest.max() / max(float(np.median(largest)), 1e-12))
        if ratio > OUTLIER:
            yield Finding(
                "channels",
                tensor.name,
                f"channel {int(largest.argmax())} is {ratio:.0f} times as large as the median one: one range for the "
                f"tensor takes {np.log2(ratio):.1f} bits from the others",
                "--fix gives columns one size"
                if node.op_type == "MatMul" and len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
                else "a scale per channel (per_channel=True in onnxruntime)",
            )


def _shared(model: Any) -> Iterator[Finding]:
    """Constants that serve two purposes get one range for both."""
    held = {each.name for each in model.graph.initializer if len(each.dims) >= 2}
    kinds: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            if name in held:
                kinds.setdefault(name, set()).add(node.op_type)
    for name, found in kinds.items():
        if len(found) > 1 and not found.isdisjoint(PRODUCTS):
            yield Finding(
                "shared",
                name,
                f"one constant is read by {' and '.join(sorted(found))}: they get one range and one axis of scales",
                "give each its own copy, or leave one out of the quantizer",
            )
    for constant, _, others in _masks(model):
        if others:
            text = f"the mask constant is read by {others[0].op_type} too, which may mean the number"
            yield Finding("shared", constant.name, text, "--fix gives the mask its own")


def _opset(model: Any) -> Iterator[Finding]:
    version = _version(model)
    if version < NEEDED:
        old = version < OLDEST
        what = "a scale per channel needs 13" if old else "codes of 4 bits and scales in blocks need 21"
        yield Finding("opset", str(version), f"opset {version}: {what}", "--fix converts it" if old else "export again")
