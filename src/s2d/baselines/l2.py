"""Weight decay on every singular value, without selection.

Source: decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101). With W = U S V^T,

    W <- W exp(-strength * schedule)     is     sigma_r <- sigma_r exp(-strength * schedule)   for every r,

which is S2D's decoupled closed form at n = 1 with everything selected. Deviation: the factor is not multiplied by the
learning rate but by its share of the peak, as S2D's is, so that the same strength means the same shrinkage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from s2d.baselines import base
from s2d.targets.weights import Kind


@dataclass(frozen=True)
class Settings(base.Settings):
    """The settings of the weight decay.

    Attributes:
        strength: Per step, times the schedule.
        kinds: Kinds of weight; a norm's gains are the singular values of diag(gamma).
    """

    strength: float = 0.002
    kinds: tuple[Kind, ...] = ("linear",)


@base.register("l2")
class L2Decay(base.Baseline):
    """Strong weight decay on all singular values."""

    Settings = Settings

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Hook into the optimizer's step."""
        super().__init__(model, optimizer, settings, seed=seed)
        self._targets, self._strength = self._trained(model, settings.kinds), settings.strength
        self._after_each_step(optimizer, self._decay)

    def _decay(self) -> None:
        for target in self._targets:
            W = target.parameter.detach() if target.kind == "norm" else target.matrix()
            W.mul_(math.exp(-self._strength * self._rates.share(target.parameter)))
