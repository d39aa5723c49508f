"""Distillation beside the task's loss: the frozen original model is the teacher.

Contrastive or class labels give little information on the changes that the decay causes. The original's features give
it for every token, at every step. The distance is that of `s2d.quant.distillation` (GPLQ, arXiv 2506.11784), in shares
of variance.
"""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from s2d.quant.distillation import Distiller
from s2d.tasks.base import Task

# Number of texts or images to measure the spread of the original's features.
_SAMPLES, _BATCH = 128, 32


class FrozenTeacher:
    """The companion of a training that adds ``weight * distance(model, original)`` to the task's loss.

    If the task has added a new head to the model, only features are compared.
    """

    def __init__(self, model: nn.Module, task: Task, weight: float) -> None:
        """Copy the model as it is now, and put hooks on it.

        Args:
            model: From ``task.build``, before its first step.
            task: Its training split gives the spread of the original's features.
            weight: Weight of the distance, above 0.

        Raises:
            InputError: The model has no known blocks, or is quantized.
        """
        batches = islice(task.batches("train", batch_size=_BATCH, seed=0, shuffle=True), _SAMPLES // _BATCH)
        inputs = [each for batch in batches for each in task.inputs(batch)]
        original = copy.deepcopy(model).requires_grad_(False)
        self._weight = weight
        self._distiller = Distiller(model, original, inputs, outputs=not task.adds_head)

    @property
    def key(self) -> Any:
        """Nothing beyond the training's own settings."""
        return None

    def groups(self) -> list[dict[str, Any]]:
        """It trains nothing of its own."""
        return []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """It has no schedule."""

    def loss(self) -> Tensor:
        """The weighted distance of this step's forward passes."""
        return self._weight * self._distiller.loss()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the original is the model at the start of the training."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to continue."""

    def remove(self) -> None:
        """Remove the hooks from the model."""
        self._distiller.remove()
