"""Graphs for onnxruntime and OpenVINO: traced, compared by layer and as a whole, measured, and moved to the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from s2d.export import gate, openvino
from s2d.export.child_process import try_runtime
from s2d.export.copies import shared_copy
from s2d.export.fixed_shapes import ALONG_TOKENS, PADDING, along_tokens, fitted
from s2d.export.gate import Check, ExportReport, give_back
from s2d.export.lowering import lower, round_embeddings
from s2d.export.onnx import OnnxModel, tensors_of, write_onnx
from s2d.export.operators import Form
from s2d.export.parity import compare_layers
from s2d.export.placement import Placement, placement, refuse_fallback
from s2d.io.files import in_place_of


def export_graph(
    model: nn.Module,
    target: Path,
    report: ExportReport,
    example: Mapping[str, Tensor],
    calibrated: str,
    form: Form,
    check: Check,
    sizes: Mapping[str, int] | None = None,
    padding: int = 0,
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
        sizes: ``batch`` and ``tokens`` that the file fixes; None leaves them free.
        padding: The token that fills sequences up to a fixed length.

    Raises:
        InputError: The runtime does not support a site; the comparison failed; an example does not fit the sizes.
    """
    whole = example
    if sizes:
        example = fitted(example, sizes, padding)[0]
    reference = shared_copy(model)
    if report.embeddings and not round_embeddings(reference, report.embeddings):
        report.embeddings = 0
    lowered = lower(reference, form)
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
        if sizes:
            metadata |= {PADDING: str(padding), ALONG_TOKENS: ",".join(_along_tokens(reference, whole))}
        write_onnx(lowered, example, made, metadata, form=form, fixed=bool(sizes))
        give_back()
        check.notes("trying the runtime")
        try_runtime(made, example)
        check.notes("comparing every layer")
        gate.judge_layers(report, *compare_layers(made, lowered, reference, dict(example), form))
        del lowered
        give_back()
        if target.suffix == ".xml":
            try_runtime(made, example, openvino=True)  # reading it can end the process too
            openvino.convert(made, made.with_suffix(".xml"))
            try_runtime(made.with_suffix(".xml"), example, openvino=True)
        report.placement = _placed(own, target, check)
        runner: nn.Module = openvino.OpenVinoModel(own) if target.suffix == ".xml" else OnnxModel(own)
        files = [each for each in own.parent.iterdir() if target.suffix == ".onnx" or each.suffix != ".onnx"]
        report.file_mb = sum(each.stat().st_size for each in files) / 1e6
        gate.judge(report, reference, runner, whole, check)
        del reference, runner
        give_back()
        if check.describe:
            check.notes("measuring")
            gate.describe_cost(report, made, model, example, time_it=check.time_it, fixed=bool(sizes))
        report.refuse(target, check.force)
        if made != own:
            made.unlink()


def _placed(path: Path, target: Path, check: Check) -> Placement | None:
    """The nodes by device, where one was asked for.

    Raises:
        InputError: Some fell back, and that is not allowed.
    """
    if check.provider is None:
        return None
    found = replace(placement(path, check.provider), path=target.name)
    if not check.fallback:
        refuse_fallback(found)
    return found


@torch.no_grad()
def _along_tokens(model: nn.Module, example: Mapping[str, Tensor]) -> list[str]:
    return along_tokens(lambda **feed: tensors_of(model(**feed)), example)
