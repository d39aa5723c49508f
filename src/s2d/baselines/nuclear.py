"""Nuclear-norm regularisation, by its proximal step.

Source: singular value thresholding (Cai, Candes & Shen 2010, arXiv 0810.3286): the proximal operator of t |W|_* is

    W <- U max(S - t, 0) V^T,

applied here after every `every`-th optimizer step with t = strength * schedule * every. Adam would rescale a
subgradient instead. torchao's PAT (``torchao.prototype.pat``) wraps an optimizer to do this; this is our short form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.baselines import base
from s2d.targets.weights import Kind


@dataclass(frozen=True)
class Settings(base.Settings):
    """The settings of the proximal step.

    Attributes:
        strength: Reduction of each singular value per step, times the schedule.
        every: Optimizer steps between two proximal steps, each a full SVD of every weight.
        kinds: Kinds of weight.
    """

    strength: float = 0.002
    every: int = 10
    kinds: tuple[Kind, ...] = ("linear",)


@base.register("nuclear")
class Nuclear(base.Baseline):
    """The nuclear norm: all singular values lose the same amount."""

    Settings = Settings

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Hook into the optimizer's step."""
        super().__init__(model, optimizer, settings, seed=seed)
        if "norm" in settings.kinds:
            raise base.InputError("nuclear: kinds holds 'norm', which is a vector; use linear or conv")
        self._targets, self._settings, self._steps = self._trained(model, settings.kinds), settings, 0
        self._after_each_step(optimizer, self._threshold)

    def _threshold(self) -> None:
        self._steps += 1
        if self._steps % self._settings.every:
            return
        for target in self._targets:
            amount = self._settings.strength * self._settings.every * self._rates.share(target.parameter)
            W = target.matrix()
            W.copy_(thresholded(W.float(), amount))

    def state_dict(self) -> dict[str, Any]:
        """The count of steps too."""
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The count of steps too."""
        super().load_state_dict(state)
        self._steps = state["steps"]


def thresholded(W: Tensor, amount: float) -> Tensor:
    """``W [O, I]`` with each singular value smaller by `amount`, none below 0."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * (S - amount).clamp_min(0)) @ Vh
