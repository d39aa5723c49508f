"""The conditioned model for compilers that quantize by themselves: full precision, with calibration data.

A folder holds ``model.onnx`` (float32, at the opset and the shapes that the compiler reads), ``calibration.npz`` (the
inputs of real examples, prepared as in training), ``expected.npz`` (the outputs of its first rows) and a page with the
commands that the user runs there. Things in a file that spoil static ranges are repaired here. Constants of masks
are bounded (see `onnx_doctor`). GELU and LayerNorm stay single nodes where the opset has them. Where the runtime may
compute in floats between products, the residual stream is kept out of ranges (see `float_stream`), and columns of
weights have one size (see `equal_columns`). Shapes that an exporter stored for its own graph are removed, because
quantizers infer their own and stop where the two differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d.errors import InputError, first_line
from s2d.export import onnx_doctor
from s2d.export.copies import in_float32, shared_copy
from s2d.export.equal_columns import equal_columns
from s2d.export.fixed_shapes import is_sequence, padded, padding_id, whole_shape
from s2d.export.float_stream import keep_stream
from s2d.export.onnx import TWO_GB, OnnxModel, tensors_of, write_onnx
from s2d.export.runtime import Compiler, Runtime, find_runtime, runtimes
from s2d.io.files import in_place_of, write_json
from s2d.io.provenance import run_metadata
from s2d.models.saved import save_parts
from s2d.optional import require
from s2d.quant.modules.sites import is_quantized

SAME = 1e-5  # of the largest output: float32 in another order of sums; masks alone may move it by 1e-6
PARITY_ROWS = 16


@dataclass
class ConditionedReport:
    """The files that were written.

    Attributes:
        path: The folder.
        compiler: Name of the compiler.
        opset: Opset of the file.
        shape: Sizes that are fixed, by name; empty where they are free.
        rows: Calibration examples.
        mask: The bound that masks got; None where none had to be bounded.
        outputs_moved: How far the file's outputs are from torch's, relative to their largest value.
        findings: Remaining causes of bad ranges, as text.
    """

    path: str
    compiler: str
    opset: int
    shape: dict[str, int]
    rows: int
    mask: float | None
    outputs_moved: float
    findings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def find_compiler(name: str) -> Runtime:
    """A runtime that reads a model in full precision and quantizes it by itself.

    Raises:
        InputError: There is none of that name, or it takes none; those that do are listed.
    """
    runtime = find_runtime(name)
    if runtime.compiler is None:
        able = sorted(each.name for each in runtimes().values() if each.compiler is not None)
        raise InputError(f"{name} takes quantized files, no calibration set; that is for {', '.join(able)}")
    return runtime


def export_conditioned(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    compiler: Runtime,
    inputs: Sequence[Mapping[str, Tensor]],
    shape: Mapping[str, int] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    notes: Callable[[str], None] = lambda text: None,
) -> ConditionedReport:
    """Write a model in full precision, with calibration data for a compiler, into a folder.

    Args:
        model: A plain model: pretrained or, better, conditioned.
        path: A folder that does not exist or is empty.
        compiler: From `find_compiler`.
        inputs: Batches of keyword inputs, prepared as in training.
        shape: Sizes to fix: ``batch``, ``tokens``.
        tokenizer: Kept in ``inputs``.
        processor: Kept in ``inputs``.
        notes: Receives progress messages.

    Returns:
        The report of the files.

    Raises:
        InputError: The model is quantized already; the compiler needs sizes that are not given; an example is longer;
            the model cannot be written at that opset; the file does not compute the same as the model.
    """
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder; choose another name or remove it")
    reads = _reads(compiler)
    if is_quantized(model):
        raise InputError(
            f"{type(model).__name__} is quantized, and {compiler.name} quantizes by itself; give the plain model "
            "(from s2d condition)"
        )
    if (size := sum(each.numel() for each in model.parameters()) * 4) > TWO_GB:
        raise InputError(f"{type(model).__name__} has {size / 1e9:.1f} GB in float32, and one ONNX file holds 2 GB")
    sizes = _sizes(dict(shape or {}), inputs, compiler)
    held = stack(inputs, sizes.get("tokens"), {"input_ids": padding_id(model, tokenizer)})
    model, held = in_float32(model, held, notes)
    model = shared_copy(model)
    rows = len(next(iter(held.values())))
    example = {name: value[: sizes.get("batch", 2)] for name, value in held.items()}
    if rows < len(next(iter(example.values()))) or rows < sizes.get("batch", 2):
        raise InputError(f"{rows} examples are less than a batch of {sizes.get('batch', 2)}; give more data")
    with in_place_of(target) as made:
        made.mkdir()
        notes("tracing")
        write_onnx(model, example, made / "model.onnx", opset=max(reads.opset, 18), fixed=bool(sizes))
        notes("comparing")
        expected = _outputs(model, held, sizes)
        mask, moved = _mend(made / "model.onnx", held, expected, sizes, compiler)
        findings = onnx_doctor.examine(onnx_doctor.open_file(made / "model.onnx"))
        report = ConditionedReport(
            str(target),
            compiler.name,
            reads.opset,
            sizes,
            rows,
            mask,
            moved,
            [f"{each.where}: {each.text}" for each in findings if each.kind in ("mask", "channels", "shared")],
        )
        _save_rows(made, held, expected, compiler)
        save_parts(made / "inputs", tokenizer, processor)
        for name, text in reads.scripts.items():
            (made / name).write_text(text.replace("{batch}", str(sizes.get("batch", 1))), encoding="utf-8")
        (made / "README.md").write_text(page(report, compiler), encoding="utf-8")
        write_json(made / "export.json", {"run": run_metadata(), "export": report.to_dict()})
    return report


def stack(inputs: Sequence[Mapping[str, Tensor]], tokens: int | None, padding: Mapping[str, int]) -> dict[str, Tensor]:
    """Batches of keyword inputs as one tensor a name, padded to one length.

    Args:
        inputs: Batches; integers of two dimensions ``[B, T]`` are sequences, everything else has its size.
        tokens: The length; None for that of the longest.
        padding: Padding values by name; 0 for all others.

    Raises:
        InputError: There are none; one is longer; sequences without a mask differ in length.
    """
    if not inputs:
        raise InputError("no examples to calibrate with; add --data")
    lengths = {each.shape[1] for batch in inputs for each in batch.values() if is_sequence(each)}
    longest = max(lengths, default=0)
    if tokens is not None and longest > tokens:
        raise InputError(
            f"an example has {longest} tokens, more than --shape tokens={tokens}; say tokens={longest}, or shorten "
            f"them with -o task.max_length={tokens}"
        )
    length = tokens or longest
    masked = any("mask" in name for name in inputs[0])
    if lengths and (len(lengths) > 1 or length != longest) and not masked:
        raise InputError(f"sequences of {min(lengths)} to {longest} tokens have no mask, so none can be padded")
    made = {}
    for name in inputs[0]:
        parts = [batch[name] for batch in inputs]
        if is_sequence(parts[0]):
            value = padding.get(name, 0)
            parts = [padded(each, length, value) for each in parts]
        made[name] = torch.cat(parts)
    return made


def page(report: ConditionedReport, compiler: Runtime) -> str:
    """The page for the user: what is in the folder, and the commands."""
    fixed = ", ".join(f"{name} {size}" for name, size in report.shape.items()) or "free batch and length"
    mask = "no mask had to be bounded" if report.mask is None else f"masks are {-report.mask:.0f}"
    reads = _reads(compiler)
    names = "".join(f"- `{name}`\n" for name in reads.scripts)
    commands = "\n".join(reads.commands)
    told = "".join(f"- {text}\n" for text in (*reads.notes, *report.findings))
    return (
        f"# For {compiler.name}\n\n"
        "The model is in full precision; the compiler quantizes it with the examples that lie beside it.\n\n"
        f"- `model.onnx`: float32, opset {report.opset}, {fixed}; {mask}; outputs within {report.outputs_moved:.0e} of "
        "torch's\n"
        f"- `calibration.npz`: {report.rows} examples, prepared as in training; `expected.npz`: the outputs of the "
        f"first {min(report.rows, PARITY_ROWS)}\n- `inputs`: the tokenizer or image processor\n{names}\n"
        f"```bash\n{commands}\n```\n\n"
        f"{reads.source}\n{told}"
    )


def _reads(runtime: Runtime) -> Compiler:
    assert runtime.compiler is not None, runtime.name
    return runtime.compiler


def _sizes(shape: dict[str, int], inputs: Sequence[Mapping[str, Tensor]], compiler: Runtime) -> dict[str, int]:
    """The sizes that the file fixes; checked before any work."""
    if compiler.shapes == "free" and not shape:
        return {}
    return whole_shape(shape, inputs[0] if inputs else {}, compiler.fixes_shapes)


@torch.no_grad()
def _outputs(model: nn.Module, held: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The model's outputs for the first rows, in batches of the fixed size."""
    found = [tensors_of(model(**feed)) for feed in _feeds(held, sizes)]
    return {name: torch.cat([each[name] for each in found]).numpy() for name in found[0]}


def _feeds(held: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[dict[str, Tensor]]:
    batch = sizes.get("batch", PARITY_ROWS)
    rows = min(len(next(iter(held.values()))), PARITY_ROWS)
    starts = range(0, max(rows - batch, 0) + 1, batch)
    return [{name: value[start : start + batch] for name, value in held.items()} for start in starts]


def _mend(
    path: Path,
    held: Mapping[str, Tensor],
    expected: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    compiler: Runtime,
) -> tuple[float | None, float]:
    """Bound the masks, remove the exporter's metadata, convert the opset, and compare with torch's outputs."""
    onnx = require("onnx", "export")
    written = onnx_doctor.open_file(path)
    masked = any(each.kind == "mask" for each in onnx_doctor.examine(written))
    moved = float("inf")
    for bound in onnx_doctor.BOUNDS if masked else (onnx_doctor.BOUNDS[0],):
        made = onnx_doctor.mend(written, bound) if masked else written
        strip(made)
        if _reads(compiler).opset < 18:
            made = _older(made, compiler)
            strip(made)
        if _reads(compiler).stream == "float":
            keep_stream(made)
            equal_columns(made)
        onnx.save(made, os.fspath(path))
        runner = OnnxModel(path)
        found = [runner(**feed) for feed in _feeds(held, sizes)]
        moved = 0.0
        for name, value in expected.items():
            parts = [each if isinstance(each, Tensor) else each[name] for each in found]
            apart = np.abs(torch.cat(parts).numpy() - value).max() / max(float(np.abs(value).max()), 1e-12)
            moved = max(moved, float(apart) if np.isfinite(apart) else float("inf"))
        if moved <= SAME:
            return (bound if masked else None), moved
    raise InputError(f"{path.name} was not written: its outputs are {moved:.1e} of their largest value from torch's")


def strip(model: Any) -> None:
    """Remove an exporter's metadata: shapes of inner values, stack traces, its own names of functions.

    Args:
        model: An ONNX ``ModelProto``; changed.
    """
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]


def _older(model: Any, compiler: Runtime) -> Any:
    """A model at an older opset than torch's exporter writes.

    Raises:
        InputError: It has an operator with no form there.
    """
    onnx = require("onnx", "export")
    try:
        made = onnx.version_converter.convert_version(model, _reads(compiler).opset)
        made.ir_version = onnx.helper.find_min_ir_version_for(list(made.opset_import))
        onnx.checker.check_model(made)
    except Exception as error:  # the converter's own
        raise InputError(
            f"{compiler.name} reads opset {_reads(compiler).opset}, where the model has no form: {first_line(error)}; "
            "the nearest is --for any"
        ) from error
    return made


def _save_rows(folder: Path, held: Mapping[str, Tensor], expected: Mapping[str, np.ndarray], compiler: Runtime) -> None:
    arrays = {name: value.numpy() for name, value in held.items()}
    np.savez_compressed(folder / "calibration.npz", allow_pickle=False, **arrays)
    np.savez_compressed(folder / "expected.npz", allow_pickle=False, **expected)
    if _reads(compiler).images == "nhwc":
        images = [value for value in arrays.values() if value.ndim == 4]
        if len(images) == 1 and len(arrays) == 1:
            np.save(folder / "calibration.npy", np.ascontiguousarray(images[0].transpose(0, 2, 3, 1)))
    if _reads(compiler).raw:
        raw = folder / "calibration"
        raw.mkdir()
        lines = []
        for row in range(len(next(iter(arrays.values())))):
            parts = []
            for name, value in arrays.items():
                kind = np.float32 if np.issubdtype(value.dtype, np.floating) else np.int32
                value[row].astype(kind).tofile(raw / f"{row:04}.{name}.raw")
                parts.append(f"{name}:=calibration/{row:04}.{name}.raw")
            lines.append(" ".join(parts))
        (folder / "input_list.txt").write_text("\n".join(lines) + "\n")
