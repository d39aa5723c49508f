"""The receiver of a run's progress."""

from __future__ import annotations

import math
from typing import Protocol


class Watcher(Protocol):
    """Receives the progress of a run."""

    def stage(self, text: str, total: int, seconds: float = math.inf) -> None:
        """A stage with `total` parts begins; it ends after so many seconds, finished or not."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` parts of the stage are finished."""

    def say(self, text: str) -> None:
        """A line to keep."""


class Silent(Watcher):
    """A watcher that does nothing."""
