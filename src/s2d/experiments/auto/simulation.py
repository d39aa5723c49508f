"""Candidates in simulation: calibrated on some training examples, compared with full precision on the next ones.

The acceptance data are never read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d import quant
from s2d.errors import InputError
from s2d.experiments.auto.candidates import Candidate
from s2d.export.copies import shared_copy
from s2d.export.lowering import round_embeddings
from s2d.models.running import main_output
from s2d.quant import QuantSpec
from s2d.quant.allocate import Sensitivity, sensitivity
from s2d.tasks import Task
from s2d.tasks.base import Outcomes, calibration_inputs

SAMPLES, SEARCHED = 128, 256  # training examples: for calibration, and to compare candidates
_MEASURED = 64  # calibration examples for the sensitivity of every layer
_TOKENS = 2048  # tokens of a batch


class Simulation:
    """One model and its training data."""

    def __init__(self, model: nn.Module, task: Task, seed: int) -> None:
        """A model of the task, in full precision."""
        self.model, self.task, self.seed = model, task, seed
        self.batch = max(2, min(32, _TOKENS // max(task.tokens, 1)))
        self.samples = max(2, min(SAMPLES, task.sizes()["train"] // 2))
        self._measured: dict[str, Sensitivity] = {}
        self._expected: list[tuple[dict[str, Any], Outcomes, Tensor]] = []

    def calibration(self) -> list[dict[str, Any]]:
        """The calibration batches."""
        return calibration_inputs(self.task, self.samples, self.batch, self.seed)

    def searched(self) -> list[dict[str, Any]]:
        """The training batches after those of the calibration, in the same shuffled order.

        Raises:
            InputError: There are none.
        """
        used = -(-self.samples // self.batch)
        batches = self.task.batches("train", batch_size=self.batch, seed=self.seed, shuffle=True)
        found = list(islice(batches, used, used + max(1, SEARCHED // self.batch)))
        if not found:
            raise InputError(f"train has {self.task.sizes()['train']} examples, too few to calibrate and to search")
        return found

    def quantized(self, candidate: Candidate, trained: Path) -> nn.Module:
        """The model of a candidate.

        Args:
            candidate: The candidate.
            trained: The folder of a trained candidate's model.

        Raises:
            InputError: The method does not fit the model.
        """
        if candidate.trained:
            return quant.load(trained, self.model)
        return quant.quantize(
            self.model, candidate.spec, calibration=self.calibration(), method=candidate.method, seed=self.seed
        )

    @torch.no_grad()
    def compared(self, made: nn.Module) -> tuple[float, float]:
        """The squared error of the output on the searched examples, relative to its variance; the points lost there."""
        if not self._expected:
            self._expected = [(batch, *_watched(self.model, self.task, batch)) for batch in self.searched()]
        wrong = 0.0
        outcomes = []
        for batch, _, expected in self._expected:
            found, output = _watched(made, self.task, batch)
            outcomes.append(found)
            wrong += float((output.double() - expected.double()).square().sum())
        rows = torch.cat([expected for _, _, expected in self._expected]).double()
        spread = float((rows - rows.mean(0)).square().sum())
        full, other = Outcomes.joined([each for _, each, _ in self._expected]), Outcomes.joined(outcomes)
        sign = 1.0 if self.task.higher_is_better else -1.0
        return wrong / max(spread, 1e-30), sign * (full.score() - other.score())

    def sensitivity(self, spec: QuantSpec, choices: Sequence[int]) -> Sensitivity:
        """The error of each weight width in each layer of a spec; measured once."""
        name = f"{spec.to_dict()} {list(choices)}"
        if name not in self._measured:
            calibration = self.calibration()[: max(1, _MEASURED // self.batch)]
            self._measured[name] = sensitivity(
                self.model, calibration=calibration, choices=choices, base=spec, activations="base"
            )
        return self._measured[name]


def as_in_file(made: nn.Module, candidate: Candidate) -> nn.Module:
    """A quantized model with the embedding tables of its file."""
    if not candidate.embeddings:
        return made
    made = shared_copy(made)
    round_embeddings(made, candidate.embeddings)
    return made


@contextmanager
def _seen(model: nn.Module) -> Iterator[list[Tensor]]:
    """The main output of every call of a model."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: outputs.append(main_output(output).detach()))
    try:
        yield outputs
    finally:
        hook.remove()


def _watched(model: nn.Module, task: Task, batch: dict[str, Any]) -> tuple[Outcomes, Tensor]:
    with _seen(model) as outputs:
        found = task.outcomes(model, batch)
    return found, torch.cat([output.flatten(0, -2) for output in outputs])
