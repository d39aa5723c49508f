"""Fine-tuning: a task's loss, AdamW or Muon with a warm-up, and, when asked for, selective spectral decay.

The loop runs on accelerate, which brings the device, the precision and, under torchrun, data parallelism: every process
takes its share of each batch, and only the first one writes. The result of a run depends only on the model, the data,
the settings and the seed. A run that was interrupted and continued gives a bit-identical result on the CPU. Several
processes give the result of one process, up to rounding.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d.baselines import KEY, attach
from s2d.decay.budget import WITHOUT_LABELS
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.distributed import processes
from s2d.errors import InputError, first_line
from s2d.io.provenance import measured
from s2d.optional import require
from s2d.tasks import Task
from s2d.training.batching import _share, training_batches
from s2d.training.early_stopping import EarlyStopping
from s2d.training.frozen_teacher import FrozenTeacher
from s2d.training.optimizers import make_optimizer
from s2d.training.precision import resolved
from s2d.training.state import _deferred_interrupt, _Run, key_of
from s2d.training.step_guard import StepGuard, train_step
from s2d.training.train_settings import Companion, OnStep, Training, TrainSettings


def train(
    model: nn.Module,
    task: Task,
    settings: TrainSettings | None = None,
    *,
    seed: int = 0,
    decay: Mapping[str, Any] | None = None,
    companion: Companion | None = None,
    state: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> Training:
    """Fine-tune a model in place; it ends in evaluation mode.

    Args:
        model: From ``task.build``.
        task: Its data and loss.
        settings: See `TrainSettings`.
        seed: Seed of the order of the data and of dropout. The global random state is not changed.
        decay: Keywords of `SelectiveSpectralDecay` (``{}`` for its defaults, see `decay_for`), ``{"baseline": NAME,
            ...}`` for a baseline with its settings (see `s2d.baselines`), or None to train without either.
        companion: Parameters or losses that are trained with the model, such as the ranges of quantizers.
        state: A file to keep the training's state in. Where it exists already, training continues from it. It is
            written every ``settings.save_every`` seconds, on Ctrl-C and at the end; remove it when the model is saved.
        on_step: Called with the number of steps taken and the last loss.
        on_checkpoint: Called with the number of steps taken at each of ``settings.checkpoints``, in evaluation mode.

    Raises:
        InputError: Impossible settings, losses that stay non-finite, a state of other settings, or a failed write.
        KeyboardInterrupt: Ctrl-C (or a termination signal); with `state`, everything was saved first.
    """
    settings = settings or TrainSettings()
    place = next(model.parameters()).device
    decay = decay_for(task, decay)
    key = key_of(model, task, settings, seed, decay, companion)
    precision = resolved(settings.precision, place)
    accelerator = _accelerator(place, task, settings)
    raw = make_optimizer(settings.optimizer, model, parameter_groups(model, settings, companion), settings.lr)
    prepared, optimizer = accelerator.prepare(model, raw)
    clock = _Clock(settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        raw, lambda step: schedule(clock.steps(step), settings.steps, settings.warmup)
    )
    devices = [place.index or 0] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), contextlib.ExitStack() as stack:
        torch.manual_seed(seed)
        if settings.distill and companion is None:
            companion = FrozenTeacher(model, task, settings.distill)
        if companion is not None:
            stack.callback(companion.remove)
        spectral = None
        if decay is not None:
            spectral = attach(model, raw, decay, total_steps=settings.steps, seed=seed)
            stack.callback(spectral.remove)
        if companion is not None:
            companion.attach(raw)
        if not settings.dropout:
            stack.enter_context(without_dropout(model))
        stack.callback(model.eval)
        guard = StepGuard(settings.spike, settings.lr)
        held_out = EarlyStopping(task, settings.check_every, settings.patience, settings.batch_size)
        place_of_state = Path(state) if state is not None else None
        run = _Run(model, raw, scheduler, spectral, companion, guard, held_out, place_of_state, key, precision)
        run.restore()
        _require_together(run.step, accelerator)
        interrupt = stack.enter_context(_deferred_interrupt()) if run.path is not None else None
        cost = stack.enter_context(measured())
        model.train()
        batches = itertools.islice(training_batches(task, settings, seed), run.step, None)
        started = saved = time.monotonic()
        before = clock.seconds = run.seconds
        while clock.steps(run.step) < settings.steps and not held_out.spent:
            with torch.autocast(place.type, torch.bfloat16, enabled=run.precision == "bf16"):
                loss = task.loss(prepared, _share(next(batches), accelerator))
                for other in (companion, spectral):
                    added = None if other is None or isinstance(other, SelectiveSpectralDecay) else other.loss()
                    loss = loss if added is None else loss + added
            value, seconds, ending = _together(
                accelerator, loss.item(), time.monotonic() - started, interrupt is not None and interrupt.is_set()
            )
            backward = partial(accelerator.backward, loss)
            clip = partial(accelerator.clip_grad_norm_, model.parameters(), settings.clip)
            train_step(guard, run.step + 1, value, optimizer, backward, clip, spectral)
            run.seconds = clock.seconds = before + (time.monotonic() - started if seconds is None else seconds)
            scheduler.step()
            run.step += 1
            run.losses.append(value)
            held_out.look(model, run.step)
            if on_step is not None and processes.leads():
                on_step(run.step, value)
            if on_checkpoint is not None and run.step in settings.checkpoints and processes.leads():
                model.eval()
                on_checkpoint(run.step)
                model.train()
            if ending or (seconds is None and interrupt is not None and interrupt.is_set()):
                run.save()
                raise KeyboardInterrupt
            if run.path is not None and time.monotonic() - saved >= settings.save_every and run.step < settings.steps:
                run.save()
                saved = time.monotonic()
    guard.check_end(run.step)
    if run.path is not None:
        run.save()
    history = list(spectral.history) if spectral is not None else []
    return Training(
        run.step,
        run.seconds,
        cost.peak_mb,
        run.losses,
        history,
        guard.skipped,
        held_out.checks,
        held_out.spent,
        run.precision,
        {**spectral.skipped, **spectral.without_site} if isinstance(spectral, SelectiveSpectralDecay) else {},
    )


def decay_for(task: Task, decay: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The settings of a decay in a task's training: those given, and where the loss is the distance from the original,
    a budget (see `s2d.decay.budget`), unless a budget, a strength, another preset or a baseline is named.
    """
    if decay is None or not task.distils or decay.keys() & {"budget", "strength", KEY}:
        return decay
    if decay.get("preset", "default") != "default":
        return decay
    return {"budget": WITHOUT_LABELS, **decay}


def _accelerator(place: torch.device, task: Task, settings: TrainSettings) -> Any:
    """An accelerator on the model's device, for all processes that torchrun started. The precision is left to torch:
    accelerate fixes its own for the life of the process.
    """
    accelerate = require("accelerate", "hf")
    processes.meet(place.type == "cpu")
    # Some models have parts that a task does not use; no process may wait for their gradients.
    parallel = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = accelerate.Accelerator(
            cpu=place.type == "cpu", mixed_precision="no", kwargs_handlers=[parallel] if processes.count() > 1 else None
        )
    except ValueError as error:
        raise InputError(
            "this process has an Accelerator with other settings already; train in a process of its own "
            f"({first_line(error)})"
        ) from error
    if accelerator.num_processes == 1:
        return accelerator
    if accelerator.distributed_type.value not in ("MULTI_CPU", "MULTI_GPU"):
        raise InputError(
            f"s2d's own training is data-parallel, not {accelerator.distributed_type.value}; unset the plugin, or "
            "shard in a loop of your own: SelectiveSpectralDecay works with fully_shard (docs/scaling.md)"
        )
    if not task.separable:
        raise InputError(
            f"the loss of {task.name} compares all examples of a batch, which {accelerator.num_processes} processes do "
            "not see; train it in one process"
        )
    if settings.batch_size % accelerator.num_processes:
        raise InputError(
            f"train.batch_size={settings.batch_size} cannot be shared by {accelerator.num_processes} processes; "
            "choose a multiple of them"
        )
    return accelerator


def _together(accelerator: Any, loss: float, seconds: float, ending: bool) -> tuple[float, float | None, bool]:
    """The mean loss, the time of the slowest process, and whether any was asked to end; equal on all processes.

    A single process uses its own clock, at the end of the step.
    """
    if accelerator.num_processes == 1:
        return loss, None, False
    told = torch.tensor([[loss, seconds, float(ending)]], device=accelerator.device)
    losses, times, endings = accelerator.gather(told).unbind(1)
    return losses.mean().item(), times.max().item(), bool(endings.any())


def _require_together(step: int, accelerator: Any) -> None:
    """Refuse to continue if the processes are at different steps."""
    if accelerator.num_processes == 1:
        return
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise InputError(
            f"the processes found saved states of steps {sorted(set(steps))}; keep the state on a disk that all share"
        )


@dataclass
class _Clock:
    """Progress of a training, in steps, by the budget that is spent faster."""

    settings: TrainSettings
    seconds: float = 0.0

    def steps(self, step: int) -> float:
        if self.settings.minutes is None:
            return step
        return max(step, self.settings.steps * self.seconds / (60 * self.settings.minutes))


def schedule(step: float, steps: int, warmup: float) -> float:
    """The learning rate of a step (from 0) as a share of its peak: linear up, then linear down to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return max(0.0, (steps - step) / (steps - rising))


def parameter_groups(
    model: nn.Module, settings: TrainSettings, companion: Companion | None = None
) -> list[dict[str, Any]]:
    """The optimizer's groups: encoder and new parts, each with and without weight decay, and those of a companion.

    The encoder is the part named ``encoder.``; a model without such a part is all encoder.
    """
    others = [] if companion is None else companion.groups()
    own = {id(parameter) for group in others for parameter in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if not named:
        raise InputError(f"{type(model).__name__} has no trainable weights; set requires_grad on some")
    has_encoder = any(name.startswith("encoder.") for name, _ in named)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        new = has_encoder and not name.startswith("encoder.")
        groups.setdefault((new, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": members,
            "lr": (settings.head_lr or settings.lr) if new else settings.lr,
            "weight_decay": settings.weight_decay if matrix else 0.0,
        }
        for (new, matrix), members in groups.items()
    ] + others


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Disable dropout in training mode: in dropout modules and in the dropout rates of attention modules."""
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ("dropout", "attention_dropout")
        for name in names:
            rate = module.__dict__.get(name)
            if isinstance(rate, float):
                changed.append((module, name, rate))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in changed:
            setattr(module, name, rate)
