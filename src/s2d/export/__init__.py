"""Export: write a quantized model for a runtime with low-bit kernels; the file is checked before it is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError, choices
from s2d.export import coreml, encodings, executorch, layer_formats
from s2d.export.copies import in_float32
from s2d.export.fixed_shapes import fitted, is_sequence, padding_id, whole_shape
from s2d.export.gate import Check, ExportReport
from s2d.export.graphs import export_graph
from s2d.export.onnx import CPU, OnnxModel
from s2d.export.openvino import OpenVinoModel, refuse_spans
from s2d.export.operators import FORMS, Form
from s2d.export.runtime import stack_complaint
from s2d.export.table_bits import NARROW, WIDE, table_bits
from s2d.export.torch_int import integer_model
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.optional import require
from s2d.quant.modules.record import check_unchanged, holder, record
from s2d.quant.modules.sites import is_quantized
from s2d.tasks import Split, Task

__all__ = ["ExportReport", "OnnxModel", "OpenVinoModel", "export", "exporters", "integer_model", "open_exported"]

_FORMATS = {
    ".onnx": "ONNX for onnxruntime and OpenVINO",
    ".xml": "OpenVINO's own form, weights in NAME.bin beside it",
    ".gguf": "GGUF for llama.cpp: language models of the Llama kind, weights only",
    encodings.SUFFIX: "AIMET's encodings, with the float32 model in NAME.onnx beside it, for Qualcomm's tools",
    coreml.SUFFIX: "Core ML for Apple's devices; read back here, never run",
    ".pte": "ExecuTorch for phones and boards, Linears run by XNNPACK",
    layer_formats.FOLDER: "a folder in the format of compressed-tensors, for transformers and servers like vLLM",
}
RUNNABLE = (".onnx", ".xml")  # by `open_exported`, with free batch size and number of threads


def exporters() -> dict[str, str]:
    """The export formats: the file's suffix (empty for a folder), and one line about each."""
    return dict(_FORMATS)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Mapping[str, Tensor],
    embeddings: int | None = None,
    form: Form = "qdq",
    shape: Mapping[str, int] | None = None,
    tokenizer: Any = None,
    task: Task | None = None,
    split: Split = "validation",
    batch_size: int = 16,
    time_it: bool = True,
    describe: bool = True,
    force: bool = False,
    provider: str | None = None,
    fallback: bool = True,
    notes: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write a quantized model for a runtime, and keep the file if it computes the same there.

    In ONNX and OpenVINO the products run as uint8 x int8 with int32 sums on CPUs, whatever the bits: 4 bits make the
    file smaller, not the product faster than 8 bits. Weights of 4 bits are unpacked to int8 when the file is opened.

    Args:
        model: From `s2d.quantize` or `s2d.load`, on the CPU.
        path: ``NAME.onnx``, ``NAME.xml``, ``NAME.pte``, ``NAME.gguf``, ``NAME.encodings``, ``NAME.mlpackage``, or a
            name without a suffix for a folder of compressed-tensors; ``NAME.json`` beside it will hold the report.
        example: Keyword inputs of the model, a batch of two or more; batch size and length stay dynamic in the file.
        embeddings: Bits of the embedding tables (one scale a row at 8, one for 32 columns below), 0 to keep them.
            By default 8, and in ONNX and OpenVINO 4 beside weights of at most 4 bits where little is lost
            (`s2d.export.table_bits`). compressed-tensors always keeps them.
        form: Of ONNX: ``"qdq"``, ``"integer"`` or ``"types"``; see `s2d.export.operators`.
        shape: Sizes that an ONNX file fixes, for runtimes that compile one shape: ``{"batch": 1, "tokens": 128}``, the
            batch alone for images. `open_exported` fills inputs up to them.
        tokenizer: Stored in formats that hold one (GGUF, compressed-tensors).
        task: Its metric is compared, on ``split``; without a task, the outputs on the example are compared.
        split: Data of the comparison.
        batch_size: Batch size of the comparison.
        time_it: Measure latency against full precision, which is exported too for that.
        describe: Read back the kernels of ONNX and OpenVINO files; this opens them a few more times.
        force: Keep a file that fails the comparison.
        provider: List the nodes that the runtime places on this device (a provider of onnxruntime, a device of
            OpenVINO) and those that fall back. A ``.pte`` always lists them.
        fallback: Accept nodes that fall back; without it they are an error.
        notes: Receives progress messages.

    Returns:
        The report of the checks.

    Raises:
        InputError: The model is not quantized, or changed after quantization; the runtime does not support a site; the
            path cannot be written; or the file does not compute the same as the simulated model (then no file is left).
    """
    target = Path(path)
    _check_target(target, embeddings, form)
    _check_example(model, example)
    if shape and target.suffix not in (".onnx", coreml.SUFFIX):
        raise InputError(f"{target}: fixed sizes are for ONNX (OpenVINO reads it) and Core ML; name it NAME.onnx")
    sizes, padding = whole_shape(shape, example) if shape else None, padding_id(model, tokenizer)
    if not is_quantized(model):
        raise InputError(f"{type(model).__name__} is not quantized; run s2d quantize first, then export its folder")
    check_unchanged(model)
    kept = record(holder(model))
    complaint = stack_complaint(kept.sites, target.suffix or "compressed-tensors")
    if complaint is not None:
        raise InputError(complaint)
    if target.suffix == ".xml":
        refuse_spans(kept.sites, example)
    model, example = in_float32(model, example, notes)
    asked = provider if provider is not None or fallback else CPU
    check = Check(task, split, batch_size, time_it, describe, force, notes, asked, fallback)
    if embeddings is None:
        weight = kept.spec.weight
        few = weight is not None and weight.format.bits <= NARROW and target.suffix in RUNNABLE
        embeddings = table_bits(model, example, check) if few else WIDE
    report = ExportReport(str(target), str(kept.spec), kept.method, embeddings)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix in layer_formats.FORMATS:
            layer_formats.export_checkpoint(model, target, report, example, tokenizer, check)
        elif target.suffix == executorch.SUFFIX:
            executorch.export_program(model, target, report, example, check)
        elif target.suffix == coreml.SUFFIX:
            example = fitted(example, sizes, padding)[0] if sizes else example
            coreml.export_package(model, target, report, example, check)
        elif target.suffix == encodings.SUFFIX:
            encodings.export_encodings(model, target, report, example, check)
        else:
            export_graph(model, target, report, example, kept.calibrated, form, check, sizes, padding)
        content = {"run": run_metadata(model_fingerprint=kept.calibrated), "export": report.to_dict()}
        write_json(target.with_name(f"{target.stem}.json"), content)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written: {error.strerror or error}; free some space or choose another place"
        ) from error
    return report


def _check_target(target: Path, embeddings: int | None, form: str) -> None:
    if target.suffix not in _FORMATS:
        names = ", ".join(f"NAME{each}" for each in _FORMATS if each)
        raise InputError(f"{target}: unknown kind of file; name it {names}, or without a suffix for a folder")
    if target.suffix == layer_formats.FOLDER:
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise InputError(f"{target} exists and is not an empty folder; choose another name or remove it")
    elif target.is_dir():
        raise InputError(f"{target} is a folder; name a file, or remove it")
    if embeddings not in (None, 0, *range(2, 9)):
        raise InputError(f"embeddings={embeddings!r} is a number of bits, 2 to 8, or 0 to leave the tables")
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}; {choices(form, FORMS)}")
    if form != FORMS[0] and target.suffix != ".onnx":
        raise InputError(f"form {form} is one of ONNX; name the file NAME.onnx")
    if target.suffix in RUNNABLE:
        require("onnxruntime", "export", at_least="1.22")
    if target.suffix == ".xml":
        require("openvino", "openvino")


def _check_example(model: nn.Module, example: Mapping[str, Tensor]) -> None:
    if len({len(value) for value in example.values()}) > 1:
        sizes = ", ".join(f"{name} of {len(value)}" for name, value in example.items())
        raise InputError(
            f"{type(model).__name__} takes batches of different sizes ({sizes}), and a file takes one; models of an "
            "image and a text tower become two files: s2d export, or s2d.export.towers.export_towers"
        )
    if not example or any(len(value) < 2 for value in example.values()):
        raise InputError("the example needs a batch of two or more, so that the file takes any number")


def open_exported(path: str | os.PathLike[str], *, runtime: str | None = None, threads: int = 1) -> nn.Module:
    """An exported file as a module: keyword tensors in, named tensors out.

    Args:
        path: ``.onnx``, ``.xml`` or ``.pte``.
        runtime: ``"onnxruntime"`` or ``"openvino"``; by default the one of the file.
        threads: Threads for one product.

    Raises:
        InputError: No such file, another kind of file, a runtime that is missing.
    """
    source = Path(path)
    if not source.is_file() or source.suffix not in (*RUNNABLE, executorch.SUFFIX):
        raise InputError(f"{source} is not an exported model; name a file ending in {', '.join(RUNNABLE)} or .pte")
    if source.suffix == executorch.SUFFIX:
        return executorch.PteModel(source, threads)
    chosen = runtime or ("openvino" if source.suffix == ".xml" else "onnxruntime")
    if chosen == "openvino":
        return OpenVinoModel(source, threads)
    if chosen != "onnxruntime" or source.suffix == ".xml":
        raise InputError(f"{chosen} does not run {source.name}; runtimes are onnxruntime (.onnx) and openvino")
    return OnnxModel(source, threads)


def example_of(batches: Iterable[Any]) -> dict[str, Tensor]:
    """The first batch of keyword inputs with two or more rows, for tracing; else the row of the first batch as two.

    A window of tokens becomes its two halves, any other row stands twice.

    Raises:
        InputError: There is none.
    """
    single: dict[str, Tensor] | None = None
    for batch in islice(batches, 8):  # not all of a long data set
        if not isinstance(batch, Mapping) or not all(isinstance(value, torch.Tensor) for value in batch.values()):
            continue
        if all(len(value) > 1 for value in batch.values()):
            return dict(batch)
        if single is None and all(len(value) == 1 for value in batch.values()):
            lengths = {value.shape[1] if is_sequence(value) else 1 for value in batch.values()}
            halves = len(lengths) == 1 and min(lengths) % 2 == 0
            single = {
                name: value.reshape(2, -1) if halves else torch.cat([value, value]) for name, value in batch.items()
            }
    if single is None:
        raise InputError("there is no example to trace the model with; add --data with some")
    return single
