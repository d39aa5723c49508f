"""s2d export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from s2d.commands.calibration_set import write_calibration_set
from s2d.commands.shared import (
    Data,
    ForRuntime,
    JsonFile,
    Model,
    Overrides,
    Quiet,
    TaskName,
    app,
    check_file,
    check_folder,
    command,
    save_json,
    say,
    settings,
)
from s2d.errors import InputError

if TYPE_CHECKING:
    from s2d.export import ExportReport


@command(app, example="s2d export runs/w4a4 --out model.onnx --task docstrings")
def export(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="NAME.onnx, NAME.xml, NAME.gguf, or a folder: see below.")
    ] = None,
    task: TaskName = None,
    data: Data = None,
    for_: ForRuntime = None,
    calibration_set: Annotated[
        bool, typer.Option("--calibration-set", help="A plain model and its calibration inputs, for --for: see below.")
    ] = False,
    shape: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Sizes that an ONNX file fixes: batch=1,tokens=128.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples in that set.")] = 128,
    embeddings: Annotated[
        int | None,
        typer.Option(
            help="Bits of embedding tables: 8, 4, or 0 for full precision; by default 8, or 4 beside 4-bit weights "
            "where little is lost."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="ONNX operators: qdq, integer (MatMulInteger) or types (INT4, UINT4); as --for reads them."),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(metavar="NAME", help="List the nodes that run on this device, and those that do not.")
    ] = None,
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="Fail if a node of the file does not run on that device.")
    ] = False,
    split: Annotated[str, typer.Option(help="Data split on which the metric is compared.")] = "validation",
    time_it: Annotated[bool, typer.Option("--time/--no-time", help="Measure latency against fp32.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Keep the file even if it does not compute the same.")] = False,
    o: Overrides = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Write a quantized model for a runtime; onnxruntime and OpenVINO run NAME.onnx with integer kernels.

    Before it is handed over, every layer is compared with the simulated one, and with --task the metric too. The report
    says what is 4-bit on disk, what in memory, and what the multiply really is; it is kept beside the file as JSON, and
    the tokenizer or image processor in the folder NAME.inputs. CLIP and SigLIP become two files, NAME.image.onnx and
    NAME.text.onnx, whose vectors multiply to the scores (scale and bias: NAME.json).

    A name without a suffix is a folder in the format of compressed-tensors, for transformers and servers like vLLM;
    NAME.gguf is for llama.cpp. Both are read back by those libraries and compared before they are handed over.

    With --calibration-set the model is a plain one (best: from s2d condition) for a compiler that quantizes by itself:
    --for any, hailo, qnn or vitis. The folder holds float32 ONNX with bounded masks, calibration inputs, expected
    outputs, and a page with the commands that follow.
    """
    if calibration_set:
        write_calibration_set(
            model,
            out,
            runtime=for_,
            shape=shape,
            task=task,
            data=data,
            overrides=o,
            samples=samples,
            json_file=json_file,
            quiet=quiet,
        )
        return
    if out is None:
        raise InputError("where should the exported model go? add --out NAME.onnx")
    (check_file if out.suffix else check_folder)(out)
    check_file(json_file)
    from s2d.commands.terminal import Watch
    from s2d.experiments.exporting import ExportOrder, export_model
    from s2d.export.fixed_shapes import parse_shape
    from s2d.export.placement import provider_name
    from s2d.export.runtime import find_runtime
    from s2d.tasks import check_split

    order = ExportOrder(
        model,
        recipe=settings(model, task, data, o) if task is not None or o else None,
        data=data,
        runtime=None if for_ is None else find_runtime(for_),
        embeddings=embeddings,
        form=form,  # pyright: ignore[reportArgumentType]  # checked with the file
        shape=parse_shape(shape),
        provider=None if provider is None else provider_name(provider) if out.suffix == ".onnx" else provider,
        fallback=not no_fallback,
        split=check_split(split),
        time_it=time_it,
        force=force,
    )
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        reports = export_model(order, out, notes=lambda text: watch.stage(text, 1))
    if json_file is not None:
        content = [report.to_dict() for report in reports]
        save_json(json_file, {"export": content[0] if len(content) == 1 else content})
    for report in reports:
        _tell(quiet, report)


def _tell(quiet: bool, report: ExportReport) -> None:
    """Print the notes on one file."""
    parity = report.parity
    worst = max((row.error for row in report.layers), default=0.0)
    say(
        quiet,
        f"{report.path}: {report.spec} {report.method}, {'passed' if report.passed else 'FAILED, kept by --force'}",
    )
    say(quiet, f"layers: {len(report.layers)} compared, largest relative error {worst:.1e}")
    say(
        quiet,
        f"{parity['metric']} ({parity['split']}): simulated {parity['simulated']:.4g}, exported "
        f"{parity['exported']:.4g}; simulated and perturbed by 1e-6 {parity['perturbed']:.4g}",
    )
    for line in (*report.label, *report.failures):
        say(quiet, line)
