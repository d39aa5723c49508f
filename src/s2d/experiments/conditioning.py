"""One model conditioned from start to end: loaded, trained with the decay, saved with its card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import nn

from s2d.checkpoint import load
from s2d.data.images import holds_images
from s2d.distributed import processes
from s2d.distributed.processes import device_of
from s2d.errors import InputError
from s2d.experiments.recipe import Recipe
from s2d.experiments.unfinished import clear, held_beside
from s2d.experiments.watcher import Silent, Watcher
from s2d.io.files import JSON
from s2d.io.provenance import run_metadata
from s2d.models import footprint, save_model
from s2d.report import held_back, write_card
from s2d.tasks import create
from s2d.tasks.teacher import head_of
from s2d.training.blockwise import condition_blocks
from s2d.training.loop import train
from s2d.training.train_settings import Training

_UNLABELLED = ("unlabelled-text", "unlabelled-images", "language-modeling")


def task_of(objective: str, task: str | None, data: str | None) -> str | None:
    """The task of an objective: the named task, or else single texts or images, by the kind of the data. A named task
    may also be ``language-modeling``, on running text.

    Raises:
        InputError: An unknown objective; a task with labels, or no data, for ``distill``.
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
        return "unlabelled-images" if holds_images(data) else "unlabelled-text"
    return task


def condition_model(
    recipe: Recipe,
    out: Path,
    *,
    blockwise: int | None = None,
    seed: int = 0,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
    watcher: Watcher | None = None,
) -> tuple[Training, JSON]:
    """Train a recipe's model with the decay of its arm ``s2d``, and save it into `out`. With several processes, the
    first one saves. An interrupted call continues where it stopped.

    Args:
        recipe: Model, task, ``train`` and the one arm.
        out: The folder to make.
        blockwise: Train block by block, on this many batches; see `s2d.training.blockwise`.
        seed: Seed of all random numbers.
        device: As in a recipe.
        say: Receives lines of text for people.
        watcher: Receives the progress.

    Returns:
        The outcome of the training, and the description of the run for a results file.

    Raises:
        InputError: The model, the data, the settings or the folder cannot be used; too little memory.
    """
    watch, decay, held = watcher or Silent(), recipe.arms["s2d"], held_beside(out)
    watch.stage(f"loading {recipe.model}", 1)
    task = create(recipe.task.name, **recipe.task.options)
    tokens = recipe.train.batch_size * task.tokens
    needed = partial(footprint.to_train, tokens=tokens)
    if blockwise is not None:
        needed = partial(footprint.to_train_blocks, tokens=tokens, batches=blockwise)
    footprint.refuse_too_little("conditioning", recipe.model, device_of(device), needed)
    loaded = load(recipe.model, device=device_of(device))

    def note(step: int, loss: float) -> None:
        watch.advance(step, f"loss {loss:.3g}")

    model: nn.Module = loaded.model
    if blockwise is None:
        model = task.build(loaded, seed)
        if task.new_head:
            say(task.new_head.replace("would be random", "is made", 1))
    else:
        task.prepare(loaded)
    if head_of(loaded.model) is not None and not (decay or {}).keys() & {"strength", "budget", "preset"}:
        gentler = "decay.budget=0.1" if task.distils and blockwise is None else "decay.strength=0.005"
        watch.say(
            f"the default strength was chosen on encoders; for a language model begin with -o {gentler}, or "
            "-o decay.strength=0 for training without decay"
        )
    if blockwise is None:
        watch.stage("training", recipe.train.steps)
        done = train(model, task, recipe.train, seed=seed, decay=decay, state=held / "state.pt", on_step=note)
    else:
        begin = partial(watch.stage, "training block by block")
        done = condition_blocks(
            model, task, recipe.train, batches=blockwise, seed=seed, decay=decay, resume=held / "blocks", on_step=note,
            on_total=begin,
        )  # fmt: skip
    processes.part()
    notes = {"conditioned": recipe.model_dump(include={"model", "task", "train", "arms"}), "seed": seed}
    about = run_metadata(data_hash=task.fingerprint, model_fingerprint=loaded.fingerprint, **notes)
    if processes.leads():
        save_model(task.result(model), out, tokenizer=loaded.tokenizer, processor=loaded.processor, notes=notes)
        told = {**asdict(done), "seed": seed, "settings": recipe.train.outcome(), "decay": decay}
        write_card(out, base=recipe.model, task=recipe.task.name, training=told, run=about)
        clear(held)
        for line in filter(None, (*task.notes(), held_back(done.history))):
            say(line)
        if recipe.train.precision == "auto":
            say(f"train.precision=auto took {done.precision}")
    return done, about
