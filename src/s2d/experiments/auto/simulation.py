"""Candidates in simulation: calibrated on some training examples, compared with full precision on the next ones.

The acceptance data are never read here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from s2d import quant
from s2d.errors import InputError
from s2d.experiments.auto.acceptance import LEVEL
from s2d.experiments.auto.candidates import Candidate
from s2d.experiments.auto.fisher_scores import Kind, Scorer, Scores, option_of, table_options
from s2d.export.copies import shared_copy
from s2d.export.lowering import round_embeddings
from s2d.models.graph import Graph
from s2d.models.running import evaluating, main_output, run
from s2d.quant import QuantSpec, Site
from s2d.quant.allocate import LayerCost, Sensitivity, never_rising, side_by_side
from s2d.quant.calibration.observe import Batches, traced
from s2d.quant.numerics.formats import integer_format
from s2d.tasks import Split, Task
from s2d.tasks.base import Outcomes, calibration_inputs

SAMPLES, SEARCHED = 128, 256  # training examples: for calibration, and to compare candidates
_SCORINGS = 7  # passes over the acceptance data: full precision, and the files of a round
_FEWEST = 320  # examples that are scored whatever the time; with fewer no promise of one point is met
_CHANGED = 0.03  # of the answers: so many may a file change, as many to the better, and be accepted
_TOKENS = 2048  # tokens of a batch
_KEPT = 2**24  # numbers of full precision's output that are held for the comparison


class Simulation:
    """One model and its training data."""

    def __init__(self, model: nn.Module, task: Task, seed: int) -> None:
        """A model of the task, in full precision."""
        self.model, self.task, self.seed = model, task, seed
        self.batch = max(2, min(32, _TOKENS // max(task.tokens, 1)))
        self.samples = max(2, min(SAMPLES, task.sizes()["train"] // 2))
        self.scores: Scores | None = None
        self._expected: list[tuple[dict[str, Any], Outcomes, Tensor]] = []
        self._plans: dict[str, list[Site]] = {}

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

    @cached_property
    def graph(self) -> Graph:
        """What the model does with its weights."""
        return traced(self.model, Batches(self.calibration()))

    @cached_property
    def pass_seconds(self) -> float:
        """The time of one forward of the calibration data, from its first batch."""
        batches = self.calibration()
        with evaluating(self.model):
            run(self.model, batches[0])
            start = time.perf_counter()
            run(self.model, batches[0])
        return (time.perf_counter() - start) * len(batches)

    def affordable(self, split: Split, minutes: float | None, within: float) -> int:
        """Acceptance examples: all, or as many as full precision and the files of a round are through with in half the
        time. If they cannot show the promise, as many as can, but no more than half the time allows for two scorings.
        """
        size = self.task.sizes()[split]
        if minutes is None:
            return size
        twice = self.scored_in(30.0 * minutes, scorings=2)
        enough = 100.0**2 * _CHANGED * (NormalDist().inv_cdf(LEVEL) / within) ** 2 if within else math.inf
        return min(size, max(_FEWEST, 2 * twice // _SCORINGS, min(twice, math.ceil(min(enough, size)))))

    def scored_in(self, seconds: float, scorings: int) -> int:
        """How many examples are scored so often in some time."""
        return round(seconds * self.samples / (scorings * self.pass_seconds))

    def expected_seconds(self, examples: int) -> float:
        """An estimate for a whole search with so many acceptance examples."""
        per_row = self.pass_seconds / self.samples
        tried = 8 * (6 * self.pass_seconds + SEARCHED * per_row)
        judged = 4 * (15.0 + 3 * per_row * examples)
        return tried + 12 * self.pass_seconds + judged + per_row * examples

    def quantized(self, candidate: Candidate, trained: Path) -> nn.Module:
        """The model of a candidate.

        Args:
            candidate: The candidate.
            trained: The folder of a model with trained weights.

        Raises:
            InputError: The method does not fit the model.
        """
        if candidate.repaired:
            return quant.load(trained, self.model)
        return quant.quantize(
            self.model, candidate.spec, calibration=self.calibration(), method=candidate.method, seed=self.seed
        )

    # -- measured

    @torch.no_grad()
    def compared(self, made: nn.Module) -> tuple[float, float]:
        """The divergence of the output on the searched examples, in nats of an example or token, and the points lost.

        The points are those of the task's own outcomes; where answers are right or wrong, with labels in proportion to
        the full-precision model's own probabilities, which says more with few examples.
        """
        if not self._expected:
            batches = self.searched()
            self._expected = [(batch, *_watched(self.model, self.task, batch, len(batches))) for batch in batches]
        full = Outcomes.joined([each for _, each, _ in self._expected])
        nats, lost, outcomes = [], [], []
        for batch, _, expected in self._expected:
            found, output = _watched(made, self.task, batch, len(self._expected))
            outcomes.append(found)
            nats.append(_divergence(expected, output, self.kind))
            if self.kind == "classes":
                known = expected.float().softmax(-1)
                lost.append(known.amax(-1) - known.gather(1, output.nan_to_num().argmax(-1, keepdim=True))[:, 0])
        if lost:
            return float(torch.cat(nats).mean()), full.scale * float(torch.cat(lost).mean())
        sign = 1.0 if self.task.higher_is_better else -1.0
        return float(torch.cat(nats).mean()), sign * (full.score() - Outcomes.joined(outcomes).score())

    @cached_property
    def kind(self) -> Kind:
        """What the model's output is: scores of classes or tokens where the task's outcomes are made of them."""
        found = self.task.outcomes(self.model, next(iter(self.searched())))
        return "classes" if found.hits else "tokens" if found.exponential else "values"

    # -- predicted

    def score(self, kept: Path, specs: Sequence[QuantSpec], tables: Sequence[int]) -> None:
        """Score the sites of some specs, and embedding tables at some widths, unless that is kept already.

        Args:
            kept: The file of the scores.
            specs: Their sites are scored.
            tables: Widths of embedding tables.
        """
        self.scores = Scores.open(kept)
        inputs = [each for batch in self.searched() for each in self.task.inputs(batch)]
        few = inputs[: max(1, SAMPLES // self.batch)]
        scorer = Scorer(self.model, self.graph, self.calibration(), few, self.kind, self.seed)
        for spec in specs:
            scorer.want_sites(spec, self.scores.changes)
        for bits in tables:
            scorer.want_tables(bits, self.scores.changes)
        self.scores.add(scorer.run())

    def predicted(self, candidate: Candidate) -> float | None:
        """The divergence of a candidate as if its weights were rounded to nearest; None where it was not scored."""
        assert self.scores is not None
        options = [option_of(site) for site in self._plan(candidate.spec) if site.format is not None]
        options += table_options(self.model, candidate.embeddings) if candidate.embeddings else []
        return self.scores.divergence(options) if self.scores.knows(options) else None

    def sensitivity(self, spec: QuantSpec, choices: Sequence[int]) -> Sensitivity:
        """The error of each weight width in each layer of a spec, from the scores."""
        assert self.scores is not None
        layers = [site for site in self._plan(spec) if site.what == "weight" and site.format is not None]
        costs = []
        for site in layers:
            numbers = 1
            for size in site.shape:
                numbers *= size
            errors = {bits: self.scores.alone(option_of(_at(site, bits))) for bits in choices}
            costs.append(LayerCost(site.module, numbers, never_rising(errors)))
        together = side_by_side(self.graph, [site.module for site in layers])
        return Sensitivity(tuple(costs), tuple(choices), spec, "base", together)

    def worst_inputs(self, spec: QuantSpec) -> list[str]:
        """The layers of a spec whose inputs cost most, worst first, from the scores."""
        scores = self.scores
        assert scores is not None
        inputs = [site for site in self._plan(spec) if site.what == "input" and site.format is not None]
        return [site.module for site in sorted(inputs, key=lambda site: -scores.alone(option_of(site)))]

    def _plan(self, spec: QuantSpec) -> list[Site]:
        name = str(spec.to_dict())
        if name not in self._plans:
            self._plans[name] = quant.planned(self.model, spec, (), self.graph)
        return self._plans[name]


def _at(site: Site, bits: int) -> Site:
    return Site(**{**vars(site), "format": integer_format(bits, signed=True)})


def as_in_file(made: nn.Module, candidate: Candidate) -> nn.Module:
    """A quantized model with the embedding tables of its file."""
    if not candidate.embeddings:
        return made
    made = shared_copy(made)
    round_embeddings(made, candidate.embeddings)
    return made


def _divergence(expected: Tensor, output: Tensor, kind: Kind) -> Tensor:
    """Nats of each row ``[rows]``; infinite where a number is not finite."""
    if kind == "values":
        found = 0.5 * (output.double() - expected.double()).square().sum(-1)
    else:
        p, q = expected.float().log_softmax(-1), output.float().log_softmax(-1)
        found = (p.exp() * (p - q)).sum(-1).double()
    return torch.nan_to_num(found, nan=float("inf")).clamp(min=0.0)


@contextmanager
def _seen(model: nn.Module) -> Iterator[list[Tensor]]:
    """The main output of every call of a model."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: outputs.append(main_output(output).detach()))
    try:
        yield outputs
    finally:
        hook.remove()


def _watched(model: nn.Module, task: Task, batch: dict[str, Any], batches: int) -> tuple[Outcomes, Tensor]:
    """The outcomes of a batch, and its rows of the output: so many that those of all batches can be held."""
    with _seen(model) as outputs:
        found = task.outcomes(model, batch)
    rows = torch.cat([output.flatten(0, -2) for output in outputs])
    step = -(-rows.numel() * batches // _KEPT)
    return found, rows[:: max(step, 1)].clone()
