"""TWEO: a penalty on activations far from zero.

Source: TWEO (CVPR 2026, arXiv 2511.23225), made for training from scratch:

    loss + weight * mean over blocks l of E[(|A_l| / (tau + eps))^p],     tau = 3, p = 4, weight = 0.01,

A_l is the output of block l. Deviations: it is used at fine-tuning, which the paper leaves open, with a constant
weight; padding is left out; ``at: inputs`` puts the same penalty at the quantizers' inputs, the stronger rival here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.baselines import base
from s2d.baselines.activations import PLACES, Activations, Place

EPSILON = 1e-6


@dataclass(frozen=True)
class Settings(base.Settings):
    """The settings of the penalty.

    Attributes:
        weight: Weight of the penalty in the loss.
        tau: Values below it hardly count.
        power: The exponent p.
        at: ``"blocks"`` (the paper's) or ``"inputs"``.
    """

    weight: float = 0.01
    tau: float = 3.0
    power: float = 4.0
    at: Place = field(default="blocks", metadata={"choices": PLACES})


@base.register("tweo")
class Tweo(base.Baseline):
    """TWEO's penalty on large activations, at fine-tuning."""

    Settings = Settings

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Put hooks on the activations."""
        super().__init__(model, optimizer, settings, seed=seed)
        self._settings, self._activations = settings, Activations(model, settings.at)

    def loss(self) -> Tensor:
        """The weighted mean over the places that this step's forward passes reached."""
        s = self._settings
        return s.weight * self._activations.mean(lambda x: tail(x, s.tau, s.power))

    def remove(self) -> None:
        """Take every hook out."""
        super().remove()
        self._activations.remove()


def tail(x: Tensor, tau: float, power: float) -> Tensor:
    """``E[(|x| / (tau + eps))^p]`` over all entries, a scalar."""
    return (x.abs() / (tau + EPSILON)).pow(power).mean()
