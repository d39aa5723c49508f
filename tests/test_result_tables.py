"""The tables of docs/results are those of the data beside them, and a page without data says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from tests.scripts import script

from s2d.report.schema import read_results

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted((DOCS / "results").glob("*.md"))
DATA = sorted((DOCS / "results").glob("*.json"))


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("docs/tables.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_script_writes_or_says_that_it_has_no_data(page: Path, tables: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text, page.parent) == text, "run: python docs/tables.py"
    assert tables.TABLE.search(text) or tables.is_without(text)
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(tables.TABLE.findall(text))


@pytest.mark.parametrize("file", DATA, ids=lambda file: file.name)
def test_data_have_the_schema_of_the_report_and_a_page(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert read_results(content).records
    assert content["run"]["command"] and content["run"]["versions"]["torch"]
    assert any(f"<!-- table: {file.name} " in page.read_text(encoding="utf-8") for page in PAGES)


RECORDS = [
    {"arm": arm, "spec": spec, "seed": seed, "value": value}
    for arm, spec, seed, value in (
        ("adamw", "fp32", 0, 90.0),
        ("adamw", "fp32", 1, 92.0),
        ("s2d", "fp32", 0, 90.5),
        ("adamw", "w4a4", 0, 50.0),
        ("s2d", "w4a4", 0, 1234.5),
        ("s2d", "w2|a2", 0, 0.00042),
        ("none", "fp32", 0, 1.0),
        ("s2d", "w8a8", 0, None),
    )
]


def test_a_table_averages_seeds_and_takes_differences(tables: ModuleType) -> None:
    options = {"rows": "spec", "columns": "arm", "arm": "adamw|s2d", "gain": "yes", "head": "bits"}
    made = tables.table_of(RECORDS, {**options, "names": "adamw: AdamW, s2d: AdamW + S2D"})
    assert made == [
        "| bits | AdamW | AdamW + S2D | gain |",
        "|---|---|---|---|",
        "| fp32 | 91.0 | 90.5 | -0.500 |",
        "| w4a4 | 50.0 | 1,234 | +1,184 |",
        "| w2\\|a2 |  | 4e-04 |  |",
    ]
    made = tables.table_of(RECORDS, {"rows": "arm", "columns": "spec", "spec": "fp32", "digits": "2", "spread": "yes"})
    assert made[2:] == ["| adamw | 91.00 ± 1.41 |", "| s2d | 90.50 |", "| none | 1.00 |"]


def test_a_failed_cell_says_so_and_costs_are_means_of_the_row(tables: ModuleType) -> None:
    common = {"spec": "w4a4", "peer": "one", "seed": 0}
    records = [
        {**common, "arm": "adamw", "value": 50.0, "seconds": 1.0},
        {**common, "arm": "s2d", "value": 60.0, "seconds": 2.0},
        {**common, "arm": "adamw", "peer": "two", "value": None, "failed": "no memory"},
        {**common, "arm": "s2d", "peer": "two", "value": 70.0, "seconds": 4.0},
    ]
    options = {"rows": "peer", "columns": "arm", "gain": "yes", "digits": "1", "also": "seconds", "names": "seconds: s"}
    assert tables.table_of(records, options) == [
        "| peer | adamw | s2d | gain | s |",
        "|---|---|---|---|---|",
        "| one | 50.0 | 60.0 | +10.0 | 1.50 |",
        "| two | failed | 70.0 |  | 4.00 |",
    ]
    shown = tables.table_of(records, {"rows": "peer", "columns": "spec", "shows": "failed", "names": "w4a4: why"})
    assert shown[2:] == ["| two | no memory |"]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("none.json rows=spec columns=arm", "there is no data file none.json"),
        ("data.json rows=spec", "KeyError"),
        ("data.json rows=spec columns=method", "KeyError"),
        ("data.json rows=spec columns=arm arm=x", "no record is left"),
        ("data.json rows", "ValueError"),
    ],
)
def test_a_marker_that_its_data_cannot_fill_is_refused(
    marker: str, message: str, tables: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"records": RECORDS}))
    with pytest.raises(tables.PageError, match=message):
        tables.filled(f"a\n<!-- table: {marker} -->\nold\n<!-- end -->\nb\n", tmp_path)


def test_a_table_waits_for_its_data(tables: ModuleType, tmp_path: Path) -> None:
    says = "No data file: nobody ran it."
    page = f"# A page\n\n{says}\n\n<!-- table: data.json rows=arm columns=spec -->\nold\n<!-- end -->\n"
    assert tables.filled(page, tmp_path) == page
    (tmp_path / "data.json").write_text(json.dumps({"records": RECORDS}))
    with pytest.raises(tables.PageError, match="remove the line that begins with 'No data file: '"):
        tables.filled(page, tmp_path)
    assert "| adamw | 91.0 |" in tables.filled(page.replace(says, ""), tmp_path)


def test_only_what_stands_between_the_marks_changes(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"records": RECORDS}))
    marker = '<!-- table: data.json rows=arm columns=spec head="an arm" spec=fp32 -->'
    text = f"before\n\n{marker}\n| old |\n<!-- end -->\n\nafter\n"
    new = tables.filled(text, tmp_path)
    assert new.startswith(f"before\n\n{marker}\n| an arm | fp32 |\n") and new.endswith(
        "| none | 1.00 |\n<!-- end -->\n\nafter\n"
    )
    assert tables.filled(new, tmp_path) == new
