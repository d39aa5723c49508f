"""Forecasts: what a candidate would lose and cost, before it is tried; and which one is worth trying next.

The scores predict the divergence of rounding to nearest. Candidates that were tried correct this prediction by the
mean ratio (in logarithms) of measured to predicted divergence, of all candidates and of each method. A drop in points
is proportional to a power of the divergence; its factor comes from the first measured drops.

The worth of a candidate is the share of the file (or of the time) that it saves. Its gain is the expected improvement
over the best that was tried: the probability that it keeps the promise, times what it saves beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist, mean

from s2d.experiments.auto.candidates import Candidate, Objective, Scored
from s2d.quant import get_methods

# Measured divergence over that of rounding to nearest, before a method was tried with this model.
PRIOR = {"rtn": 1.0, "gptq": 0.15, "erq": 0.4, "repq": 1.5, "smoothquant": 0.8, "rotation": 0.6, "svdquant": 0.5}
CONDITIONED, TRAINED = 0.5, 0.1  # the same for repaired weights
POWER, FACTOR = 1.0, 30.0  # points of a divergence of one nat, before a drop was measured
_UNSURE, _SURER = 1.0, 0.5  # standard deviations of the logarithm of a predicted and of a measured drop
_LEAST = 0.004  # share of the file (or the time): a smaller expected gain is not worth trying


@dataclass
class Forecast:
    """What is known of a model's candidates.

    Attributes:
        predict: The scores' divergence of a candidate under rounding to nearest; None where it was not scored.
        size: Its predicted bytes.
        time: Its predicted time relative to full precision; None where it is not known.
        plain: Bytes of full precision.
        within: Points that may be lost.
        objective: ``"smallest"`` or ``"fastest"``.
        pass_seconds: One forward of the calibration data.
        scored: Candidates that were tried, by key.
    """

    predict: Callable[[Candidate], float | None]
    size: Callable[[Candidate], int]
    time: Callable[[Candidate], float | None]
    plain: int
    within: float
    objective: Objective
    pass_seconds: float
    scored: Mapping[str, Scored] = field(default_factory=dict)

    def error(self, candidate: Candidate) -> float:
        """Divergence in nats: measured where it was tried, else predicted and corrected; infinite where unknown."""
        tried = self.scored.get(candidate.key)
        return tried.error if tried is not None else self.corrected(candidate)

    def corrected(self, candidate: Candidate) -> float:
        """The predicted divergence, corrected by the candidates that were tried (the candidate itself left out)."""
        found = self.predict(candidate)
        if found is None:
            return math.inf
        known = [each for each in self._comparable() if each.candidate.key != candidate.key]
        common = _shrunk(math.log(each.error / each.predicted / prior(each.candidate)) for each in known)
        same = [each for each in known if each.candidate.method == candidate.method]
        own = _shrunk(math.log(each.error / each.predicted / prior(each.candidate)) - common for each in same)
        return found * prior(candidate) * math.exp(common + own)

    def _comparable(self) -> list[_Measured]:
        """The tried candidates with a prediction, in the order of trying."""
        return [
            _Measured(each.candidate, each.error, each.predicted)
            for each in self.scored.values()
            if each.predicted and 0 < each.error < math.inf and not each.candidate.repaired
        ]

    def points(self, candidate: Candidate) -> float:
        """The drop in points: from the measured divergence where it was tried, else from the predicted one."""
        return self.factor * self.error(candidate) ** POWER

    @property
    def factor(self) -> float:
        """Points of one nat, by least squares over the measured drops; one more sample stands for the first guess."""
        known = [(each.error**POWER, each.points) for each in self.scored.values() if math.isfinite(each.error)]
        largest = max((x for x, _ in known), default=0.0) or 1.0
        pairs = [*known, (0.3 * largest, 0.3 * largest * FACTOR)]
        return max(sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs), 1e-6)

    def saving(self, candidate: Candidate) -> float:
        """The share of full precision's bytes (or time) that it saves, and a tenth of the other one's."""
        size, time = 1 - self.size(candidate) / self.plain, 1 - (self.time(candidate) or 1.0)
        return size + 0.1 * time if self.objective == "smallest" else time + 0.1 * size

    def chance(self, candidate: Candidate) -> float:
        """The probability that its drop is within the promise."""
        points = self.points(candidate)
        if not math.isfinite(points):
            return 0.0
        spread = _SURER if candidate.key in self.scored else _UNSURE
        return NormalDist().cdf(math.log(self.within / max(points, 1e-9)) / spread)

    def gain(self, candidate: Candidate) -> float:
        """The expected improvement over the best candidate that was tried, as a share of full precision."""
        best = max(
            (self.chance(each.candidate) * self.saving(each.candidate) for each in self.scored.values()), default=0
        )
        return self.chance(candidate) * max(self.saving(candidate) - best, 0.0)

    def seconds(self, candidate: Candidate) -> float:
        """Time to try it: as measured with its method, else from the passes that the method makes."""
        known = [each.seconds for each in self.scored.values() if each.candidate.method == candidate.method]
        if known:
            return mean(known)
        return self.pass_seconds * (3.0 + sum(entry.passes for entry in get_methods(candidate.method)))

    def next(self, candidates: Iterable[Candidate]) -> Candidate | None:
        """The untried candidate of the greatest gain per second; None where none is worth it."""
        worth = [(self.gain(each), each) for each in candidates if each.key not in self.scored]
        hopeful = [(gain / self.seconds(each), each) for gain, each in worth if gain >= _LEAST]
        return max(hopeful, key=lambda pair: pair[0], default=(0.0, None))[1]


@dataclass(frozen=True)
class _Measured:
    candidate: Candidate
    error: float
    predicted: float


def prior(candidate: Candidate) -> float:
    """The first guess of a candidate's divergence over that of rounding to nearest."""
    found = math.prod(PRIOR.get(name, 1.0) for name in candidate.method.split("+"))
    return found * (CONDITIONED if candidate.conditioned else 1.0) * (TRAINED if candidate.trained else 1.0)


def _shrunk(logarithms: Iterable[float]) -> float:
    """The mean, as if one more were zero."""
    known = list(logarithms)
    return sum(known) / (len(known) + 1)
