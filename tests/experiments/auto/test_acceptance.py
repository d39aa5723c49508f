"""The bounds of a drop: against exact enumeration, closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from s2d.errors import InputError
from s2d.experiments.auto.acceptance import level_of, paired_drop, tango_bound, tango_statistic
from s2d.tasks.base import Outcomes


def hits(*right: int) -> Outcomes:
    return Outcomes.of_hits(torch.tensor(right, dtype=torch.bool))


def pair(lost: int, gained: int, count: int) -> tuple[Outcomes, Outcomes]:
    """Outcomes of two models of which each has so many right that the other has wrong."""
    rest = count - lost - gained
    return hits(*[1] * lost, *[0] * gained, *[1] * rest), hits(*[0] * lost, *[1] * gained, *[1] * rest)


def test_the_bound_without_any_difference_is_that_of_the_normal_quantile() -> None:
    # With no discordant pair the equation is n d / (1 - d) = z^2.
    z2 = 1.6448536269514722**2
    for count in (50, 1000):
        assert tango_bound(0, 0, count, 0.95, True) == pytest.approx(z2 / (count + z2), rel=1e-6)
        assert tango_bound(0, 0, count, 0.95, False) == pytest.approx(-z2 / (count + z2), rel=1e-6)


def test_the_bound_solves_the_score_equation() -> None:
    for lost, gained, count in ((14, 0, 100), (12, 2, 44), (30, 25, 1000), (0, 9, 300)):
        upper = tango_bound(lost, gained, count, 0.95, True)
        assert tango_statistic(lost, gained, count, upper) == pytest.approx(-1.6448536, abs=1e-5)
        assert upper > (lost - gained) / count > tango_bound(lost, gained, count, 0.95, False)


@pytest.mark.parametrize(("lost_share", "gained_share"), [(0.01, 0.0), (0.02, 0.01), (0.06, 0.05)])
def test_a_drop_on_the_edge_is_accepted_in_at_most_about_one_case_of_twenty(
    lost_share: float, gained_share: float
) -> None:
    """Exact: over all counts of a trinomial whose true drop is just what was promised."""
    count = 500
    edge = lost_share - gained_share
    wrong = 0.0
    for lost in range(0, 75):
        for gained in range(0, 65):
            if tango_bound(lost, gained, count, 0.95, True) <= edge:
                wrong += _trinomial(count, lost, gained, lost_share, gained_share)
    assert 0.01 < wrong < 0.06


def _trinomial(count: int, lost: int, gained: int, lost_share: float, gained_share: float) -> float:
    if gained and not gained_share:
        return 0.0
    rest = count - lost - gained
    logs = math.lgamma(count + 1) - math.lgamma(lost + 1) - math.lgamma(gained + 1) - math.lgamma(rest + 1)
    logs += lost * math.log(lost_share) + rest * math.log(1 - lost_share - gained_share)
    return math.exp(logs + (gained * math.log(gained_share) if gained else 0.0))


def test_drops_are_in_points_and_know_their_direction() -> None:
    full, other = pair(30, 10, 1000)
    drop = paired_drop(full, other, True)
    assert drop.points == pytest.approx(2.0) and (drop.examples, drop.differing) == (1000, 40)
    assert drop.lower < 2.0 < drop.upper and drop.within(drop.upper) and not drop.within(2.0)
    back = paired_drop(other, full, True)
    assert back.points == pytest.approx(-2.0) and back.upper == pytest.approx(-drop.lower)
    assert drop.beyond(0.5) and not drop.beyond(1.5)


def test_how_many_examples_would_do() -> None:
    full, other = pair(8, 6, 400)
    drop = paired_drop(full, other, True)
    needed = drop.examples_needed(1.0)
    assert needed is not None and needed > 400 and not drop.within(1.0)
    times = math.ceil(needed / 400)
    assert paired_drop(*pair(8 * times, 6 * times, 400 * times), True).within(1.0)
    assert drop.examples_needed(0.4) is None, "the drop itself is larger"
    assert drop.examples_needed(drop.points + 1e-6) is None, "as large as the promise: no number of examples decides"


def test_a_lower_score_can_be_the_better_one() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.full((60,), 100.0, dtype=torch.float64)
    losses = 300 + 20 * torch.randn(60, generator=generator, dtype=torch.float64)
    full = Outcomes(losses, weights, exponential=True)
    worse = Outcomes(losses + 2 + torch.randn(60, generator=generator, dtype=torch.float64), weights, exponential=True)
    drop = paired_drop(full, worse, False)
    assert drop.points == pytest.approx(worse.score() - full.score()) and 0 < drop.lower < drop.points < drop.upper
    assert paired_drop(worse, full, False).points == pytest.approx(-drop.points)
    assert paired_drop(full, full, False).upper == 0.0


def test_the_bootstrap_agrees_with_the_normal_bound_of_a_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(400, generator=generator, dtype=torch.float64)
    weights = torch.ones(400, dtype=torch.float64)
    full = Outcomes(torch.zeros(400, dtype=torch.float64), weights)
    drop = paired_drop(full, Outcomes(-change, weights), True)
    half = 1.6449 * float(change.std()) / 20
    assert drop.points == pytest.approx(float(change.mean()))
    assert drop.upper - drop.points == pytest.approx(half, rel=0.15)
    assert drop.points - drop.lower == pytest.approx(half, rel=0.15)


def test_what_is_no_number_is_no_drop_that_is_accepted() -> None:
    full = Outcomes(torch.zeros(30, dtype=torch.float64), torch.ones(30, dtype=torch.float64))
    broken = Outcomes(torch.full((30,), math.nan, dtype=torch.float64), full.weights)
    assert not paired_drop(full, broken, False).within(1e9)


def test_too_few_examples() -> None:
    with pytest.raises(InputError, match="1 example tells nothing"):
        paired_drop(hits(1), hits(1), True)
    with pytest.raises(InputError, match="different examples"):
        paired_drop(hits(1, 1), hits(1, 1, 1), True)
    few = Outcomes(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    assert not paired_drop(few, few, False).within(1.0), "five windows prove nothing"


def test_each_later_round_may_err_half_as_often() -> None:
    assert [level_of(number) for number in (1, 2, 3)] == pytest.approx([0.95, 0.975, 0.9875])
