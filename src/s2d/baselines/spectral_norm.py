"""Spectral norm regularisation.

Source: Yoshida & Miyato 2017, "Spectral Norm Regularization for Improving the Generalizability of Deep Learning",
arXiv 1705.10941: the loss gains (weight / 2) * sum over layers of sigma_1(W)^2, with sigma_1 = u^T W v from one power
iteration a step whose vectors are kept, so that its gradient is weight * sigma_1 u v^T. No deviation; this is coupled
S2D with one component, n = 1 and no gate.
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
    """The settings of the penalty.

    Attributes:
        weight: Weight of the penalty in the loss.
        kinds: Kinds of weight.
    """

    weight: float = 0.01
    kinds: tuple[Kind, ...] = ("linear", "conv")


@base.register("spectral-norm")
class SpectralNorm(base.Baseline):
    """A penalty on the largest singular value of every weight."""

    Settings = Settings

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Draw the first vectors."""
        super().__init__(model, optimizer, settings, seed=seed)
        if "norm" in settings.kinds:
            raise base.InputError("spectral-norm: kinds holds 'norm', which is a vector; use linear or conv")
        self._targets, self._weight = self._trained(model, settings.kinds), settings.weight
        generator = torch.Generator().manual_seed(seed)
        self._right = {
            t.name: torch.randn(t.matrix().shape[1], generator=generator).to(t.parameter.device) for t in self._targets
        }

    def loss(self) -> Tensor:
        """The penalty; one power iteration for each weight."""
        device = self._targets[0].parameter.device
        with torch.autocast(device.type, enabled=False):
            total = torch.zeros((), device=device)
            for target in self._targets:
                W = target.view(target.parameter).float()
                u, self._right[target.name] = power_iteration(W.detach(), self._right[target.name])
                total = total + (u @ W @ self._right[target.name]).square()
        return self._weight / 2 * total

    def state_dict(self) -> dict[str, Any]:
        """The vectors too."""
        return {**super().state_dict(), "right": dict(self._right)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The vectors too."""
        super().load_state_dict(state)
        self._right = {t.name: state["right"][t.name].to(t.parameter.device) for t in self._targets}


def power_iteration(W: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards the leading singular vectors of ``W [O, I]`` from ``v [I]``: u ``[O]`` and v, of length 1."""
    u = nn.functional.normalize(W @ v, dim=0)
    return u, nn.functional.normalize(W.mT @ u, dim=0)
