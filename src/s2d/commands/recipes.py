"""s2d recipes list, show, new."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from s2d.commands.shared import (
    JsonFile,
    Overrides,
    Quiet,
    app,
    check_file,
    command,
    save_json,
    say,
    show,
)
from s2d.errors import InputError

recipes_app = typer.Typer(
    help="The recipes that come with s2d.", epilog="Example: s2d recipes show minilm-banking77", rich_markup_mode="rich"
)
app.add_typer(recipes_app, name="recipes")


@command(recipes_app, "list", example="s2d recipes list")
def recipes_list(json_file: JsonFile = None, quiet: Quiet = False) -> None:
    """List the recipes that come with s2d."""
    from s2d.experiments.recipe_files import packaged

    found = packaged()
    if json_file is not None:
        save_json(json_file, {"recipes": found})
    table = Table("recipe", "what it does", box=None)
    for name, about in found.items():
        table.add_row(name, Text(about))
    if not quiet:
        show(table)


@command(recipes_app, "show", example="s2d recipes show minilm-banking77 > mine.yaml")
def recipes_show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name from s2d recipes list, or a file.")],
) -> None:
    """Print a recipe as YAML."""
    from s2d.experiments.recipe_files import read_text

    print(read_text(recipe)[1], end="")


@command(recipes_app, "new", example="s2d recipes new mine.yaml --like minilm-banking77 -o task.data=intents/")
def recipes_new(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The new file; it must not exist yet.")],
    like: Annotated[str, typer.Option(metavar="RECIPE", help="The recipe to start from.")] = "minilm-banking77",
    o: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Start your own recipe from another one: a copy, with the given changes. Run it with s2d run FILE."""
    from s2d.experiments.recipe import new_text
    from s2d.io.files import write_atomic

    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"{file} is no name for a recipe; it ends in .yaml")
    if file.exists():
        raise InputError(f"{file} exists already; choose another name, or remove it first")
    check_file(file)
    text = new_text(like, o or ())
    write_atomic(file, lambda stream: stream.write(text.encode()))
    say(quiet, f"{file}: like {like}; edit it, then: s2d run {file}")
