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
from s2d.errors import InputError
from s2d.io.files import parse_json


@command(app, example="s2d report runs/demo/results.json --out report.html")
def report(
    results: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON files of runs and audits.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
    quiet: Quiet = False,
) -> None:
    """Make one self-contained HTML page of the results of runs and audits."""
    from s2d.report import write_report

    contents: list[Any] = []
    for path in results:
        content = _read_any(path)
        contents += content if isinstance(content, list) else [content]
    write_report(contents, out)
    say(quiet, f"{out}: written from {len(results)} file{'s' if len(results) > 1 else ''}")


def _read_any(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the name") from error
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file ({error}); name a results.json of s2d") from error
