"""s2d doctor."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from s2d.commands.shared import (
    JsonFile,
    Quiet,
    app,
    command,
    save_json,
    show,
)


@command(app, example="s2d doctor")
def doctor(json_file: JsonFile = None, quiet: Quiet = False) -> None:
    """Say what is installed here, what is missing and how to get it."""
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
