"""s2d evaluate."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from s2d.commands.shared import (
    Data,
    Device,
    JsonFile,
    Model,
    Overrides,
    Quiet,
    TaskName,
    app,
    check_file,
    command,
    save_json,
    say,
    settings,
    show,
)


@command(app, example="s2d evaluate runs/w4a4 --task docstrings")
def evaluate(
    model: Model,
    task: TaskName = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="Data split: train, validation or test.")] = "test",
    o: Overrides = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Score a model on a task: as published, conditioned, or quantized.

    Further settings have the keys of a recipe: -o task.max_length=128, -o batch_size=32.
    """
    check_file(json_file)
    from s2d import quant
    from s2d.checkpoint import load
    from s2d.distributed.processes import device_of
    from s2d.io.provenance import measured, run_metadata
    from s2d.models.footprint import refuse_too_little
    from s2d.tasks import create
    from s2d.tasks.evaluation import evaluate as judge

    recipe = settings(model, task, data, o, split=split)
    made = create(recipe.task.name, **recipe.task.options)
    refuse_too_little("evaluating", model, device_of(device))
    loaded = load(model, device=device_of(device))
    with measured() as cost:
        metrics = judge(loaded, made, split=recipe.split, batch_size=recipe.batch_size)
    known = quant.record(loaded.model) if quant.is_quantized(loaded.model) else None
    published, conditioning = loaded.origin
    records = [
        {
            "task": recipe.task.label,
            "model": published,
            "conditioning": conditioning,
            "seed": 0,
            "spec": "fp32" if known is None else str(known.spec),
            "method": "none" if known is None else known.method,
            "metric": metric,
            "value": value,
            "higher_is_better": made.prefers_higher(metric),
            "seconds": cost.seconds,
            "peak_mb": cost.peak_mb,
            "split": split,
        }
        for metric, value in metrics.items()
    ]
    if json_file is not None:
        about = run_metadata(data_hash=made.fingerprint, model_fingerprint=loaded.fingerprint)
        save_json(json_file, {"run": about, "records": records})
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}")
    if not quiet:
        say(quiet, f"{model} on {recipe.task.label} ({split})")
        show(table)
        for line in made.notes():
            say(quiet, line)
