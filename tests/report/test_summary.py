"""Gains and verdicts, on numbers small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.report import sample

from s2d.report.schema import read_results
from s2d.report.summary import audit_change, audit_verdict, gain, groups, primary, run_verdict, target_spec


def rows(values: dict[tuple[str, str, int, str], float], **extra: Any) -> dict[str, Any]:
    """Records from {(conditioning, spec, seed, observer): value}."""
    return {
        "records": [
            {
                "task": "t",
                "model": "m",
                "conditioning": conditioning,
                "spec": spec,
                "seed": seed,
                "observer": observer,
                "method": "rtn",
                "metric": "accuracy",
                "value": value,
                "higher_is_better": True,
                **extra,
            }
            for (conditioning, spec, seed, observer), value in values.items()
        ]
    }


def only(content: dict[str, Any]):
    (found,) = groups(read_results(content).records)
    return found


def test_gain_pairs_seeds_and_observers_and_averages_seeds_last() -> None:
    group = only(
        rows(
            {
                ("adamw", "w4a4", 0, "a"): 10,
                ("s2d", "w4a4", 0, "a"): 20,
                ("adamw", "w4a4", 0, "b"): 30,
                ("s2d", "w4a4", 0, "b"): 34,
                ("adamw", "w4a4", 1, "a"): 10,
                ("s2d", "w4a4", 1, "a"): 19,
                ("adamw", "w4a4", 2, "a"): 99,
            }
        )
    )
    found = gain(group, "w4a4")
    assert found is not None
    assert found.mean == pytest.approx((7 + 9) / 2)  # seed 0: (10 + 4) / 2, seed 1: 9, seed 2 has no partner
    assert found.spread == pytest.approx(2**0.5)
    assert (found.seeds, found.pairs) == (2, 3)
    assert not found.clear  # t = 8 with one degree of freedom; 12.7 would be clear


def test_a_lower_loss_is_a_gain() -> None:
    content = rows({("adamw", "w4a4", 0, "a"): 50, ("s2d", "w4a4", 0, "a"): 40}, higher_is_better=False)
    found = gain(only(content), "w4a4")
    assert found is not None and found.mean == 10


def test_no_gain_without_a_rival() -> None:
    assert gain(only(rows({("s2d", "w4a4", 0, "a"): 1})), "w4a4") is None


def test_diverged_values_are_left_out() -> None:
    content = rows({("adamw", "w4a4", 0, "a"): float("nan"), ("s2d", "w4a4", 0, "a"): 1})
    assert gain(only(content), "w4a4") is None


def test_bit_widths_go_from_wide_to_narrow() -> None:
    specs = ["w4a4", "w2a16", "fp32", "w4a8", "w8a8", "odd", "w6a6"]
    group = only(rows({("adamw", spec, 0, "a"): 1 for spec in specs}))
    assert group.specs == ["fp32", "w2a16", "w8a8", "w6a6", "w4a8", "w4a4", "odd"]
    assert target_spec(group) == "w4a4"


def test_test_numbers_replace_validation_numbers() -> None:
    content = {"records": rows({("adamw", "w4a4", 0, "a"): 1}, split="validation")["records"]}
    assert only(content).values("adamw", "w4a4") == [1]
    content["records"] += rows({("adamw", "w4a4", 0, "a"): 2}, split="test")["records"]
    assert only(content).values("adamw", "w4a4") == [2]


def test_each_seed_counts_once_whatever_the_number_of_observers() -> None:
    group = only(rows({("s2d", "w4a4", 0, "a"): 10, ("s2d", "w4a4", 0, "b"): 20, ("s2d", "w4a4", 1, "a"): 40}))
    assert group.values("s2d", "w4a4") == [15, 40]
    assert group.values("s2d", "w4a4", "rtn · a") == [10, 40]


@pytest.mark.parametrize(
    ("after", "headline", "tone"),
    [
        ((20, 21, 22), "S2D helps at W4A4", "good"),
        ((5, 4, 6), "S2D costs accuracy at W4A4", "bad"),
        ((11, 9, 10.2), "S2D makes no clear difference at W4A4", "plain"),
    ],
)
def test_the_headline_follows_the_numbers(after: tuple[float, ...], headline: str, tone: str) -> None:
    values: dict[tuple[str, str, int, str], float] = {("adamw", "w4a4", seed, "a"): 10 for seed in range(3)}
    values |= {("s2d", "w4a4", seed, "a"): value for seed, value in enumerate(after)}
    verdict = run_verdict([only(rows(values))])
    assert (verdict.headline, verdict.tone) == (headline, tone)


def test_sentences_say_gain_noise_and_full_precision() -> None:
    found = groups(read_results(sample.run()).records)
    assert [group.metric for group in primary(found)] == ["MRR@10"]
    verdict = run_verdict(found)
    assert verdict.tiles[0][0].startswith("+13.") and "W4A4" in verdict.tiles[0][1]
    assert "full precision" in verdict.tiles[1][1]
    assert "over 3 seeds and 3 calibrations" in verdict.sentences[0]
    assert "W6A6 +" in verdict.sentences[1]


def test_one_seed_is_called_one_seed() -> None:
    verdict = run_verdict(groups(read_results(sample.run(seeds=1)).records))
    assert verdict.headline == "S2D helps at W4A4, on one seed"
    assert "single seed cannot tell this from chance" in verdict.sentences[0]
    assert "noise" not in verdict.sentences[1]


def test_without_a_comparison_the_drop_is_told() -> None:
    values = {("adamw", "fp32", 0, ""): 90.0, ("adamw", "w4a4", 0, "a"): 21.55}
    verdict = run_verdict([only(rows(values))])
    assert verdict.sentences == ("AdamW: accuracy goes from 90.0 at full precision to 21.6 at W4A4.",)


def test_audit_verdict_names_the_worst_weight() -> None:
    verdict = audit_verdict(read_results(sample.audit()).audits)
    assert verdict.tiles[0] == ("5 of 37", "weights selected for decay")
    assert "encoder.layer.0.output.dense.weight" in verdict.sentences[0]
    assert "214×" in verdict.sentences[0]


def test_audit_of_a_healthy_model_says_so() -> None:
    verdict = audit_verdict(read_results(sample.audit(shrink=50)).audits)
    assert verdict.tone == "good"
    assert "None passes" in verdict.sentences[0]


def test_what_conditioning_did_to_the_outliers_is_told() -> None:
    sentences = audit_change(read_results(sample.run()).audits)
    assert "214× (adamw), 23.8× (s2d)" in sentences[0]
    assert "5 of 37 (adamw), 0 of 37 (s2d)" in sentences[1]
