"""Early stopping: held-out data are scored at intervals, and training ends when the score no longer improves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from s2d.tasks import Task


@dataclass
class EarlyStopping:
    """Checks the task's primary metric on the validation split, and reports when it has stopped improving.

    The model keeps its last weights. It is not reset to its best check: with a decay the earliest checks are the best,
    but the least conditioned.

    Attributes:
        task: Gives the data and the metric.
        every: Steps between two checks; 0 for none.
        patience: Checks in a row without a new best after which to stop; 0 to check and never stop.
        batch_size: Batch size of a check.
        checks: ``step`` and ``value`` of each.
    """

    task: Task
    every: int
    patience: int
    batch_size: int
    checks: list[dict[str, Any]] = field(default_factory=list)

    def look(self, model: nn.Module, step: int) -> None:
        """Check the model, if it is time; its mode is kept."""
        if self.every and step % self.every == 0:
            found = self.task.evaluate(model, "validation", self.batch_size)
            self.checks.append({"step": step, "value": found[self.task.primary]})

    @property
    def spent(self) -> bool:
        """Whether the last `patience` checks were no better than the best before them; NaN counts as no better."""
        if not self.patience or len(self.checks) <= self.patience:
            return False
        sign = -1 if self.task.higher_is_better else 1
        values = [sign * check["value"] if math.isfinite(check["value"]) else math.inf for check in self.checks]
        return min(values[-self.patience :]) >= min(values[: -self.patience])
