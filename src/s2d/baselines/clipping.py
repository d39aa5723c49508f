"""One-shot spectral clipping: cap the singular values once, then let the training recover.

Source: hard caps sigma <- min(sigma, c), as in Newhouse et al. 2025, arXiv 2507.13338, which apply them at every step;
once before a fine-tuning it is the plainest way to remove large singular values. c is a multiple of the weight's median
singular value; the gains of a norm are the singular values of diag(gamma), capped at that multiple of their median.
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
    """How far, and what.

    Attributes:
        limit: Of a singular value, as a multiple of the median.
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
        """Cap them now. A continued training replaces the weights afterwards, so nothing is capped twice."""
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
