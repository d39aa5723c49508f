"""Acceptance: confidence bounds on the drop of a score, from the same examples through both models.

A drop is accepted when its upper 95 % bound is within what was promised. For right and wrong answers the bound is
Tango's score interval for paired proportions (Statistics in Medicine 17, 1998: 891-908), which keeps its level even
where few or no answers differ; for every other score it is the bias-corrected bootstrap over examples (Efron 1987),
both models drawn together.

Several candidates can be tried on one set of examples without inflating the error: in an order that was fixed before
any of them was looked at, until the first that fails (fixed-sequence testing; Maurer, Hothorn and Lehmacher 1995). A
second round on the same examples is allowed half the error probability of the one before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from s2d.errors import InputError
from s2d.tasks.base import Outcomes

LEVEL = 0.95
_DRAWS = 2000
_LEAST = 20  # examples for a bootstrap; fewer do not show the spread
_MOST = 1_000_000  # a drop that needs more examples to be accepted is as large as the promise


@dataclass(frozen=True)
class Drop:
    """How far a score fell, in points; negative where it rose.

    Attributes:
        points: The drop on these examples.
        lower: One-sided lower bound.
        upper: One-sided upper bound.
        level: Confidence level of each bound.
        examples: Number of examples.
        differing: Number of examples whose results differ.
    """

    points: float
    lower: float
    upper: float
    level: float
    examples: int
    differing: int

    def within(self, points: float) -> bool:
        """Whether the drop is at most this many points, at the level."""
        return self.upper <= points

    def beyond(self, points: float) -> bool:
        """Whether the drop is larger than this, at the level."""
        return self.lower > points

    def examples_needed(self, points: float) -> int | None:
        """How many examples like these would accept the drop; None when no number that one could have would."""
        room = points - self.points
        if room <= 0:
            return None
        if math.isinf(self.upper):
            return _LEAST
        spread = (self.upper - self.points) * math.sqrt(self.examples)  # bounds shrink with the square root
        needed = max(math.ceil((spread / room) ** 2), self.examples)
        return needed if needed <= _MOST else None


def level_of(round: int) -> float:
    """The level of the bounds in a round (from 1); each round has half the error probability of the one before."""
    return 1.0 - (1.0 - LEVEL) / 2.0 ** (round - 1)


def paired_drop(full: Outcomes, other: Outcomes, higher_is_better: bool, level: float = LEVEL) -> Drop:
    """The drop from one model to another.

    Args:
        full: Outcomes of the full-precision model.
        other: Outcomes of the other model, for the same examples in the same order.
        higher_is_better: Whether a higher score is better.
        level: Confidence level of each one-sided bound.

    Raises:
        InputError: Fewer than two examples, or different ones.
    """
    count = len(full.values)
    if len(other.values) != count or not torch.equal(full.weights, other.weights):
        raise InputError(f"the models were scored on different examples ({count} and {len(other.values)})")
    if count < 2:
        raise InputError(f"{count} example tells nothing of a drop; give the acceptance split more of them")
    sign = 1.0 if higher_is_better else -1.0
    points = sign * (full.score() - other.score())
    differing = int((full.values != other.values).sum())
    if math.isnan(points) or not bool(other.values.isfinite().all()):
        return Drop(math.inf, math.inf, math.inf, level, count, differing)
    if full.hits and other.hits:
        lost = int(((full.values > other.values) if higher_is_better else (full.values < other.values)).sum())
        scale = abs(full.scale)
        bounds = (tango_bound(lost, differing - lost, count, level, upper) for upper in (False, True))
        lower, upper = (scale * each for each in bounds)
    else:
        lower, upper = _bootstrap(full, other, sign, points, level)
    return Drop(points, lower, upper, level, count, differing)


def tango_bound(lost: int, gained: int, count: int, level: float, upper: bool) -> float:
    """Bound of the difference of two paired proportions, ``p_lost - p_gained``.

    Args:
        lost: Number of examples that only the first model answers correctly.
        gained: Number of examples that only the second answers correctly.
        count: All examples.
        level: One-sided.
        upper: The upper bound, else the lower.

    Returns:
        The difference at which the score statistic equals the normal quantile, from -1 to 1.
    """
    if not upper:
        return -tango_bound(gained, lost, count, level, True)
    quantile = NormalDist().inv_cdf(level)
    low, high = (lost - gained) / count, 1.0
    for _ in range(60):  # the statistic falls as the difference rises
        middle = (low + high) / 2
        if tango_statistic(lost, gained, count, middle) > -quantile:
            low = middle
        else:
            high = middle
    return high


def tango_statistic(lost: int, gained: int, count: int, difference: float) -> float:
    """Tango's score statistic for ``p_lost - p_gained = difference``; normal when that is true."""
    # The likelihood's maximum for p_gained under that difference: a root of 2 n q^2 + b q + c.
    b = -lost - gained + (2 * count - lost + gained) * difference
    c = -gained * difference * (1 - difference)
    gained_share = (math.sqrt(max(b * b - 8 * count * c, 0.0)) - b) / (4 * count)
    variance = count * (2 * gained_share + difference * (1 - difference))
    distance = lost - gained - count * difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _bootstrap(full: Outcomes, other: Outcomes, sign: float, points: float, level: float) -> tuple[float, float]:
    """Bounds from `_DRAWS` samples of the examples with replacement, corrected for bias."""
    count = len(full.values)
    if count < _LEAST:
        return -math.inf, math.inf
    generator = torch.Generator().manual_seed(0)
    drops = []
    for _ in range(_DRAWS):
        rows = torch.randint(count, (count,), generator=generator)
        drops.append(sign * (full.score(rows) - other.score(rows)))
    found: Tensor = torch.tensor(drops, dtype=torch.float64).sort().values
    if float(found[0]) == float(found[-1]):  # no example differs, but a further one might
        return points, points
    below = float((found < points).double().mean() + (found == points).double().mean() / 2)
    normal = NormalDist()
    shift = normal.inv_cdf(min(max(below, 1 / _DRAWS), 1 - 1 / _DRAWS))
    ends = (normal.cdf(2 * shift + normal.inv_cdf(1 - level)), normal.cdf(2 * shift + normal.inv_cdf(level)))
    lower, upper = (float(found[min(int(end * _DRAWS), _DRAWS - 1)]) for end in ends)
    return min(lower, points), max(upper, points)
