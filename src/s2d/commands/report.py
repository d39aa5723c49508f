"""s2d report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from s2d.commands.shared import (
    Quiet,
    app,
    command,
    say,
)
from s2d.io.files import read_any_json


@command(app, example="s2d report runs/demo/results.json --out report.html")
def report(
    results: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON files of runs and audits.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("report.html"),
    quiet: Quiet = False,
) -> None:
    """Make one self-contained HTML page of the results of runs and audits."""
    from s2d.report import write_report

    contents: list[Any] = []
    for path in results:
        content = read_any_json(path)
        contents += content if isinstance(content, list) else [content]
    write_report(contents, out)
    say(quiet, f"{out}: written from {len(results)} file{'s' if len(results) > 1 else ''}")
