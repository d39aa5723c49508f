"""The settings, companions (teacher, trained quantizers) and outcome of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from s2d.errors import InputError
from s2d.training.optimizers import OptimizerName


class TrainSettings(BaseModel):
    """How to fine-tune.

    Attributes:
        steps: Optimizer steps; an upper limit where `minutes` is given.
        minutes: Time limit of the loop; the learning-rate schedule ends with it. None for no limit. With a limit the
            result depends on the machine too.
        batch_size: Examples a step, of all processes together.
        optimizer: ``adamw``, or ``muon`` for the matrices of the blocks with AdamW for the rest (see `optimizers.py`).
        lr: Peak learning rate of the encoder.
        head_lr: Peak learning rate of all other parts (a new classification head); as `lr` when None.
        weight_decay: Weight decay of the optimizer; not for biases and norms, as usual.
        warmup: Share of the steps in which the learning rate rises linearly from 0; it falls linearly to 0 in the
            others.
        clip: Largest norm of the gradient.
        spike: Skip a step whose gradient is this many times the median of the last 64; 0 skips none. Steps whose loss
            or gradient is not finite are always skipped (see `s2d.training.step_guard`).
        dropout: Keep the model's own dropout. Off by default: short fine-tuning ends better and repeats exactly.
        group_by_length: Put texts of similar length into one batch; this halves the time on short texts.
        distill: Weight of the distance from the model as it was before training, in shares of variance (see
            `frozen_teacher.py`); 0 leaves it out. Costs a forward pass a step. Quantized training has its own weight.
        precision: ``fp32``, ``bf16`` for the computation (weights stay as they are), or ``auto`` for whichever is
            faster on the device (see `precision.py`): results then depend on the machine too.
        checkpoints: Steps after which the model is kept as it is then, to see how it changes over the training.
        check_every: Steps between two checks of the task's metric on the validation split; 0 for none. Checks take
            time.
        patience: Checks in a row without a new best after which training ends (see `early_stopping.py`); 0 for never.
        save_every: Seconds between two saved states, if a file for them is given.
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
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
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
        """The settings that the trained model depends on, without those of saving and checkpoints."""
        return self.model_dump(exclude={"checkpoints", "save_every"})


class Companion(Protocol):
    """The interface of a companion: parameters or losses that are trained with the model."""

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
        """The term to add to the task's loss of the present step."""
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
    """The outcome of a training.

    Attributes:
        steps: Optimizer steps taken.
        seconds: Time in the loop, over all parts of an interrupted run.
        peak_mb: See `s2d.io.provenance.Cost`.
        losses: One per step.
        history: The decay's history, one record per refresh and weight; empty without decay.
        skipped: Steps that were counted and not taken, and why: a loss or gradient that was not finite, or a spike.
        checks: Step and value of each check on the validation split.
        stopped_early: Whether it ended by ``settings.patience``.
        precision: Precision of the computation, as ``precision="auto"`` chose it.
        not_conditioned: Weights that the decay left out, and those that write no site alone, with the reason.
    """

    steps: int
    seconds: float
    peak_mb: float
    losses: list[float]
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False
    precision: str = "fp32"
    not_conditioned: dict[str, str] = field(default_factory=dict)


OnStep = Callable[[int, float], None]
