"""Graphs for onnxruntime and OpenVINO: traced, compared by layer and as a whole, measured, and moved to the target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from s2d.export import gate, openvino
from s2d.export.child_process import try_runtime
from s2d.export.copies import shared_copy
from s2d.export.gate import Check, ExportReport, give_back
from s2d.export.lowering import lower, round_embeddings
from s2d.export.onnx import OnnxModel, write_onnx
from s2d.export.operators import Form
from s2d.export.parity import compare_layers
from s2d.io.files import in_place_of


def export_graph(
    model: nn.Module,
    target: Path,
    report: ExportReport,
    example: Mapping[str, Tensor],
    calibrated: str,
    form: Form,
    check: Check,
) -> None:
    """Trace a model, compare the file, and move it to the target.

    Args:
        model: Quantized.
        target: ``NAME.onnx`` or ``NAME.xml``.
        report: Filled in.
        example: A batch of keyword inputs.
        calibrated: Fingerprint of the model, for the file's metadata.
        form: Of the operators.
        check: The comparisons, measurements and consequences.

    Raises:
        InputError: The runtime does not support a site; the comparison failed.
    """
    reference = shared_copy(model)
    if report.embeddings and not round_embeddings(reference, report.embeddings):
        report.embeddings = 0
    lowered = lower(reference, written_out=form == "integer")
    with in_place_of(target) as own:
        made = own.with_suffix(".onnx")
        check.notes("tracing")
        metadata = {
            "s2d.spec": report.spec,
            "s2d.method": report.method,
            "s2d.calibrated": calibrated,
            "s2d.form": form,
            "s2d.torch": torch.__version__,
        }
        write_onnx(lowered, example, made, metadata, form=form)
        give_back()
        check.notes("trying the runtime")
        try_runtime(made, example)
        check.notes("comparing every layer")
        gate.judge_layers(report, *compare_layers(made, lowered, reference, dict(example), form))
        del lowered
        give_back()
        if target.suffix == ".xml":
            openvino.convert(made, made.with_suffix(".xml"))
            try_runtime(made.with_suffix(".xml"), example, openvino=True)
        runner: nn.Module = openvino.OpenVinoModel(own) if target.suffix == ".xml" else OnnxModel(own)
        files = [each for each in own.parent.iterdir() if target.suffix == ".onnx" or each.suffix != ".onnx"]
        report.file_mb = sum(each.stat().st_size for each in files) / 1e6
        gate.judge(report, reference, runner, example, check)
        del reference, runner
        give_back()
        if check.describe:
            check.notes("measuring")
            gate.describe_cost(report, made, model, example, time_it=check.time_it)
        report.refuse(target, check.force)
        if made != own:
            made.unlink()
