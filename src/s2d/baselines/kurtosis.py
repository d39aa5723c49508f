"""Kurtosis regularisation.

Source: KURE (Shkolnik et al., NeurIPS 2020, "Robust Quantization: One Model to Rule Them All", arXiv 2002.07686):

    loss + weight * mean over layers l of (Kurt(W_l) - 1.8)^2,     Kurt(w) = E[((w - mean) / std)^4],

1.8 is the kurtosis of a uniform distribution, which a uniform grid fits best; weight = 1. Deviation: ``of:
activations`` applies the penalty to the inputs of the Linears inside blocks (without padding), where the outliers are.
There the kurtosis is some hundred, and its square would dominate the task's loss. ``log(Kurt / 1.8)^2`` replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.baselines import base
from s2d.baselines.activations import Activations

UNIFORM = 1.8


@dataclass(frozen=True)
class Settings(base.Settings):
    """The settings of the penalty.

    Attributes:
        weight: Weight of the penalty in the loss.
        of: ``"weights"`` (the paper's) or ``"activations"``.
    """

    weight: float = 1.0
    of: Literal["weights", "activations"] = field(default="weights", metadata={"choices": ("weights", "activations")})


@base.register("kure")
class Kure(base.Baseline):
    """KURE: the kurtosis of weights, or of activations, is pulled to that of a uniform distribution."""

    Settings = Settings

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Find the weights, or put hooks on the activations."""
        super().__init__(model, optimizer, settings, seed=seed)
        self._weight = settings.weight
        self._activations = Activations(model, "inputs") if settings.of == "activations" else None
        self._targets = self._trained(model, ("linear",))

    def loss(self) -> Tensor:
        """The weighted penalty."""
        if self._activations is not None:
            return self._weight * self._activations.mean(lambda x: (kurtosis(x) / UNIFORM).log().square())
        with torch.autocast(self._targets[0].parameter.device.type, enabled=False):
            each = [(kurtosis(t.view(t.parameter).float()) - UNIFORM).square() for t in self._targets]
        return self._weight * torch.stack(each).mean()

    def remove(self) -> None:
        """Take every hook out."""
        super().remove()
        if self._activations is not None:
            self._activations.remove()


def kurtosis(x: Tensor) -> Tensor:
    """``E[((x - mean) / std)^4]`` over all entries, a scalar; 3 for a normal distribution."""
    centred = x - x.mean()
    return centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-30)
