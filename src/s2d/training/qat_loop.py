"""Quantization-aware training of a task's model in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from s2d.quant import QuantSpec, get_methods
from s2d.quant.distillation import Distiller
from s2d.quant.qat import STEP_LR, QATSchedule, finish_qat, learned_parameters, prepare_qat
from s2d.tasks import Task
from s2d.training.loop import train
from s2d.training.train_settings import OnStep, Training, TrainSettings


class QATSettings(BaseModel):
    """How the ranges are trained; steps, batches and the weights' learning rate are those of `TrainSettings`.

    Attributes:
        method: The post-training method that the training starts from.
        step_lr: Peak learning rate of the ranges; it follows the same learning-rate schedule.
        warmup: See `QATSchedule`; likewise the next two.
        freeze: See `QATSchedule`.
        oscillation: See `QATSchedule`.
        distill: Weight of the distance from the full-precision model in the loss; 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "rtn"
    step_lr: float = Field(default=STEP_LR, gt=0, allow_inf_nan=False)
    warmup: float = Field(default=0.0, ge=0, le=1)
    freeze: float = Field(default=0.2, ge=0, le=1)
    oscillation: bool = False
    distill: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        get_methods(method)
        return method


class RangeTraining:
    """The companion of a training: learned ranges, their schedule, and the teacher."""

    def __init__(self, model: nn.Module, teacher: Distiller | None, settings: QATSettings, steps: int) -> None:
        """For a model from `prepare_qat` and this number of steps."""
        self._model, self._teacher, self._settings, self._steps = model, teacher, settings, steps
        self._schedule: QATSchedule | None = None

    @property
    def key(self) -> dict[str, Any]:
        """The settings."""
        return self._settings.model_dump()

    def groups(self) -> list[dict[str, Any]]:
        """The ranges, without weight decay."""
        return [{"params": learned_parameters(self._model), "lr": self._settings.step_lr, "weight_decay": 0.0}]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin the schedule."""
        course = self._settings.model_dump(exclude={"method", "step_lr", "distill"})
        self._schedule = QATSchedule(self._model, optimizer, steps=self._steps, **course)

    def loss(self) -> Tensor | None:
        """The weighted distance from the teacher."""
        return None if self._teacher is None else self._settings.distill * self._teacher.loss()

    def state_dict(self) -> dict[str, Any]:
        """The schedule's."""
        assert self._schedule is not None
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The schedule's."""
        assert self._schedule is not None
        self._schedule.load_state_dict(state)

    def remove(self) -> None:
        """Remove the hooks from optimizer and model."""
        if self._schedule is not None:
            self._schedule.remove()
        if self._teacher is not None:
            self._teacher.remove()


def train_quantized(
    model: nn.Module,
    task: Task,
    spec: str | Mapping[str, Any] | QuantSpec,
    settings: TrainSettings | None = None,
    qat: QATSettings | None = None,
    *,
    calibration: Iterable[Any],
    seed: int = 0,
    decay: Mapping[str, Any] | None = None,
    state: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> tuple[nn.Module, Training]:
    """Quantize a copy of a task's model and train it with its ranges; the model itself is the teacher.

    Args:
        model: From ``task.build``, trained at full precision; it ends in evaluation mode.
        task: Its data and loss.
        spec: As for `quantize`.
        settings: Steps, batches and learning rates of the weights.
        qat: See `QATSettings`.
        calibration: Batches that the ranges start from; read more than once, so not a generator.
        seed, decay, state, on_step: As for `train`.

    Returns:
        The quantized model, in evaluation mode, and how the training went.

    Raises:
        InputError: As `prepare_qat` and `train`.
    """
    settings, qat = settings or TrainSettings(), qat or QATSettings()
    student = prepare_qat(model, spec, calibration=calibration, method=qat.method, seed=seed)
    teacher = Distiller(student, model, calibration) if qat.distill > 0 else None
    companion = RangeTraining(student, teacher, qat, settings.steps)
    done = train(student, task, settings, seed=seed, decay=decay, companion=companion, state=state, on_step=on_step)
    return finish_qat(student), done
