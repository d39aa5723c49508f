"""Judging a file: it runs in its own runtime, in a child process, on examples that the search never saw.

The child reads the task as the parent prepared it (a pickle in a private folder), so both see the same examples. The
child writes the outcome of each example, and the time of one row, measured in turns with full precision in that
runtime.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from s2d.errors import InputError, visible
from s2d.models.running import evaluating
from s2d.tasks import Split, Task
from s2d.tasks.base import Outcomes

BATCH = 16
_ROUNDS = 15


@dataclass(frozen=True)
class Judged:
    """The results of a file.

    Attributes:
        outcomes: Outcome of every example, in the split's order.
        ms: Median milliseconds of one row on one thread; None where it did not run.
        full_ms: The same for full precision in the same runtime, measured in turns.
    """

    outcomes: Outcomes
    ms: float | None = None
    full_ms: float | None = None


def outcomes_on(model: nn.Module, task: Task, split: Split, examples: int) -> Outcomes:
    """A model's outcome for so many examples of a split: all in order, or the first of a fixed shuffle."""
    fewer = examples < task.sizes()[split]
    batches = islice(task.batches(split, batch_size=BATCH, shuffle=fewer), -(-examples // BATCH))
    with evaluating(model):
        found = Outcomes.joined([task.outcomes(model, batch) for batch in batches])
    return replace(found, values=found.values[:examples], weights=found.weights[:examples])


class Judge:
    """Scores files of one task and runtime."""

    def __init__(self, task: Task, split: Split, examples: int, runtime: str, folder: Path, full: Path | None) -> None:
        """Write the task into a file for the child processes.

        Args:
            task: Prepared for the model.
            split: The split that is scored.
            examples: How many of it, as for `outcomes_on`.
            runtime: Name of the runtime's module, as for `open_exported`.
            folder: A private folder.
            full: The model in full precision, to measure times against; None for no times.
        """
        self.split, self.examples, self.runtime, self.full = split, examples, runtime, full
        self.task = folder / "task.pt"
        torch.save(task, self.task)

    def judge(self, file: Path) -> Judged:
        """Run a file in a child process.

        Raises:
            InputError: The child ended without an answer; the message holds its last line of output.
        """
        with tempfile.TemporaryDirectory(dir=self.task.parent) as scratch:
            answer = Path(scratch) / "answer.pt"
            job = {
                "file": str(file),
                "full": None if self.full is None else str(self.full),
                "runtime": self.runtime,
                "task": str(self.task),
                "split": self.split,
                "examples": self.examples,
                "answer": str(answer),
            }
            words = [sys.executable, "-m", __name__, json.dumps(job)]
            package = Path(__file__).resolve().parents[3]
            paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
            done = subprocess.run(
                words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            )
            if done.returncode or not answer.is_file():
                lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
                told = visible(lines[-1], 300) if lines else f"it ended with {done.returncode}"
                raise InputError(f"{file.name} did not run in {self.runtime}: {told}")
            found = torch.load(answer, weights_only=True)
        outcomes = Outcomes(found["values"], found["weights"], found["scale"], found["exponential"], found["hits"])
        return Judged(outcomes, found["ms"], found["full_ms"])


def _rows(task: Task, split: Split) -> Iterator[dict[str, Any]]:
    """Inputs of one row."""
    for batch in task.batches(split, batch_size=BATCH):
        for inputs in task.inputs(batch):
            yield {name: value[:1] for name, value in inputs.items()}


def _child(job: dict[str, Any]) -> None:
    from s2d.export import open_exported
    from s2d.export.gate import take_turns

    torch.set_num_threads(1)
    task: Task = torch.load(job["task"], weights_only=False)  # by the parent, in its private folder
    runner = open_exported(job["file"], runtime=job["runtime"])
    outcomes = outcomes_on(runner, task, job["split"], job["examples"])
    one = next(_rows(task, job["split"]))
    runners = [runner]
    if job["full"] is not None:
        runners.append(open_exported(job["full"], runtime=job["runtime"]))
    with torch.no_grad():
        times = [median(each) for each in take_turns([partial(each, **one) for each in runners], _ROUNDS)]
    content = {**vars(outcomes), "ms": times[0], "full_ms": times[1] if len(times) > 1 else None}
    torch.save(content, job["answer"])


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
