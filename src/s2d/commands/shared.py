"""Shared parts of all commands: the application, common options, and checks before and after the work.

Heavy libraries are imported inside the commands, so that the help appears at once.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2d.distributed import processes
from s2d.errors import InputError, visible

if TYPE_CHECKING:
    from rich.table import Table

    from s2d.experiments.recipe import Recipe


app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(
    of: typer.Typer, name: str | None = None, *, example: str, together: bool = False
) -> Callable[[Callable[..., None]], Callable]:
    """Register a command; its docstring is the help, its paragraphs without the line breaks of the source.

    Those that do not work `together` with others of the same command are refused under torchrun.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
        called = f"s2d {name or function.__name__}"

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> None:
            if processes.count() > 1 and not together:
                raise InputError(f"{called} runs in one process; start it without torchrun")
            function(*args, **options)

        return of.command(name, help=text, epilog=f"Example: {example}")(checked)

    return register


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder or file, an installed package with a model, timm:NAME, open_clip:NAME, or a name on the hub.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        "-o",
        metavar="KEY=VALUE",
        help="Change a setting, by its key in a recipe: s2d recipes show minilm-banking77. Repeatable.",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither progress nor tables.")]
TaskName = Annotated[
    str | None,
    typer.Option("--task", help="Task of the model: data, loss and metric. [bold]s2d doctor[/bold] lists them."),
]
Data = Annotated[str | None, typer.Option("--data", metavar="PATH", help="File or folder with the data.")]
ForRuntime = Annotated[
    str | None,
    typer.Option(
        "--for", metavar="RUNTIME", help="Refuse what this runtime cannot run. [bold]s2d doctor[/bold] lists them."
    ),
]
Device = Annotated[str, typer.Option("--device", help="Device: cpu, cuda, ... or auto.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all random choices.")]


def settings(model: str, task: str | None, data: str | None, overrides: list[str] | None, **more: Any) -> Recipe:
    """The options of a command as a recipe."""
    from s2d.experiments.recipe import make_recipe
    from s2d.experiments.recipe_files import move
    from s2d.tasks import tasks

    if task is None:
        raise InputError(f"what is the model for? add --task, one of {', '.join(tasks())}")
    content = {"model": model, "task": {"name": task, **({} if data is None else {"data": data})}, **more}
    return make_recipe(
        content, [move(override, "decay.", "arms.s2d.") for override in overrides or ()], shown="settings"
    )


def check_file(path: Path | None) -> None:
    """Refuse a place that cannot be written before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    _check_writable(path)


def check_folder(path: Path | None) -> None:
    """The same for a folder."""
    if path is None:
        return
    if path.is_file():
        raise InputError(f"{path} is a file; name a folder")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(
            f"{path} cannot be written: {place} is not a folder that you may write to; choose another place"
        )


def save_json(path: Path, content: Any) -> None:
    """Write results, atomically."""
    from s2d.io.files import write_json

    write_json(path, content)


def say(quiet: bool, text: str) -> None:
    """Print a command's own lines at once."""
    if not quiet:
        print("\n".join(visible(line, 1500) for line in text.split("\n")), flush=True)


def show(table: Table) -> None:
    """Print a table. Names in it are untrusted input: square brackets and colons are no markup."""
    from rich.console import Console

    Console(markup=False, emoji=False, highlight=False).print(table)


def bars(quiet: bool) -> bool:
    """Whether progress bars are shown: standard output and standard error are terminals."""
    return not quiet and sys.stdout.isatty() and sys.stderr.isatty()
