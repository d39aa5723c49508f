"""s2d recipes list, show."""

from __future__ import annotations

from typing import Annotated

import typer
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

recipes_app = typer.Typer(help="The recipes that come with s2d.", rich_markup_mode="rich")
app.add_typer(recipes_app, name="recipes")


@command(recipes_app, "list", example="s2d recipes list")
def recipes_list(json_file: JsonFile = None, quiet: Quiet = False) -> None:
    """List the recipes that come with s2d."""
    from s2d.recipe import packaged

    found = packaged()
    if json_file is not None:
        save_json(json_file, {"recipes": found})
    table = Table("recipe", "what it does", box=None)
    for name, about in found.items():
        table.add_row(name, Text(about))
    if not quiet:
        show(table)


@command(recipes_app, "show", example="s2d recipes show minilm-banking77 > mine.yaml")
def recipes_show(recipe: Annotated[str, typer.Argument(metavar="RECIPE")]) -> None:
    """Print a recipe, to read or to start one's own from."""
    from s2d.recipe import read_text

    print(read_text(recipe)[1], end="")
