"""The work of s2d quantize --method auto: from a promise to a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from s2d.commands.shared import check_file, check_folder, save_json, say, settings
from s2d.errors import InputError

if TYPE_CHECKING:
    from s2d.experiments.auto.search import Search

METHOD = "auto"


def check_options(method: str, chosen: dict[str, Any], promised: dict[str, Any]) -> None:
    """Refuse options that do not belong to the method.

    Args:
        method: The method of the command.
        chosen: Options that ``auto`` decides itself, with what the command line gave; None or False where nothing.
        promised: Options that only ``auto`` has, likewise.

    Raises:
        InputError: The first that does not belong.
    """
    wrong = [name for name, value in (chosen if method == METHOD else promised).items() if value not in (None, False)]
    if wrong and method == METHOD:
        raise InputError(f"--method auto chooses by itself; leave out {wrong[0]}")
    if wrong:
        raise InputError(f"{wrong[0]} is a part of a promise; add --method auto")


def keep_promise(
    model: str,
    task: str | None,
    data: str | None,
    o: list[str] | None,
    *,
    runtime: str | None,
    within: float | None,
    minutes: float | None,
    fastest: bool,
    out: Path | None,
    dry_run: bool,
    seed: int,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Run the search and print the verdict.

    Raises:
        InputError: An option is missing, or the request cannot be carried out.
        typer.Exit: With 3 where it is not sure that a file keeps the promise, with 4 where none does.
    """
    if runtime is None or within is None:
        raise InputError(
            "a promise is for a runtime and within points of accuracy; add "
            + ("--for onnxruntime" if runtime is None else "--within 1")
        )
    if out is None and not dry_run:
        raise InputError("where should the file and what was tried go? add --out FOLDER, or --dry-run to see the plan")
    check_folder(out)
    check_file(json_file)
    from s2d.commands.terminal import Watch
    from s2d.experiments.auto.promise import Promise
    from s2d.experiments.auto.search import Search
    from s2d.io.provenance import run_metadata
    from s2d.models import load
    from s2d.models.footprint import refuse_too_little
    from s2d.tasks import create
    from s2d.tasks.evaluation import model_for

    promise = Promise.parse(runtime, within, minutes, "fastest" if fastest else "smallest")
    recipe = settings(model, task, data, o)
    made = create(recipe.task.name, **recipe.task.options)
    refuse_too_little("quantizing", model, "cpu")
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        watch.stage(f"loading {model}", 1)
        loaded = load(model)
        place = out if out is not None else Path("auto")
        search = Search(loaded, model_for(loaded, made), made, promise, place, seed, watch)
        if dry_run:
            _tell_plan(search, minutes)
            return
        verdict = search.run()
    if json_file is not None:
        about = run_metadata(data_hash=made.fingerprint, model_fingerprint=loaded.fingerprint, model=model, seed=seed)
        save_json(json_file, {"run": about, "verdict": verdict.to_dict()})
    for line in verdict.lines:
        say(quiet, line)
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)


def _tell_plan(search: Search, limit: float | None) -> None:
    """Print the candidates that would be tried; takes seconds."""
    from s2d.experiments.auto.ladder import RUNGS

    print(f"legal for {search.runtime.name}, the first candidates:")
    for candidate, size, complaint in search.beginning():
        print(f"  {candidate.label}: {f'about {size / 1e6:.1f} MB' if complaint is None else complaint}")
    for rung in RUNGS[1:]:
        print(f"then {rung.name}: {rung.about}")
    if limit is not None:
        print("then, in what is left of the time, training with the quantizers in place")
    minutes = search.expected_seconds() / 60
    end = "" if limit is None else f"; it ends after {limit:g}, with the best file until then"
    print(f"expected: about {max(minutes, 1):.0f} minutes for all of it on this machine{end}")
