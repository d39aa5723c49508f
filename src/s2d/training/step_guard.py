"""Optimizer-step guard: skips steps whose loss or gradient is not finite, and, when asked for, spikes.

Without it, one bad batch could end a long run or ruin its weights. Skipped steps are reported and counted. Too many in
a row mean that the training diverged; then it ends.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from s2d.baselines import Baseline
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError

PATIENCE = 5  # steps in a row that may be skipped; the next one ends the training
WINDOW = 64  # gradients whose median is the usual norm
WARM = 16  # gradients needed before spikes are judged


def train_step(
    guard: StepGuard,
    step: int,
    value: float,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], object],
    clip: Callable[[], Any],
    decay: SelectiveSpectralDecay | Baseline | None,
) -> None:
    """Take a step with the known loss `value`, unless the guard refuses it; then the decay discards its statistics.

    `backward` computes the gradients; `clip` limits them and returns their norm before clipping.
    """
    optimizer.zero_grad()
    taken = guard.loss(step, value)
    if taken:
        backward()
        taken = guard.gradient(step, float(clip()))
    if taken:
        optimizer.step()
    elif decay is not None:
        decay.forget()  # statistics of a skipped step must not enter the next one


class StepGuard:
    """Judges each step by its loss and the norm of its gradient.

    Attributes:
        skipped: The steps that were not taken (counted from 1) and why, in order.
    """

    def __init__(self, spike: float, lr: float) -> None:
        """Start without history.

        Args:
            spike: Skip a step whose gradient is this many times the median of the last ones; 0 for never.
            lr: The learning rate, for the message.
        """
        self.spike, self.lr = spike, lr
        self.skipped: list[dict[str, Any]] = []
        self._row = 0
        self._norms: list[float] = []

    def loss(self, step: int, value: float) -> bool:
        """Whether the loss of a step may be used."""
        return math.isfinite(value) or self._skip(step, f"the loss is {value}")

    def gradient(self, step: int, norm: float) -> bool:
        """Whether the step may be taken; `norm` is that of the gradient before it is clipped."""
        if not math.isfinite(norm):
            return self._skip(step, f"the gradient's norm is {norm}")
        if self.spike and len(self._norms) >= WARM:
            usual = statistics.median(self._norms)
            if norm > self.spike * usual:
                return self._skip(step, f"the gradient's norm is {norm:.3g}, {norm / usual:.3g} times the usual")
        self._row = 0
        if self.spike:
            self._norms = [*self._norms, norm][-WINDOW:]
        return True

    def check_end(self, steps: int) -> None:
        """Refuse a training in which no step was taken."""
        if steps and len(self.skipped) == steps:
            raise self._diverged(steps, self.skipped[-1]["reason"])

    def _skip(self, step: int, reason: str) -> bool:
        self.skipped.append({"step": step, "reason": reason})
        self._row += 1
        if self._row > PATIENCE:
            raise self._diverged(step, reason)
        warnings.warn(f"step {step} was skipped: {reason}", stacklevel=3)
        return False

    def _diverged(self, step: int, reason: str) -> InputError:
        return InputError(
            f"{reason} at step {step}, and the {self._row - 1} steps before it were skipped: training diverged; "
            f"lower train.lr ({self.lr:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data to continue from."""
        return {"skipped": self.skipped, "row": self._row, "norms": self._norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self.skipped, self._row, self._norms = list(state["skipped"]), state["row"], list(state["norms"])
