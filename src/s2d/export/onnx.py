"""ONNX: one file that onnxruntime and OpenVINO run with integer kernels.

Weights are 4-bit codes on disk (INT4 initializers, two to a byte) that a Cast to INT8 unpacks when the session loads;
the products are uint8 x int8 with int32 sums, because CPUs have no narrower multiply. `kernels` reads back the kernels
that onnxruntime chose.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export import fixed_shapes
from s2d.export.lean_exporter import lean_exporter, quiet
from s2d.export.operators import Form, translations
from s2d.optional import require

OPSET = 21
CPU = "CPUExecutionProvider"
# Asks for exact products where they would overflow (see `overflows`); they take twice as long. It fails where a
# DequantizeLinear of int8 codes per channel is left over, so convolutions, which run in floating point, have a Mul.
EXACT = ("session.x64quantprecision", "1")
# onnxruntime rounds the inputs of weights in blocks to 8 bits, unless it is told to keep them.
FLOAT_INPUTS = ("session.qdq_matmulnbits_accuracy_level", "1")
TWO_GB = 2**31 - 2**20
_BARE = "output"
_FIRST = ("logits", "image_embeds", "text_embeds", "last_hidden_state", "pooler_output")


class Face(nn.Module):
    """A model with tensors in, in the order of ``names``, and a dictionary of tensors out."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Wrap a model that takes keywords."""
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """The outputs by name, the one that counts first."""
        return tensors_of(self.model(**dict(zip(self.names, values, strict=True))))


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The tensors in what a model returns, by name; a bare tensor is ``output``.

    Raises:
        InputError: There are none.
    """
    if isinstance(output, Tensor):
        return {_BARE: output}
    if isinstance(output, Mapping):
        items = dict(output)
    else:
        items = {f"output_{index}": value for index, value in enumerate(output)}
    found = {name: value for name, value in items.items() if isinstance(value, Tensor)}
    if not found:
        raise InputError(f"the model returns no tensor but {type(output).__name__}; export a model that does")
    return {name: found[name] for name in sorted(found, key=lambda n: _FIRST.index(n) if n in _FIRST else len(_FIRST))}


def write_onnx(
    model: nn.Module,
    example: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    form: Form = "qdq",
    beside: bool = False,
    opset: int = OPSET,
    fixed: bool = False,
) -> None:
    """Trace a model and write it.

    Args:
        model: Lowered, or plain.
        example: A batch of keyword inputs, at least two in the batch.
        path: The file; over 2 GB the weights go into ``NAME.data`` beside it.
        metadata: Kept in the file.
        form: Form of the operators in the file.
        beside: Put the weights there at any size; this needs less memory.
        opset: 18 or later.
        fixed: Keep the sizes of the example instead of leaving batch and length free.

    Raises:
        InputError: The model cannot be traced; an extra is missing.
    """
    require("onnx", "export", at_least="1.18")
    require("onnxscript", "export", at_least="0.5")
    import onnx_ir as ir

    with torch.no_grad():
        outputs = list(tensors_of(model(**example)))
    with lean_exporter():
        try:
            program = torch.onnx.export(
                Face(model, tuple(example)).eval(),
                tuple(example.values()),
                input_names=list(example),
                output_names=outputs,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=translations(form),
                dynamic_shapes=None if fixed else {"values": tuple(_free(value) for value in example.values())},
            )
        except Exception as error:
            if isinstance(error, (InputError, MemoryError)):
                raise
            raise InputError(f"{type(model).__name__} cannot be traced for ONNX: {_reason(error)}") from error
    assert program is not None
    graph = program.model.graph
    _put_casts(graph, ir)
    _store_narrow(graph, ir, form)
    _forget_sources(graph, ir)
    program.model.metadata_props.update(metadata or {})
    size = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    with quiet():
        ir.save(program.model, path, external_data=f"{path.name}.data" if beside or size > TWO_GB else None)


def _free(value: Tensor) -> dict[int, Any]:
    """Batch and length may vary; images keep their size."""
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if value.ndim == 2 and not value.is_floating_point():
        dims[1] = torch.export.Dim("length")
    return dims


def _put_casts(graph: Any, ir: Any) -> None:
    """Codes for products in floating point come behind a DequantizeLinear of scale 1, which becomes a Cast."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or len(node.inputs) != 2:
            continue
        codes, scale = node.inputs
        users = [use.node.op_type for use in node.outputs[0].uses()]
        if not (codes.name or "").endswith("codes") or users != ["Mul"] or not _is_one(scale):
            continue
        cast = ir.Node("", "Cast", [codes], [ir.AttrInt64("to", int(ir.DataType.FLOAT))])
        new, old = cast.outputs[0], node.outputs[0]
        new.name, new.dtype, new.shape = old.name, ir.DataType.FLOAT, old.shape
        graph.insert_before(node, cast)
        for use in list(old.uses()):
            use.node.replace_input_with(use.idx, new)
        graph.remove(node, safe=True)


def _forget_sources(graph: Any, ir: Any) -> None:
    """Remove the source locations that the exporter stores for each node. They name this machine's folders, and are
    half of a small model's file.
    """
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _is_one(value: Any) -> bool:
    tensor = value.const_value
    if tensor is None:
        maker = value.producer()
        if maker is None or maker.op_type != "Constant" or "value_float" not in maker.attributes:
            return False
        return bool(maker.attributes["value_float"].value == 1.0)
    return tensor.size == 1 and bool(tensor.numpy().reshape(-1)[0] == 1.0)


def _store_narrow(graph: Any, ir: Any, form: Form) -> None:
    """Weight codes of up to 4 bits become INT4 initializers; a Cast gives the kernels their INT8.

    In the form of types a DequantizeLinear reads the INT4 itself.
    """
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if not name.endswith("codes") or tensor is None or value.dtype != ir.DataType.INT8:
            continue
        codes = tensor.numpy()
        if codes.min() < -8 or codes.max() > 7:
            continue
        users = [(use.node, use.idx) for use in value.uses()]
        if form == "types":
            users = [(node, index) for node, index in users if node.op_type != "DequantizeLinear"]
        value.const_value = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name=name)
        value.dtype = ir.DataType.INT4
        if not users:
            continue
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.INT8))])
        wide = cast.outputs[0]
        wide.name, wide.dtype, wide.shape = f"{name}.int8", ir.DataType.INT8, value.shape
        graph.insert_before(graph[0], cast)
        for node, index in users:
            node.replace_input_with(index, wide)


def session(
    path: Path,
    threads: int = 1,
    *,
    optimized: Path | None = None,
    content: bytes | None = None,
    provider: str = CPU,
) -> Any:
    """An onnxruntime session.

    Args:
        path: The file.
        threads: For one product.
        optimized: Where the graph as it will run is written, if anywhere.
        content: Run these bytes instead of the file.
        provider: The execution provider; what it has no kernel for runs on the CPU.
    """
    runtime = require("onnxruntime", "export", at_least="1.22")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # failures are raised as errors as well
    options.add_session_config_entry(*FLOAT_INPUTS)
    if overflows():
        options.add_session_config_entry(*EXACT)
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    try:
        providers = list(dict.fromkeys((provider, CPU)))
        return runtime.InferenceSession(content if content is not None else os.fspath(path), options, providers)
    except Exception as error:  # onnxruntime's own classes, which differ by version
        raise InputError(f"onnxruntime cannot run {path}: {_reason(error)}") from error


@lru_cache(maxsize=1)
def overflows() -> bool:
    """Whether onnxruntime's products of uint8 and int8 are wrong on this CPU for weights of 8 bits.

    Without VNNI it adds pairs of products up in 16 bits. One product of the largest codes shows it.
    """
    runtime = require("onnxruntime", "export", at_least="1.22")
    onnx = require("onnx", "export")
    rows, inner, columns = 4, 64, 32
    weight = onnx.numpy_helper.from_array(torch.full((inner, columns), 127, dtype=torch.int8).numpy(), "weight")
    sides = [
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [rows, inner]),
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [rows, columns]),
    ]
    product = onnx.helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    graph = onnx.helper.make_graph([product], "product", sides[:1], sides[1:], [weight])
    versions = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(
        graph, opset_imports=versions, ir_version=onnx.helper.find_min_ir_version_for(versions)
    )
    run = runtime.InferenceSession(model.SerializeToString(), providers=[CPU])
    (found,) = run.run(None, {"x": torch.full((rows, inner), 255, dtype=torch.uint8).numpy()})
    return bool((found != 255 * 127 * inner).any())


def kernels(path: Path) -> tuple[dict[str, int], int]:
    """The graph that onnxruntime will run: the number of matrix products of each kind, and the bytes of its weights."""
    onnx = require("onnx", "export")
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        model = onnx.load(os.fspath(optimized))
    counts: dict[str, int] = {}
    for node in model.graph.node:
        if any(part in node.op_type for part in ("MatMul", "Gemm", "Conv", "Attention")):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts, sum(len(each.raw_data) or each.ByteSize() for each in model.graph.initializer)


class OnnxModel(nn.Module):
    """An exported model that is called as the original was: keyword tensors in, an output with named tensors out."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 1, provider: str = CPU) -> None:
        """Open the file.

        Raises:
            InputError: onnxruntime is missing, or cannot run it.
        """
        super().__init__()
        self._session = session(Path(path), threads, provider=provider)
        self.names = [each.name for each in self._session.get_inputs()]
        self.outputs = [each.name for each in self._session.get_outputs()]
        told = self._session.get_modelmeta().custom_metadata_map
        self._padding = int(told.get(fixed_shapes.PADDING, 0))
        self._along = told.get(fixed_shapes.ALONG_TOKENS, "").split(",")
        # Whether integers, and the sizes; None where any will do.
        self.shapes: dict[str, tuple[bool, tuple[int | None, ...]]] = {
            each.name: ("int" in each.type, tuple(size if isinstance(size, int) else None for size in each.shape))
            for each in self._session.get_inputs()
        }

    def forward(self, **inputs: Tensor) -> Any:
        """As the exported model's forward; inputs that it does not read are left out.

        Where the file has fixed sizes, inputs are cut into its batches and filled up to its length.
        """
        read = {name: inputs[name].detach().cpu() for name in self.names if name in inputs}
        sizes = self.fixed
        if not sizes:
            return named(self._run(read))
        rows = len(next(iter(read.values())))
        tokens = next((value.shape[1] for value in read.values() if fixed_shapes.is_sequence(value)), None)
        found = [self._run(each) for each in fixed_shapes.fitted(read, sizes, self._padding)]
        return named(fixed_shapes.joined(found, rows, tokens, self._along))

    @property
    def fixed(self) -> dict[str, int]:
        """The sizes that the file fixes, by name; empty where batch and length are free."""
        batch = next((shape[0] for _, shape in self.shapes.values() if shape), None)
        tokens = next((shape[1] for integer, shape in self.shapes.values() if integer and len(shape) == 2), None)
        return {} if batch is None else {"batch": batch, **({} if tokens is None else {"tokens": tokens})}

    def _run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._session.run(None, {name: value.numpy() for name, value in feed.items()})
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}


def named(found: dict[str, Tensor]) -> Any:
    """Undo `tensors_of`: the tensor itself when there is but one without a name of its own, else named outputs."""
    return found[_BARE] if list(found) == [_BARE] else Output(found)


class Output(dict[str, Tensor]):
    """Outputs by name, as keys and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
