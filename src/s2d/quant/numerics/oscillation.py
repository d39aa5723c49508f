"""Weights that oscillate between two codes during training, and how they are frozen.

Source: "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086), section 4.3. A weight oscillates
when its code changes against the direction of its last change. The frequency of that is an exponential average with
momentum m; above a threshold the weight is frozen at the rounded average of its codes. The threshold falls along a
cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOMENTUM = 0.01
FIRST_THRESHOLD, LAST_THRESHOLD = 0.1, 0.01


def threshold_at(progress: float) -> float:
    """The frequency above which a weight is frozen, at a share ``progress`` of the training."""
    fall = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return LAST_THRESHOLD + (FIRST_THRESHOLD - LAST_THRESHOLD) * fall


class Oscillations:
    """Statistics of the codes of one weight; all tensors have its shape.

    Attributes:
        codes: The last codes (integers in float32).
        average: Exponential average of the codes.
        direction: Sign of each code's last change, 0 before the first (int8).
        frequency: Exponential average of oscillating or not.
        frozen: Which weights are held, at ``codes``.
    """

    _TENSORS = ("codes", "average", "direction", "frequency", "frozen")

    def __init__(self, codes: Tensor) -> None:
        """Begin with these codes."""
        self.codes = codes.clone()
        self.average = codes.clone()
        self.direction = torch.zeros_like(codes, dtype=torch.int8)
        self.frequency = torch.zeros_like(codes)
        self.frozen = torch.zeros_like(codes, dtype=torch.bool)

    def update(self, codes: Tensor, threshold: float) -> Tensor:
        """Take in the codes after a step.

        Args:
            codes: As the weight would round now.
            threshold: See `threshold_at`.

        Returns:
            The codes to hold frozen weights at; entries that are not `frozen` have no meaning.
        """
        change = (codes - self.codes).sign().to(torch.int8)
        oscillates = (change != 0) & (change == -self.direction)
        self.frequency.lerp_(oscillates.float(), MOMENTUM)
        self.average.lerp_(codes, MOMENTUM)
        self.direction = torch.where(change != 0, change, self.direction)
        held = torch.where(self.frozen, self.codes, codes)
        newly = (self.frequency > threshold) & ~self.frozen
        self.codes = torch.where(newly, self.average.round(), held)
        self.frozen |= newly
        return self.codes

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors."""
        return {name: getattr(self, name).clone() for name in self._TENSORS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        for name in self._TENSORS:
            setattr(self, name, state[name].to(self.codes.device).clone())
