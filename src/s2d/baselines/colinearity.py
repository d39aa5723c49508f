"""A penalty on pairs of matrices that line up: a reconstruction, not the published method.

Source: Colinearity Decay (Tong et al. 2026, arXiv 2605.01330) decouples a regulariser of ordered matrix pairs from the
loss. Its formula was not available to us. From its stated cause (an output is extreme when a row of the second matrix B
is colinear with a strong left singular vector of the first, A) we reconstruct R = |B A|_F^2 / 2 and its decoupled step,

    A <- A - s B^T B A / |B|_F^2,        B <- B - s B A A^T / |A|_F^2,        s = strength * schedule,

for the pairs fc1 -> fc2 and v -> proj of every block. The norms in the denominators are ours: they keep a step from
overshooting for s <= 1, whatever the size of the weights. Results with this file say nothing about the published one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.baselines import base
from s2d.models.family import family_of
from s2d.targets.weights import Target

PAIRS = (("fc1", "fc2"), ("v", "proj"))


@dataclass(frozen=True)
class Settings(base.Settings):
    """The settings of the penalty.

    Attributes:
        strength: Per step, times the schedule; at most 1.
    """

    strength: float = 0.05

    def __post_init__(self) -> None:
        """Also refuse a step that overshoots."""
        super().__post_init__()
        if self.strength > 1:
            raise base.InputError(f"strength={self.strength!r} is out of range; it must be at most 1")


@base.register("colinearity")
class Colinearity(base.Baseline):
    """Colinearity-Decay-like (our reconstruction): matrix pairs that line up are shrunk where they do."""

    Settings = Settings

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Find the pairs."""
        super().__init__(model, optimizer, settings, seed=seed)
        self._strength = settings.strength
        self._pairs = pairs_of(model, self._trained(model, ("linear",)))
        if not self._pairs:
            raise base.InputError(
                "colinearity: no block of this model has a pair fc1, fc2 or v, proj of a known family that is trained"
            )
        self._after_each_step(optimizer, self._decay)

    def _decay(self) -> None:
        for first, second in self._pairs:
            shares = (self._rates.share(first.parameter), self._rates.share(second.parameter))
            decay_pair(first.matrix(), second.matrix(), self._strength * min(shares))


def pairs_of(model: nn.Module, targets: list[Target]) -> list[tuple[Target, Target]]:
    """The pairs of weights of each block, by the roles of the model's family: the second reads the first's output."""
    family = family_of(model)
    found: dict[tuple[int | None, str], Target] = {}
    for target in targets:
        role = family.role(target.module_name)
        if role == "qkv" and target.rows is not None and target.rows.stop == target.parameter.shape[0]:
            role = "v"  # the last third of the fused weight
        if role is not None and target.depth is not None:
            found.setdefault((target.depth, role), target)
    blocks = sorted({depth for depth, _ in found if depth is not None})
    every = [(found.get((b, one)), found.get((b, two))) for b in blocks for one, two in PAIRS]
    return [
        (first, second)
        for first, second in every
        if first is not None and second is not None and first.matrix().shape[0] == second.matrix().shape[1]
    ]


def decay_pair(A: Tensor, B: Tensor, amount: float) -> None:
    """One step of both, from the same A ``[H, I]`` and B ``[O, H]``. In place."""
    a, b = A.float(), B.float()
    BA = b @ a
    step_a = b.mT @ BA / b.square().sum().clamp_min(1e-30)
    step_b = BA @ a.mT / a.square().sum().clamp_min(1e-30)
    with torch.no_grad():
        A.sub_((amount * step_a).to(A.dtype))
        B.sub_((amount * step_b).to(B.dtype))
