"""One-shot spectral clipping: cap the singular values once, then let the training recover.

Source: hard caps sigma <- min(sigma, c), as in Newhouse et al. 2025, arXiv 2507.13338, who apply them at every step.
Here they are applied once before fine-tuning, the simplest way to remove large singular values. c is a multiple of the
weight's median singular value. The gains of a norm are the singular values of diag(gamma), capped at the same multiple
of their median.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.baselines import base
from s2d.targets.weights import Kind


@dataclass(frozen=True)
class Settings(base.Settings):
    """The settings of clipping.

    Attributes:
        limit: Largest singular value, as a multiple of the median.
        kinds: Kinds of weight.
    """

    limit: float = 3.0
    kinds: tuple[Kind, ...] = ("linear", "norm")


@base.register("clip")
class SpectralClip(base.Baseline):
    """Singular values are capped once, at the start; the training recovers."""

    Settings = Settings

    @torch.no_grad()
    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Cap the singular values now. A resumed training loads its weights afterwards, so nothing is capped twice."""
        super().__init__(model, optimizer, settings, seed=seed)
        for target in self._trained(model, settings.kinds):
            if target.kind == "norm":
                gain = target.parameter
                limit = settings.limit * gain.abs().median()
                gain.copy_(gain.clamp(-limit, limit))
            else:
                W = target.matrix()
                W.copy_(clipped(W.float(), settings.limit))


def clipped(W: Tensor, limit: float) -> Tensor:
    """``W [O, I]`` with its singular values at most `limit` times their median."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * S.clamp_max(limit * S.median())) @ Vh
