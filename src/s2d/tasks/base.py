"""The contract of a task: data as batches, a loss, a metric; and the registry of tasks.

A task is one file in this folder whose class is decorated with `register`; every module of the folder is imported when
tasks are first asked for, so adding the file is all there is to do.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from s2d.data.base import Batch, Split
from s2d.errors import InputError, choices
from s2d.models import Loaded
from s2d.registry import Registry


@dataclass(frozen=True)
class Outcomes:
    """The results of a model on each example; the primary metric follows from them.

    The metric is ``scale * sum(values) / sum(weights)``, or its exponential.

    Attributes:
        values: `[examples]`, float64.
        weights: `[examples]`, float64; the same for every model.
        scale: 100 turns a share into points.
        exponential: The metric is the exponential of the mean, as perplexity is.
        hits: Values are 0 or 1, and weights 1.
    """

    values: Tensor
    weights: Tensor
    scale: float = 1.0
    exponential: bool = False
    hits: bool = False

    @staticmethod
    def of_hits(right: Tensor) -> Outcomes:
        """Right and wrong answers `[examples]`, as accuracy in points."""
        return Outcomes(right.double(), torch.ones(len(right), dtype=torch.float64), 100.0, hits=True)

    def score(self, rows: Tensor | None = None) -> float:
        """The metric over all examples, or over some, by index."""
        values, weights = (self.values, self.weights) if rows is None else (self.values[rows], self.weights[rows])
        mean = self.scale * float(values.sum()) / max(float(weights.sum()), 1e-300)
        if not self.exponential:
            return mean
        return math.exp(mean) if mean < 700 else math.inf

    @staticmethod
    def joined(parts: Sequence[Outcomes]) -> Outcomes:
        """The results of successive batches."""
        first = parts[0]
        values, weights = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "weights"))
        return Outcomes(values, weights, first.scale, first.exponential, first.hits)


class Task(ABC):
    """Data, loss and metric of one job. Everything a task yields is determined by its data, its options and the seeds.

    A task is made with its data options. Then `build` (or `prepare`, when the model is already complete) tokenizes the
    data once with a model's tokenizer. After that, batches cost only indexing.

    Attributes:
        name: The name it is registered under.
        primary: The main metric, a key of the result of `evaluate`.
        higher_is_better: True for the primary metric, and for all others except those in `opposed`.
        opposed: Metrics with the opposite direction.
        adds_head: `build` puts new, untrained outputs on the model.
        separable: The mean of the losses of a batch's parts is the loss of the batch, so that processes can share it.
        ragged: Examples differ in length, so that batches of similar length save time.
        distils: The loss is the distance from an original: it begins at zero, and training only repairs.
        new_head: Text: which outputs the last `build` initialised at random, and why; empty when it made none.
    """

    name: ClassVar[str]
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    opposed: ClassVar[tuple[str, ...]] = ()
    adds_head: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    distils: bool = False
    new_head: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the longest example; 0 where the task does not say."""
        return 0

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Short SHA-256 of the data, independent of any model."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Number of examples of each split."""

    @abstractmethod
    def prepare(self, loaded: Loaded) -> None:
        """Prepare the data for a model (tokenize), unless that has happened already."""

    @abstractmethod
    def build(self, loaded: Loaded, seed: int = 0) -> nn.Module:
        """A fresh model for this task on a copy of the loaded one, and the data made ready for it.

        Args:
            loaded: From `s2d.models.load`; left as it is.
            seed: For new parts, such as a classification head.

        Returns:
            The model in training mode; an encoder's weights are under ``encoder.``.
        """

    @abstractmethod
    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """One pass over a split, in the data's order or shuffled by `seed`.

        Tensors are on the CPU and padded to the longest of the batch only.
        """

    def notes(self) -> list[str]:
        """Messages about the data for the user, one line each, such as files that were left out."""
        return []

    def prefers_higher(self, metric: str) -> bool:
        """Whether more of a metric is better."""
        return self.higher_is_better != (metric in self.opposed)

    @abstractmethod
    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The keywords of a model for a batch, one dictionary per call, for calibration and audit."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss, a scalar; the batch is moved to the model's device."""

    def result(self, model: nn.Module) -> nn.Module:
        """The part of a model from `build` that `s2d condition` saves: the user's own model inside, else all of it."""
        return model

    def outcomes(self, model: nn.Module, batch: Batch) -> Outcomes:
        """The model's results on each example of a batch, for comparisons of two models on the same examples.

        Raises:
            InputError: The task's metric is no mean over examples.
        """
        raise InputError(f"{self.primary} of task {self.name} is no mean over examples, which this comparison needs")

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """All metrics of a split, in points from 0 to 100 unless the task says otherwise; the model's mode is kept."""


_TASKS: Registry[type[Task]] = Registry("task", "s2d.tasks")
register = _TASKS.register  # a task's class; its docstring's first line describes it


def from_all_ranks(rows: Tensor) -> Tensor:
    """The rows ``[n, D]`` of every process's share of a batch, in order, for losses that compare examples.

    Gradients flow back to the process of each row, so that the mean of the processes' gradients is the gradient of the
    loss over the whole batch.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not torch.is_grad_enabled():
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))


def tasks() -> dict[str, str]:
    """The known tasks: name and one line."""
    return {name: (inspect.getdoc(task) or "").partition("\n")[0] for name, task in sorted(_TASKS.all().items())}


def create(name: str, **options: Any) -> Task:
    """A task by its name.

    Args:
        name: One of `tasks()`.
        options: The task's own: see its class.

    Raises:
        InputError: Unknown name or option; close names are listed. The task's data cannot be read.
    """
    known = _TASKS.all()
    if name not in known:
        raise InputError(f"unknown task {name!r}; {choices(name, sorted(known))}")
    accepted = inspect.signature(known[name]).parameters
    for option in options:
        if option not in accepted:
            raise InputError(f"task {name} has no option {option!r}; it has {', '.join(accepted)}")
    missing = [
        option for option, p in accepted.items() if p.default is inspect.Parameter.empty and option not in options
    ]
    if missing:
        raise InputError(f"task {name} needs the option {missing[0]!r}")
    return known[name](**options)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def calibration_inputs(task: Task, samples: int, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """Model inputs of the first training examples in a shuffled order; every arm of a seed sees the same."""
    inputs: list[dict[str, Any]] = []
    left = samples
    for batch in task.batches("train", batch_size=min(batch_size, left), seed=seed, shuffle=True):
        if left <= 0:
            break
        taken = {name: tensor[:left] for name, tensor in batch.items()}
        inputs += task.inputs(taken)
        left -= len(next(iter(taken.values())))
    return inputs
