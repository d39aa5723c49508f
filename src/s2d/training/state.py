"""The state of a training on disk, so that an interrupted one continues bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d.baselines import Baseline
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.distributed import processes
from s2d.errors import InputError
from s2d.io.files import write_atomic
from s2d.models import fingerprint
from s2d.models.saved import refuse_compressed
from s2d.tasks import Task
from s2d.training.early_stopping import EarlyStopping
from s2d.training.precision import Precision
from s2d.training.step_guard import StepGuard
from s2d.training.train_settings import Companion, TrainSettings

_STATE_VERSION = 3


@dataclass
class _Run:
    """A training as it stands, and its file."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    decay: SelectiveSpectralDecay | Baseline | None
    companion: Companion | None
    guard: StepGuard
    held_out: EarlyStopping
    path: Path | None
    key: str
    precision: Precision = "fp32"
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def save(self) -> None:
        assert self.path is not None
        if not processes.leads():
            return  # all processes hold the same
        content = {
            "version": _STATE_VERSION,
            "key": self.key,
            "precision": self.precision,
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
        self.precision = content.get("precision", self.precision)  # with "auto", the one chosen at the start
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
    except Exception as error:  # an unpickler of untrusted bytes can raise any error
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
    """A key that differs between trainings that must not continue each other; the save interval is not part of it."""
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
