"""s2d demo, s2d run."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from s2d.commands.shared import (
    JsonFile,
    Overrides,
    Quiet,
    app,
    check_file,
    command,
    save_json,
    show,
)
from s2d.errors import InputError

_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's and Ubuntu's package puts it


@command(app, example="s2d demo", together=True)
def demo(
    vision: Annotated[bool, typer.Option("--vision", help="Use a vision transformer and Fashion-MNIST.")] = False,
    o: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run; runs/demo or runs/demo-vision by default.")
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the report.")] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Show on a real, published sentence encoder what S2D does: two short trainings, some 340 CPU-seconds.

    MiniLM is fine-tuned twice from the same start, with AdamW and with AdamW and S2D, on docstrings of installed
    packages; both are quantized to 4 bits and compared. Interrupt it at any time: the same command continues.
    Longer texts, more steps, 8 and 6 bits too, in half an hour: s2d run minilm-docstrings.

    --vision: the same on a small vision transformer that comes with s2d, trained until four bits cost it ten points.
    It needs Fashion-MNIST: apt install dataset-fashion-mnist, or its four files elsewhere and -o task.data=FOLDER.
    """
    if vision and not _FASHION.exists() and not any(each.startswith("task.data=") for each in o or ()):
        raise InputError(
            "the vision demo needs Fashion-MNIST: apt install dataset-fashion-mnist; or put its files into a folder "
            "and name it: -o task.data=FOLDER; or download it: -o task.data=datasets:zalando-datasets/fashion_mnist"
        )
    out = out or Path("runs/demo-vision" if vision else "runs/demo")
    _run("vit-fashion-condition" if vision else "minilm-demo", o, out, json_file, quiet)
    if not no_open and _has_display():
        import webbrowser

        webbrowser.open((out / "report.html").resolve().as_uri())


@command(app, example="s2d run minilm-banking77 -o 'seeds=[0]' -o split=validation --out runs/try", together=True)
def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name from [bold]s2d recipes list[/bold], or a file.")
    ],
    o: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run; runs/RECIPE by default.")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Try the whole recipe offline in a minute: a tiny model, made-up data.")
    ] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: audit, fine-tune every arm, quantize, evaluate, report.

    Every finished stage is kept in the run's folder. A run that was interrupted, or repeated with other settings,
    computes only what is missing.
    """
    _run(recipe, o, out, json_file, quiet, smoke=smoke)


def _run(
    recipe: str,
    overrides: list[str] | None,
    out: Path | None,
    json_file: Path | None,
    quiet: bool,
    *,
    smoke: bool = False,
) -> None:
    check_file(json_file)
    from s2d.commands.terminal import Watch, comparison
    from s2d.distributed import processes
    from s2d.distributed.processes import device_of
    from s2d.experiments.recipe import read_recipe
    from s2d.experiments.runner import Runner
    from s2d.io.folder_lock import locked

    name, content = read_recipe(recipe, overrides or ())
    folder = out or Path("runs") / (f"{name}-smoke" if smoke else name)
    if smoke:
        from s2d.experiments.smoke import smoke_test

        processes.meet(device_of(content.device) == "cpu")
        content = processes.as_first(smoke_test(content, folder / "data") if processes.leads() else None)
    quiet = quiet or not processes.leads()
    with locked(folder) if processes.leads() else nullcontext(), Watch(Console(stderr=True), quiet=quiet) as watch:
        runner = Runner(name, content, folder, watch, trial=smoke)
        results = runner.run() if processes.leads() else runner.follow()
    processes.part()
    if results is None:
        return
    if json_file is not None:
        save_json(json_file, results)
    if not quiet:
        for table in comparison(results):
            show(table)


def _has_display() -> bool:
    if os.environ.get("CI") or not sys.stdout.isatty():
        return False
    on_linux = sys.platform not in ("darwin", "win32")
    return not on_linux or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
