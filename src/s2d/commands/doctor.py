"""s2d doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


@command(app, example="s2d doctor model.onnx --fix mended.onnx")
def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[MODEL.onnx]", help="Say instead what will ruin a range in this file.")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.onnx", help="Write a mended file that computes the same.")
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Say what is installed here, what is missing and how to get it; of an ONNX file, what static quantizers trip over.

    With a file from any exporter: mask constants that leave all scores one code, weights with one large channel,
    constants that serve two purposes, an opset without the scales that are needed.
    """
    if file is not None:
        _file(file, fix, json_file, quiet)
        return
    if fix is not None:
        raise InputError("--fix mends a file; name it: s2d doctor MODEL.onnx --fix OUT.onnx")
    from s2d.doctor import examine

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


def _file(file: Path, fix: Path | None, json_file: Path | None, quiet: bool) -> None:
    check_file(fix)
    check_file(json_file)
    from s2d.export import onnx_doctor

    findings = onnx_doctor.examine(onnx_doctor.open_file(file))
    mended = None if fix is None else onnx_doctor.fix(file, fix)
    if json_file is not None:
        content = {"file": str(file), "findings": [each.to_dict() for each in findings]}
        if mended is not None:
            content["fixed"] = {"file": str(fix), "mask": -mended[0], "outputs_moved": mended[1]}
        save_json(json_file, content)
    for each in findings:
        say(quiet, f"{each.kind}: {each.where}: {each.text} ({each.fixed_by})")
    if not findings:
        say(quiet, f"{file}: nothing found that ruins a range")
    if mended is not None:
        say(quiet, f"{fix}: masks of {-mended[0]:.0f}; outputs moved by {mended[1]:.1e} of their largest value")
