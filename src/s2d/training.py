"""Fine-tuning: a task's loss, AdamW or Muon with a warm-up, and, when asked for, selective spectral decay.

The loop runs on accelerate, which brings the device, the precision and, under torchrun, data parallelism: every process
takes its share of each batch, and only the first one writes. What a run yields is determined by the model, the data,
the settings and the seed; one that was interrupted and continued ends bit-identical on the CPU. On several processes it
ends where one process ends, up to rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from s2d import launch
from s2d.anchor import Anchor
from s2d.baselines import Baseline, attach
from s2d.decay import SelectiveSpectralDecay
from s2d.errors import InputError, require
from s2d.guard import StepGuard
from s2d.models import fingerprint
from s2d.models.checkpoints import refuse_compressed
from s2d.optimizers import OptimizerName, make_optimizer
from s2d.patience import Patience
from s2d.results import measured, write_atomic
from s2d.tasks import Batch, Task

# Texts of like length share a batch: this many batches are drawn together and sorted before they are cut.
MEGA_BATCH = 16
_STATE_VERSION = 3

OnStep = Callable[[int, float], None]


class TrainSettings(BaseModel):
    """How to fine-tune.

    Attributes:
        steps: Optimizer steps; at most so many where `minutes` is given.
        minutes: End after so much time in the loop, the schedule of the learning rate included; None for no limit. What
            a run yields then depends on the machine too.
        batch_size: Examples a step, of all processes together.
        optimizer: ``adamw``, or ``muon`` for the matrices of the blocks with AdamW for the rest (see `s2d.optimizers`).
        lr: Peak learning rate of the encoder.
        head_lr: Of everything else (a new classification head); as `lr` when None.
        weight_decay: Of the optimizer; biases and norms are left out, as usual.
        warmup: Share of the steps in which the rate rises linearly from 0; it falls linearly to 0 in the others.
        clip: Largest norm of the gradient.
        spike: Skip a step whose gradient is so many times as large as the median of the last 64; 0 takes them all. A
            loss or gradient that is no number is skipped always (see `s2d.guard`).
        dropout: Keep the model's own dropout. Off by default: short fine-tuning ends better and repeats exactly.
        group_by_length: Put texts of like length into one batch, which halves the time on short texts.
        distill: Weight of the distance from the model as it was before training, in shares of variance (see
            `s2d.anchor`); 0 leaves it out. Costs a forward pass a step. Quantized training has a weight of its own.
        precision: ``fp32``, or ``bf16`` for the computation; weights stay as they are.
        checkpoints: Steps after which the model is kept as it is then, to see how it changes over the training.
        check_every: Steps between two looks at the task's measure on the validation split; 0 for none. They take time.
        patience: Looks in a row without a new best after which training ends (see `s2d.patience`); 0 for never.
        save_every: Seconds between two saved states, where a place for them is given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=200, ge=1)
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=64, ge=1)
    optimizer: OptimizerName = "adamw"
    lr: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    head_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    spike: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    dropout: bool = False
    group_by_length: bool = True
    distill: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoints: tuple[int, ...] = ()
    check_every: int = Field(default=0, ge=0)
    patience: int = Field(default=0, ge=0)
    save_every: float = Field(default=120.0, ge=0)

    @model_validator(mode="after")
    def _something_to_wait_for(self) -> TrainSettings:
        if self.patience and not self.check_every:
            raise InputError(f"patience={self.patience} counts checks, and there are none; set check_every too")
        return self

    def outcome(self) -> dict[str, Any]:
        """The settings that the trained model depends on; what is kept on the way makes no difference to it."""
        return self.model_dump(exclude={"checkpoints", "save_every"})


class Companion(Protocol):
    """What trains along with a model; the loop knows no more about it than this."""

    @property
    def key(self) -> Any:
        """Plain data that tell apart trainings which must not continue each other."""
        ...

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of its own; their parameters are left out of the model's."""
        ...

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is made, and not yet restored."""
        ...

    def loss(self) -> torch.Tensor | None:
        """What it adds to the task's loss of the present step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...

    def remove(self) -> None:
        """The training is over."""
        ...


@dataclass
class Training:
    """How a training went.

    Attributes:
        steps: Optimizer steps taken.
        seconds: Time in the loop, over all parts of an interrupted run.
        peak_mb: See `s2d.results.Cost`.
        losses: One a step.
        history: The decay's, one record a refresh and weight; empty without decay.
        skipped: Steps that were counted and not taken, and why: their loss or gradient was no number, or a spike.
        checks: Step and value of each look at the validation split.
        stopped_early: It ended by ``settings.patience``.
    """

    steps: int
    seconds: float
    peak_mb: float
    losses: list[float]
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False


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
        seed: Of the order of the data and of dropout. The global random state is left as it was.
        decay: Keywords of `SelectiveSpectralDecay` (``{}`` for its defaults), ``{"baseline": NAME, ...}`` for a rival
            with its settings (see `s2d.baselines`), or None to train without either.
        companion: Something that trains along, such as the ranges of quantizers.
        state: A file to keep the training's state in. Where it exists already, training continues from it. It is
            written every ``settings.save_every`` seconds, on Ctrl-C and at the end; remove it when the model is saved.
        on_step: Called with the number of steps taken and the last loss.
        on_checkpoint: Called with the number of steps taken at each of ``settings.checkpoints``, in evaluation mode.

    Raises:
        InputError: Impossible settings, losses that stay no numbers, a state of other settings, or a disk that refuses.
        KeyboardInterrupt: Ctrl-C (or a termination signal); with `state`, everything was saved first.
    """
    settings = settings or TrainSettings()
    place = next(model.parameters()).device
    key = key_of(model, task, settings, seed, decay, companion)
    if settings.precision == "bf16" and place.type == "cpu" and not _multiplies_bfloat16():
        warnings.warn(
            "this CPU has no bfloat16 products: precision=bf16 is emulated here and many times slower than fp32",
            stacklevel=2,
        )
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
            companion = Anchor(model, task, settings.distill)
        if companion is not None:
            stack.callback(companion.remove)
        spectral = None
        if decay is not None:
            spectral = attach(model, raw, decay, seed=seed)
            stack.callback(spectral.remove)
        if companion is not None:
            companion.attach(raw)
        if not settings.dropout:
            stack.enter_context(without_dropout(model))
        stack.callback(model.eval)
        guard = StepGuard(settings.spike, settings.lr)
        held_out = Patience(task, settings.check_every, settings.patience, settings.batch_size)
        place_of_state = Path(state) if state is not None else None
        run = _Run(model, raw, scheduler, spectral, companion, guard, held_out, place_of_state, key)
        run.restore()
        _require_together(run.step, accelerator)
        interrupt = stack.enter_context(_deferred_interrupt()) if run.path is not None else None
        cost = stack.enter_context(measured())
        model.train()
        batches = itertools.islice(training_batches(task, settings, seed), run.step, None)
        started = saved = time.monotonic()
        before = clock.seconds = run.seconds
        while clock.steps(run.step) < settings.steps and not held_out.spent:
            with torch.autocast(place.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = task.loss(prepared, _share(next(batches), accelerator))
                for other in (companion, spectral):
                    added = None if other is None or isinstance(other, SelectiveSpectralDecay) else other.loss()
                    loss = loss if added is None else loss + added
            value, seconds, ending = _together(
                accelerator, loss.item(), time.monotonic() - started, interrupt is not None and interrupt.is_set()
            )
            optimizer.zero_grad()
            taken = guard.loss(run.step + 1, value)
            if taken:
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip)
                taken = guard.gradient(run.step + 1, float(norm))
            if taken:
                optimizer.step()
            elif spectral is not None:
                spectral.forget()  # what this step showed is not its next one's
            run.seconds = clock.seconds = before + (time.monotonic() - started if seconds is None else seconds)
            scheduler.step()
            run.step += 1
            run.losses.append(value)
            held_out.look(model, run.step)
            if on_step is not None and launch.leads():
                on_step(run.step, value)
            if on_checkpoint is not None and run.step in settings.checkpoints and launch.leads():
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
        run.step, run.seconds, cost.peak_mb, run.losses, history, guard.skipped, held_out.checks, held_out.spent
    )


def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has such products on this CPU; where torch comes without it, nothing is known and nothing said."""
    return not torch.backends.mkldnn.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _accelerator(place: torch.device, task: Task, settings: TrainSettings) -> Any:
    """An accelerator on the model's device, for all processes that torchrun started. The precision is left to torch:
    accelerate fixes its own for the life of the process.
    """
    accelerate = require("accelerate", "hf")
    launch.meet(place.type == "cpu")
    # Some models have parts that a task does not use, whose gradients no process must wait for.
    parallel = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = accelerate.Accelerator(
            cpu=place.type == "cpu", mixed_precision="no", kwargs_handlers=[parallel] if launch.count() > 1 else None
        )
    except ValueError as error:
        raise InputError(
            "this process has an Accelerator with other settings already; train in a process of its own "
            f"({_first_line(error)})"
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


def _share(batch: Batch, accelerator: Any) -> Batch:
    """This process's rows of a batch; of a short one the rows that do not go round are left out."""
    each = _rows(batch) // accelerator.num_processes
    if each == 0:
        raise InputError(
            f"{_rows(batch)} training examples cannot be shared by {accelerator.num_processes} processes; use fewer"
        )
    first = each * accelerator.process_index
    return batch if accelerator.num_processes == 1 else {n: t[first : first + each] for n, t in batch.items()}


def _together(accelerator: Any, loss: float, seconds: float, ending: bool) -> tuple[float, float | None, bool]:
    """The mean loss, the time of the slowest process, and whether any was asked to end: the same for all of them.

    One process alone goes by its own clock, at the end of the step.
    """
    if accelerator.num_processes == 1:
        return loss, None, False
    told = torch.tensor([[loss, seconds, float(ending)]], device=accelerator.device)
    losses, times, endings = accelerator.gather(told).unbind(1)
    return losses.mean().item(), times.max().item(), bool(endings.any())


def _require_together(step: int, accelerator: Any) -> None:
    """Refuse to continue from different places."""
    if accelerator.num_processes == 1:
        return
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise InputError(
            f"the processes found saved states of steps {sorted(set(steps))}; keep the state on a disk that all share"
        )


@dataclass
class _Clock:
    """How far a training is, in steps, by whichever budget is spent faster."""

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

    The encoder is what stands under ``encoder.``; in a model without such a part, everything is.
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


def training_batches(task: Task, settings: TrainSettings, seed: int) -> Iterator[Batch]:
    """Batches without end, every epoch in another order.

    The last, smaller batch of an epoch is left out; not of batches of like length, which would lose the longest rows.
    """
    for epoch in itertools.count():
        epoch_seed = seed * 1_000_003 + epoch
        if not (settings.group_by_length and task.ragged):
            whole = task.batches("train", batch_size=settings.batch_size, seed=epoch_seed, shuffle=True)
        else:
            megas = task.batches("train", batch_size=settings.batch_size * MEGA_BATCH, seed=epoch_seed, shuffle=True)
            generator = torch.Generator().manual_seed(epoch_seed)
            whole = (batch for mega in megas for batch in _by_length(mega, settings.batch_size, generator))
        given = 0
        for batch in whole:
            # Of batches of like length the small one holds the longest rows: it is trained on too.
            enough = launch.count() if settings.group_by_length and task.ragged else settings.batch_size
            if given and _rows(batch) < enough:
                continue
            given += 1
            yield batch


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _by_length(mega: Batch, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Cut a shuffled mega-batch into batches of like length, in random order, each without needless padding."""
    ending = "attention_mask"
    masks = {name.removesuffix(ending): mask for name, mask in mega.items() if name.endswith(ending)}
    rows = _rows(mega)
    order = torch.arange(rows)
    if masks:
        order = torch.stack([mask.sum(1) for mask in masks.values()]).sum(0).argsort(stable=True)
    parts = order.split(batch_size)
    for part in torch.randperm(len(parts), generator=generator).tolist():
        batch = {name: tensor[parts[part]] for name, tensor in mega.items()}
        for prefix, mask in masks.items():
            width = int(mask[parts[part]].sum(1).max())
            for name, tensor in batch.items():
                if name.startswith(prefix) and tensor.ndim > 1 and tensor.shape[1] == mask.shape[1]:
                    batch[name] = tensor[:, :width]
        yield batch


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout in training mode: neither by dropout modules nor by the rates that attention modules keep."""
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


@dataclass
class _Run:
    """A training as it stands, and its file."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    decay: SelectiveSpectralDecay | Baseline | None
    companion: Companion | None
    guard: StepGuard
    held_out: Patience
    path: Path | None
    key: str
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def save(self) -> None:
        assert self.path is not None
        if not launch.leads():
            return  # all processes hold the same
        content = {
            "version": _STATE_VERSION,
            "key": self.key,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "decay": None if self.decay is None else self.decay.state_dict(),
            "companion": None if self.companion is None else self.companion.state_dict(),
            "guard": self.guard.state_dict(),
            "checks": self.held_out.checks,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }
        write_atomic(self.path, lambda file: torch.save(content, file))

    def restore(self) -> None:
        if self.path is None or not self.path.exists():
            return
        content = read_state(self.path)
        if content["key"] != self.key:
            raise InputError(
                f"{self.path} holds a training with other settings, data or weights; remove it, or choose another place"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        if self.decay is not None:
            self.decay.load_state_dict(content["decay"])
        if self.companion is not None:
            self.companion.load_state_dict(content["companion"])
        self.guard.load_state_dict(content["guard"])
        self.held_out.checks = content["checks"]
        torch.set_rng_state(content["random"])
        if content["random_cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(content["random_cuda"])
        self.step, self.seconds, self.losses = content["step"], content["seconds"], content["losses"]


def read_state(path: Path) -> dict[str, Any]:
    """A saved training state: tensors and plain containers; nothing in it can run code.

    Raises:
        InputError: It is damaged, or of another version.
    """
    try:
        refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler of bytes from anywhere raises anything
        raise InputError(f"{path} is damaged and cannot be continued from; remove it to start again") from error
    if not isinstance(content, dict) or content.get("version") != _STATE_VERSION:
        raise InputError(f"{path} is not a training state of this version of s2d; remove it to start again")
    return content


def key_of(
    model: nn.Module,
    task: Task,
    settings: TrainSettings,
    seed: int,
    decay: Mapping[str, Any] | None,
    companion: Companion | None = None,
) -> str:
    """Tells apart trainings that must not continue each other. How often to save makes no difference."""
    options = {name: value for name, value in vars(task).items() if isinstance(value, str | int | float)}
    parts = [
        fingerprint(model),
        {"task": task.name, "data": task.fingerprint, **options},
        settings.outcome(),
        seed,
        None if decay is None else dict(decay),
        *([] if companion is None else [companion.key]),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Let the present step end when Ctrl-C (or a termination signal) comes; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
