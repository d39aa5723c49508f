"""Audits as tables, JSON, data frames and pages; several checkpoints side by side."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s2d.audit import Audit, AuditRow, Trend
from s2d.errors import InputError, MissingExtra
from s2d.report.schema import read_results


def row(weight: str, ratio: float | None = 5.0, selected: bool = False, **more: Any) -> AuditRow:
    seen: dict[str, Any] = {}
    if ratio is not None:
        seen = {"pcdr": [0.1, 0.2, 0.3], "pcdr_data": [0.5, 0.6, 0.7], "output_max": 12.5, "output_ratio": ratio}
        seen |= {"input_max": 3.0, "input_ratio": 4.0, "error": 0.25, "selected": selected}
        seen |= {"selected_by": "weight", "components": 1} if selected else {}
    fixed: dict[str, Any] = {"kind": "linear", "shape": [4, 8], "depth": 0, "role": "fc2", "sigma": [3.0, 2.0, 1.0]}
    fixed |= {"sigma_over_median": 2.5, "stable_rank": 1.7}
    return AuditRow(weight, **{**fixed, **seen, **more})


HISTOGRAM = {"edges": [-1.0, 0.0, 2.0], "counts": [3, 4], "grid": [-1.0, 0.0, 1.0, 2.0], "of": "input"}


def sample(shrink: float = 1.0) -> Audit:
    rows = [
        row("layers.0.fc1.weight", 9.0 / shrink),
        row(
            "layers.0.fc2.weight", 200.0 / shrink, selected=shrink == 1, histogram=HISTOGRAM, sigma=[8.0 / shrink, 1.0]
        ),
        row("layers.1.fc1.weight", 30.0 / shrink),
        row("layers.1.fc2.weight", None, role=None, depth=None, sigma_over_median=None),
        row("layers.1.proj.weight", 20.0 / shrink, selected=True),
    ]
    return Audit(rows, "tiny", {"spec": "w4a4", "tokens": 100}, {"layers.1.fc2.weight": "no batch reached its module"})


def text(table: Any, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_worst_stand_out_most_and_the_unseen_come_last() -> None:
    found = sample()
    order = ["layers.0.fc2", "layers.1.fc1", "layers.1.proj", "layers.0.fc1", "layers.1.fc2"]
    assert [r.weight.removesuffix(".weight") for r in found.worst()] == order
    assert [r.weight for r in found.worst(1)] == ["layers.0.fc2.weight"] and found.worst(0) == found.worst(-3) == []
    assert [r.weight for r in found.selected] == ["layers.0.fc2.weight", "layers.1.proj.weight"]
    assert found.row("layers.0.fc1.weight").output_ratio == 9.0
    with pytest.raises(InputError, match="no weight 'fc9'"):
        found.row("fc9")


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    found = sample()
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert Audit.from_json(content) == found
    path = found.save(tmp_path / "new" / "audit.json")
    assert Audit.load(path) == found
    assert [file.name for file in path.parent.iterdir()] == ["audit.json"]


def test_the_key_of_the_error_names_its_bits() -> None:
    found = sample()
    assert found.records()[0]["w4a4_error"] == 0.25 and "error" not in found.records()[0]
    found.run["spec"] = "w8a8"
    assert found.records()[0]["w8a8_error"] == 0.25 and "w4a4_error" not in found.records()[0]
    assert Audit.from_json(found.to_json()) == found


def test_the_report_reads_every_value() -> None:
    (read,) = read_results(sample().to_json()).audits
    weight = read.weight("layers.0.fc2.weight")
    assert weight is not None and weight.selected and weight.histogram is not None and weight.role == "fc2"
    wanted = {"sigma_1", "pcdr_1", "pcdr_3", "pcdr_data_1", "output_max", "output_ratio", "input_max", "input_ratio"}
    assert wanted | {"sigma_over_median", "stable_rank", "w4a4_error"} <= set(weight.values)
    unseen = read.weight("layers.1.fc2.weight")
    assert unseen is not None and set(unseen.values) == {"sigma_1", "sigma_2", "sigma_3", "stable_rank"}


def test_a_page_holds_every_weight(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    page = sample().save(tmp_path / "audit.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html") or "<html" in page[:200]
    assert "tiny" in page and page.count("fc2") > 2
    both = Trend({"before": sample(), "after": sample(4.0)}).save(tmp_path / "trend.html").read_text(encoding="utf-8")
    assert "before" in both and "after" in both


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"audit\.csv: an audit is saved as \.json or \.html"):
        sample().save(tmp_path / "audit.csv")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="could not write"):
        sample().save(tmp_path / "file" / "audit.json")
    with pytest.raises(InputError, match="cannot read"):
        Audit.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"kind": "audit", "rec')
    with pytest.raises(InputError, match="not a JSON file"):
        Audit.load(tmp_path / "half.json")


@pytest.mark.parametrize(
    "content", [[], None, {"kind": "run", "records": []}, {"kind": "audit"}, {"kind": "audit", "records": "x"}]
)
def test_what_is_no_audit_is_refused(content: object) -> None:
    with pytest.raises(InputError, match="not an audit of s2d"):
        Audit.from_json(content)


@pytest.mark.parametrize("record", [3, {}, {"weight": "a"}])
def test_a_damaged_record_is_numbered(record: object) -> None:
    content = sample().to_json()
    content["records"].append(record)
    with pytest.raises(InputError, match="record 6 of the audit"):
        Audit.from_json(content)


def test_a_data_frame_has_a_column_per_number() -> None:
    pytest.importorskip("pandas")
    frame = sample().frame()
    assert list(frame.index) == [r.weight for r in sample().rows]
    assert frame.loc["layers.0.fc2.weight", "sigma_1"] == 8.0 and frame.loc["layers.0.fc1.weight", "pcdr_data_3"] == 0.7
    assert "histogram" not in frame and frame["output_ratio"].isna().sum() == 1


def test_without_pandas_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = sample(), builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install pandas .*records\(\)"):
        found.frame()


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_a_table_fits_its_terminal_with_names_in_one_piece(width: int) -> None:
    shown = text(sample().table(4, width), width)
    assert "…" not in shown and all(len(line) <= width for line in shown.splitlines())
    for wanted in ("layers.0.fc2 ", "weight, 1", "out/RMS", "PCDR₁", "200", "2 of 5 weights"):
        assert wanted in " ".join(shown.split()) + " "
    assert ("4×8" in shown) == (width >= 140)
    assert "layers.1.fc2.weight" in shown  # listed as not seen


def test_a_trend_lists_values_in_order_of_the_checkpoints() -> None:
    trend = Trend({"10k": sample(4.0), "20k": sample(2.0), "40k": sample()})
    records = {record["weight"]: record for record in trend.records()}
    assert records["layers.0.fc2.weight"]["output_ratio"] == [50.0, 100.0, 200.0]
    assert records["layers.0.fc2.weight"]["sigma_1"] == [2.0, 4.0, 8.0]
    assert records["layers.0.fc2.weight"]["selected"] == [False, False, True]
    assert records["layers.1.fc2.weight"]["pcdr_1"] == [None, None, None]
    summary = trend.summary()
    assert [item["worst_output_ratio"] for item in summary] == [50.0, 100.0, 200.0]
    assert [item["selected"] for item in summary] == [1, 1, 2] and summary[0]["median_pcdr_1"] == 0.1
    shown = text(trend.table(2, 140), 140)
    assert "50 → 100 → 200" in shown and "10k → 20k → 40k" in shown and "no → no → yes" in shown
    assert "layers.0.fc1" not in shown


def test_a_trend_may_lack_weights_in_some_checkpoints() -> None:
    first, second = sample(), sample(2.0)
    second.rows.append(row("head.weight"))
    del second.rows[0]
    records = {record["weight"]: record for record in Trend({"a": first, "b": second}).records()}
    assert records["head.weight"]["output_ratio"] == [None, 5.0]
    assert records["layers.0.fc1.weight"]["sigma_1"] == [3.0, None]
    assert text(Trend({"a": first, "b": second}).table(width=120), 120)


def test_a_trend_comes_back_from_json_and_the_report_reads_it(tmp_path: Path) -> None:
    trend = Trend({"before": sample(), "after": sample(4.0)})
    assert Trend.load(trend.save(tmp_path / "trend.json")) == trend
    assert [audit.label for audit in read_results(trend.to_json()).audits] == ["before", "after"]
    run = {"run": {}, "records": [], "audits": {"adamw": sample().to_json()}}
    assert list(Trend.from_json(run).audits) == ["adamw"]
    for content in ([], {}, {"audits": {}}, {"audits": [1]}):
        with pytest.raises(InputError, match="not audits of s2d"):
            Trend.from_json(content)


def test_the_picture_has_a_bar_a_weight_the_worst_first() -> None:
    lines = sample().picture(2).splitlines()
    assert len(lines) == 3 and "its 2 worst weights" in lines[0]
    assert lines[1].split()[0] == "layers.0.fc2.weight" and lines[1].endswith("  200") and lines[1].count("█") == 30
    assert lines[2].split()[0] == "layers.1.fc1.weight" and lines[2].endswith("  30") and 4 <= lines[2].count("█") <= 5
