"""A promise: a runtime, the points of the metric that may be lost, and the time for the search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from s2d.errors import InputError
from s2d.experiments.auto.candidates import Objective
from s2d.export import RUNNABLE
from s2d.export.runtime import Runtime, find_runtime
from s2d.tasks import Split, Task


@dataclass(frozen=True)
class Promise:
    """The request of a search.

    Attributes:
        runtime: Where the file will run.
        within: Points of the task's metric that may be lost.
        minutes: Approximate time limit; None for the whole ladder, without training.
        objective: ``"smallest"`` or ``"fastest"``.
        split: The acceptance data.
    """

    runtime: Runtime
    within: float
    minutes: float | None = None
    objective: Objective = "smallest"
    split: Split = "validation"

    @staticmethod
    def parse(
        runtime: str,
        within: float,
        minutes: float | None = None,
        objective: Objective = "smallest",
        split: Split = "validation",
    ) -> Promise:
        """Check the request; nothing is loaded.

        Raises:
            InputError: An unknown runtime or objective; a runtime that reads no quantized models, or whose files cannot
                be judged; no points; no time.
        """
        made = Promise(find_runtime(runtime), within, minutes, objective, split)
        complaint = made.runtime.complaint(())
        if complaint is not None:
            raise InputError(complaint)
        if not math.isfinite(within) or within <= 0:
            raise InputError(f"--within is a number of points above 0 that may be lost, not {within:g}")
        if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
            raise InputError(f"--minutes is a time above 0, not {minutes:g}")
        if objective not in get_args(Objective):
            raise InputError(f"unknown objective {objective!r}; choose smallest or fastest")
        assert made.suffix is not None
        return made

    @property
    def suffix(self) -> str:
        """The suffix of the file to write: one that can be written here, if there is one."""
        for suffix in self.runtime.files:
            if suffix in RUNNABLE and (suffix != ".xml" or self.runtime.installed):
                return suffix
        raise InputError(
            f"--method auto judges {' and '.join(RUNNABLE)} files, and {self.runtime.name} reads none; quantize with "
            f"--for {self.runtime.name} and a spec"
        )

    def refuse_task(self, task: Task) -> None:
        """Refuse data on which a drop cannot be measured.

        Raises:
            InputError: The metric is not a mean over examples; there is one example, or none.
        """
        if type(task).outcomes is Task.outcomes:
            raise InputError(f"{task.primary} of task {task.name} is no mean over examples, which --method auto needs")
        count = task.sizes()[self.split]
        if count < 2:
            raise InputError(f"the {self.split} split has {count} example, which tells nothing of a drop; give it more")
