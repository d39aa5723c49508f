"""Result JSON is checked before anything is drawn from it."""

from __future__ import annotations

import math

import pytest
from tests.report import sample

from s2d.errors import InputError
from s2d.report.schema import Histogram, read_results, visible

RECORD = {
    "task": "t",
    "model": "m",
    "conditioning": "adamw",
    "seed": 0,
    "spec": "w4a4",
    "metric": "accuracy",
    "value": 1.0,
}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "not a results file"),
        ("text", "not a results file"),
        (None, "not a results file"),
        ([[]], "not a results file"),
        ({"records": {}}, "not a results file"),
        ({"records": []}, "no record"),
        ({"records": [], "kind": "audit"}, "no record"),
        ({"records": [RECORD], "run": 3}, '"run" must be an object'),
        ({"records": [{"task": "t"}]}, "record 0: conditioning, spec, metric, value missing"),
        ({"records": ["no"]}, "record 0: an object is expected"),
        ({"records": [RECORD], "audits": [1]}, '"audits" must be an object'),
        ({"records": [RECORD], "history": {"a": 1}}, '"history" must be a list'),
        ({"records": [{"role": "fc2"}], "kind": "audit"}, "record 0: weight missing"),
        (
            {
                "records": [{"weight": "w", "histogram": {"edges": [0, 1], "counts": [1, 2], "grid": [0, 1]}}],
                "kind": "audit",
            },
            "n counts",
        ),
        (
            {
                "records": [{"weight": "w", "histogram": {"edges": [0, 0], "counts": [1], "grid": [0, 1]}}],
                "kind": "audit",
            },
            "increase",
        ),
        (
            {
                "records": [{"weight": "w", "histogram": {"edges": [0, 1], "counts": [0], "grid": [0, 1]}}],
                "kind": "audit",
            },
            "at least one value",
        ),
        (
            {
                "records": [{"weight": "w", "histogram": {"edges": [0, math.inf], "counts": [1], "grid": [0, 1]}}],
                "kind": "audit",
            },
            "finite",
        ),
    ],
)
def test_what_is_no_result_is_named_in_one_line(content: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_results(content)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_is_named_when_there_are_several() -> None:
    with pytest.raises(InputError, match="results file 2"):
        read_results([{"records": [RECORD]}, {"records": 1}])


def test_files_are_merged_and_audits_told_apart() -> None:
    read = read_results([sample.audit("a"), sample.audit("a"), sample.run(seeds=1)])
    assert [audit.label for audit in read.audits] == ["a", "a (2)", "adamw", "s2d"]
    assert len(read.records) == 40


def test_measures_not_taken_are_absent_rather_than_zero() -> None:
    row = {
        "weight": "w",
        "output_ratio": None,
        "sigma": [1, None, "x"],
        "pcdr": 3,
        "depth": True,
        "w4a4_error": math.nan,
    }
    weight = read_results({"kind": "audit", "records": [row]}).audits[0].weights[0]
    assert dict(weight.values) == {"sigma_1": 1.0}
    assert weight.depth is None


def test_full_precision_has_no_quantizer() -> None:
    records = [dict(RECORD, spec="fp32", method="rtn"), dict(RECORD, method="rtn", observer="mse")]
    assert [record.quantizer for record in read_results({"records": records}).records] == ["", "rtn · mse"]


def test_invisible_characters_become_visible() -> None:
    assert visible("a\x1b[31mb\u202ec\u200bd\x9be") == "a\\x1b[31mb\\u202ec\\u200bd\\x9be"
    assert len(visible("x" * 10_000)) == 300


def histogram() -> Histogram:
    """100 values in [0, 1), 1 at the top of [8, 10), four levels at 0, 4, 8 and 12."""
    return Histogram((0.0, 0.5, 1.0, 8.0, 10.0), (50.0, 50.0, 0.0, 1.0), (0.0, 4.0, 8.0, 12.0), "input")


def test_cells_reach_halfway_to_the_neighbouring_levels() -> None:
    assert histogram().cells() == [(0.0, 2.0), (2.0, 6.0), (6.0, 10.0), (10.0, 12.0)]


def test_one_outlier_leaves_one_level_to_nearly_all_values() -> None:
    assert histogram().levels_used(0.99) == 1
    assert histogram().levels_used(1.0) == 2


def test_mass_splits_a_bin_evenly() -> None:
    assert histogram().mass(0.25, 0.75) == pytest.approx(50.0)
    assert histogram().mass(9.0, 99.0) == pytest.approx(0.5)


def test_quantiles_are_those_of_the_bins() -> None:
    found = Histogram((0.0, 1.0, 2.0, 4.0), (1.0, 1.0, 2.0), (0.0, 4.0), "input")
    assert [found.quantile(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_of_several_seeds_the_first_history_is_drawn() -> None:
    entries = [
        {"step": 0, "weight": "w", "sigma": (3.0, 1.0), "outlier_ratio": 50.0, "selected": 2, "seed": seed}
        for seed in (1, 2)
    ]
    (moment,) = read_results({"records": [RECORD], "history": entries}).history
    assert (moment.sigma, moment.ratio, moment.selected) == (3.0, 50.0, True)
