"""Forecasts: measured candidates correct the predicted ones, and the next to try is the one that pays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from s2d.experiments.auto.candidates import Candidate, Scored
from s2d.experiments.auto.forecast import PRIOR, Forecast
from s2d.quant import QuantSpec

WIDE = Candidate(QuantSpec.parse({"base": "w8a16", "attention": False}), "rtn", 0, "ranges")
NARROW = Candidate(QuantSpec.parse({"base": "w4a16", "attention": False}), "rtn", 0, "narrow weights")
PREDICTED = {8: 0.0002, 4: 0.02}


def bits(candidate: Candidate) -> int:
    weight = candidate.spec.weight
    assert weight is not None
    return weight.format.bits


def forecast(*tried: Scored, within: float = 1.0) -> Forecast:
    return Forecast(
        predict=lambda candidate: PREDICTED[bits(candidate)],
        size=lambda candidate: 1000 * bits(candidate),
        time=lambda candidate: None,
        plain=32_000,
        within=within,
        objective="smallest",
        pass_seconds=1.0,
        scored={each.candidate.key: each for each in tried},
    )


def tried(candidate: Candidate, error: float, points: float, seconds: float = 5.0) -> Scored:
    return Scored(candidate, error, points, 1000 * bits(candidate), None, seconds, PREDICTED[bits(candidate)])


def test_a_measured_candidate_corrects_the_others_and_speaks_for_itself() -> None:
    before = forecast().error(NARROW)
    assert before == pytest.approx(0.02) and forecast().error(replace(NARROW, method="gptq")) < before
    known = forecast(tried(WIDE, 0.0008, 0.1))  # four times as much as was predicted
    assert before < known.error(NARROW) <= 4 * before and known.error(WIDE) == 0.0008
    many = forecast(*(tried(replace(WIDE, embeddings=n), 0.0008, 0.1) for n in range(20)))
    assert many.error(NARROW) == pytest.approx(4 * before, rel=0.2)


def test_a_method_is_corrected_by_its_own_results() -> None:
    gptq = replace(NARROW, method="gptq")
    poor = forecast(*(tried(replace(gptq, embeddings=n), 0.02, 1.0) for n in range(1, 6)))
    assert poor.error(gptq) > 3 * forecast().error(gptq), "no better than rounding to nearest here"
    assert PRIOR["gptq"] < 1 and poor.error(replace(NARROW, method="erq")) < poor.error(gptq) / PRIOR["gptq"]


def test_points_are_in_proportion_to_measured_drops() -> None:
    steep = forecast(*(tried(replace(NARROW, embeddings=n), 0.02, 4.0) for n in range(8)))
    flat = forecast(*(tried(replace(NARROW, embeddings=n), 0.02, 0.2) for n in range(8)))
    assert steep.points(NARROW) > 5 * flat.points(NARROW) and steep.points(NARROW) == pytest.approx(4.0, rel=0.2)
    assert flat.chance(NARROW) > 0.9 > 0.1 > steep.chance(NARROW)


def test_the_next_is_the_one_of_the_greatest_gain_a_second_and_none_without_a_gain() -> None:
    dear = replace(NARROW, method="rotation+gptq")
    cheap = replace(NARROW, method="gptq")
    assert forecast(within=2.0).next([dear, cheap]) == cheap
    done = forecast(tried(cheap, 0.0001, 0.0), within=2.0)
    assert done.next([WIDE, cheap, dear]) is None, "nothing is smaller"
    assert forecast(within=1e-9).next([WIDE, NARROW, cheap, dear]) is None, "an impossible promise"


def test_what_was_not_scored_is_not_hoped_for() -> None:
    unknown = forecast()
    unknown.predict = lambda candidate: None
    assert math.isinf(unknown.error(NARROW)) and unknown.chance(NARROW) == 0.0 and unknown.next([NARROW]) is None
