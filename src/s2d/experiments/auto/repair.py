"""Repair: weights are trained, so that the narrowest file loses less.

Conditioning comes first: spectral decay with distillation from the model itself, which reads no labels; then the
candidate's method rounds the result. Training with the quantizers in place (QAT) reads labels and takes longest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s2d import quant
from s2d.experiments.auto.candidates import Candidate
from s2d.experiments.auto.simulation import Simulation
from s2d.models.running import main_output
from s2d.tasks import Task
from s2d.tasks.base import device_of, to_device
from s2d.training.loop import train
from s2d.training.qat_loop import train_quantized
from s2d.training.train_settings import TrainSettings

_LR = 5e-5
_ENDLESS = 1_000_000  # steps; the minutes end a training
_SAVED = 20.0  # seconds between two states


def repaired(
    candidate: Candidate, simulation: Simulation, seed: int, state: Path, on_step: Callable[[int, float], None]
) -> nn.Module:
    """Train a candidate's weights for its minutes, and quantize them.

    Args:
        candidate: With minutes of conditioning or of training.
        simulation: The model, its task and calibration data.
        seed: Of the training.
        state: A file for the training's state: an interrupted training continues from it.
        on_step: Called with the number of steps taken and the last loss.

    Raises:
        InputError: The model cannot be trained so, such as one without known blocks.
    """
    minutes = candidate.conditioned or candidate.trained
    settings = TrainSettings(
        steps=_ENDLESS,
        minutes=minutes,
        batch_size=simulation.batch,
        lr=_LR,
        distill=1.0 if candidate.conditioned else 0.0,
        save_every=_SAVED,
    )
    if candidate.conditioned:
        student = copy.deepcopy(simulation.model)
        task = without_labels(simulation.task)
        train(student, task, settings, seed=seed, decay={}, state=state, on_step=on_step)
        return quant.quantize_loaded(
            student, candidate.spec, calibration=simulation.calibration(), method=candidate.method, seed=seed
        )
    trained, _ = train_quantized(
        simulation.model,
        simulation.task,
        candidate.spec,
        settings,
        calibration=simulation.calibration(),
        seed=seed,
        state=state,
        on_step=on_step,
    )
    return trained


def without_labels(task: Task) -> Task:
    """A task with the same data whose loss is zero: what trains the model is the distance from its teacher."""
    made = copy.copy(task)

    def loss(self: Task, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        outputs = [main_output(model(**each)) for each in self.inputs(to_device(batch, device_of(model)))]
        return sum((output.float() * 0.0).sum() for output in outputs)  # pyright: ignore[reportReturnType]

    # The model's head is trained already, so its outputs are compared with the teacher's too.
    made.__class__ = type(type(task).__name__, (type(task),), {"loss": loss, "adds_head": False, "distils": True})
    return made
