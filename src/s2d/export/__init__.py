"""Carrying a quantized model to runtimes that really run low-bit, and checking it before it is handed over."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError, require
from s2d.export import gate, openvino
from s2d.export.copies import shared_copy
from s2d.export.gate import ExportReport
from s2d.export.lowering import lower, round_embeddings
from s2d.export.onnx import OnnxModel, write_onnx
from s2d.export.openvino import OpenVinoModel
from s2d.export.parity import compare_layers
from s2d.export.torch_int import integer_model
from s2d.models.checkpoints import fingerprint
from s2d.quant.state import Record, peek, record
from s2d.results import run_metadata, write_json
from s2d.tasks import Split, Task

__all__ = ["ExportReport", "OnnxModel", "OpenVinoModel", "export", "exporters", "integer_model", "open_exported"]

_FORMATS = {
    ".onnx": "ONNX for onnxruntime and OpenVINO",
    ".xml": "OpenVINO's own form, weights in NAME.bin beside it",
}


def exporters() -> dict[str, str]:
    """What can be written: the file's suffix, and one line."""
    return dict(_FORMATS)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Mapping[str, Tensor],
    embeddings: int = 8,
    task: Task | None = None,
    split: Split = "validation",
    batch_size: int = 16,
    time_it: bool = True,
    force: bool = False,
    notes: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write a quantized model for a runtime, when it computes there what it computes here.

    The products run as uint8 x int8 with int32 sums on CPUs, whatever the bits: 4 bits make the file smaller, not the
    product faster than 8 bits. Weights of 4 bits are unpacked to int8 when the file is opened.

    Args:
        model: From `s2d.quantize` or `s2d.load`, on the CPU.
        path: ``NAME.onnx`` or ``NAME.xml``; ``NAME.json`` beside it will hold the report.
        example: Keyword inputs of the model, a batch of two or more; batch and length stay free in the file.
        embeddings: Bits of the embedding tables (one scale a row at 8, one for 32 columns below), 0 to leave them.
        task: Compares the metric, on ``split``; without it, the outputs on the example are compared.
        split: Which data.
        batch_size: Of the comparison.
        time_it: Measure latency against full precision, which is exported too for that.
        force: Keep a file that fails the comparison.
        notes: Told what is being done.

    Returns:
        What was found out.

    Raises:
        InputError: The model is not quantized, a site has no form in the runtime, the place cannot be written, or the
            file does not compute what the simulated model does (then no file is left).
    """
    target = Path(path)
    if target.suffix not in _FORMATS:
        raise InputError(f"{target}: unknown kind of file; name it {' or '.join(f'NAME{each}' for each in _FORMATS)}")
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file")
    if embeddings != 0 and not 2 <= embeddings <= 8:
        raise InputError(f"embeddings={embeddings!r} is a number of bits, 2 to 8, or 0 to leave the tables")
    require("onnxruntime", "export")
    if target.suffix == ".xml":
        require("openvino", "openvino")
    if len({len(value) for value in example.values()}) > 1:
        sizes = ", ".join(f"{name} of {len(value)}" for name, value in example.items())
        raise InputError(
            f"{type(model).__name__} takes batches of different sizes ({sizes}), and a file takes one; models of an "
            "image and a text tower become two files: s2d export, or s2d.export.towers.export_towers"
        )
    if not example or any(len(value) < 2 for value in example.values()):
        raise InputError("the example needs a batch of two or more, so that the file takes any number")
    reference = shared_copy(model)
    tables = round_embeddings(reference, embeddings) if embeddings else []
    lowered = lower(reference)
    kept, weights = _record_within(model), fingerprint(model)
    report = ExportReport(str(target), str(kept.spec), kept.method, embeddings if tables else 0)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / f"{target.stem}.onnx"
        notes("tracing")
        metadata = {"s2d.spec": report.spec, "s2d.method": kept.method, "s2d.weights": weights}
        write_onnx(lowered, example, made, metadata)
        notes("comparing every layer")
        gate.judge_layers(report, *compare_layers(made, lowered, reference, dict(example)))
        del lowered
        if target.suffix == ".xml":
            openvino.convert(made, made.with_suffix(".xml"))
        runner = open_exported(made.with_suffix(target.suffix))
        files = [each for each in Path(scratch).iterdir() if target.suffix == ".onnx" or each.suffix != ".onnx"]
        report.file_mb = sum(each.stat().st_size for each in files) / 1e6
        if task is None:
            gate.judge_output(report, reference, runner, example)
        else:
            notes(f"comparing {task.primary} on {split}")
            gate.judge_task(report, reference, runner, task, split, batch_size)
        del reference, runner
        notes("measuring")
        gate.describe_cost(report, made, model, example, time_it=time_it)
        if report.failures and not force:
            raise InputError(
                f"{target} was not written: {'; '.join(report.failures)}; force (--force) keeps the file anyway"
            )
        for each in files:
            os.replace(each, target.parent / each.name)
    about = run_metadata(model_fingerprint=weights)
    write_json(target.with_suffix(".json"), {"run": about, "export": report.to_dict()})
    return report


def open_exported(path: str | os.PathLike[str], *, runtime: str | None = None, threads: int = 1) -> nn.Module:
    """An exported file as a module: keyword tensors in, named tensors out.

    Args:
        path: ``.onnx`` or ``.xml``.
        runtime: ``"onnxruntime"`` or ``"openvino"``; by default the one of the file.
        threads: For one product.

    Raises:
        InputError: No such file, another kind of file, a runtime that is missing.
    """
    source = Path(path)
    if not source.is_file() or source.suffix not in _FORMATS:
        raise InputError(f"{source} is not an exported model; name a file ending in {' or '.join(_FORMATS)}")
    chosen = runtime or ("openvino" if source.suffix == ".xml" else "onnxruntime")
    if chosen == "openvino":
        return OpenVinoModel(source, threads)
    if chosen != "onnxruntime" or source.suffix == ".xml":
        raise InputError(f"{chosen} does not run {source.name}; runtimes are onnxruntime (.onnx) and openvino")
    return OnnxModel(source, threads)


def _record_within(model: nn.Module) -> Record:
    """How the model, or the encoder that it was built on, was quantized."""
    known = [module for module in model.modules() if peek(module) is not None]
    return record(known[0] if known else model)


def example_of(batches: Iterable[Any]) -> dict[str, Tensor]:
    """The first batch of two or more keyword inputs, for tracing.

    Raises:
        InputError: There is none.
    """
    for batch in batches:
        if isinstance(batch, Mapping) and all(isinstance(v, torch.Tensor) and len(v) > 1 for v in batch.values()):
            return dict(batch)
    raise InputError("no batch of two or more examples; add --data with more of them")
