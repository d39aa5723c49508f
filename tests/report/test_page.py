"""The whole page: what it holds, that it needs nothing from outside, and how it is written."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.report import sample

import s2d.report
from s2d.errors import InputError, MissingExtra
from s2d.report import render_report, write_report
from s2d.report.page import PLOTLY

VOID = {"meta", "link", "input", "wbr", "br"}


class Page(HTMLParser):
    """A page's elements with their attributes, and a check that every opened element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_a_run_page_is_whole() -> None:
    read = Page(render_report(sample.run()))
    words = " ".join(read.words)
    for heading in (
        "S2D helps at W4A4",
        "MRR@10 against bits",
        "recall@1 against bits",
        "Where the outliers are made",
        "One weight up close",
        "The decay at work",
        "All weights",
        "All records",
        "How it was made",
    ):
        assert heading in words
    assert "sha256:3f0c5a1e9b" in words and "versions.torch" in words
    assert sum("hidden" not in attributes for attributes in read.all("article")) == 1
    assert len(read.all("article")) == 37
    charts = [attributes for attributes in read.all("div") if attributes.get("data-chart")]
    assert len(charts) == 4 + 4 + 2 and all(attributes["aria-label"] for attributes in charts)


def test_an_audit_page_is_whole() -> None:
    read = Page(render_report(sample.audit()))
    words = " ".join(read.words)
    assert "A few singular values make this model's outliers" in words
    assert "against bits" not in words and "All records" not in words
    assert "open" in read.all("details")[0]


@pytest.mark.parametrize(
    "content",
    [
        sample.run(seeds=1, audits=False),
        sample.run(conditionings=("adamw",)),
        sample.trend(),
        [sample.audit("step 100"), sample.audit("step 200", shrink=3)],
        {"kind": "audit", "records": [{"weight": "w"}]},
        {"records": [{"task": "t", "conditioning": "none", "spec": "fp32", "metric": "x", "value": math.nan}]},
        {"records": [{"task": "t", "conditioning": "s2d-x", "spec": "w4a4", "metric": "x", "value": 0}]},
    ],
)
def test_partial_results_make_a_page(content: object) -> None:
    Page(render_report(content))


def test_the_page_asks_nothing_from_outside_and_runs_only_its_own_script() -> None:
    text = render_report(sample.run())
    read = Page(text)
    for _, attributes in read.found:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "action", "srcset"):
            assert (attributes.get(key) or "#").startswith(("#", "data:,"))
    ours = text.replace(library(), "")
    assert "url(" not in ours and "@import" not in ours and "http://" not in ours
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    wanted = " ".join(f"'sha256-{found}'" for found in hashes)
    (policy,) = [a["content"] or "" for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(scripts) == 3 and f"script-src {wanted};" in policy and "default-src 'none'" in policy


def library() -> str:
    return (Path(s2d.report.__file__).parent / PLOTLY[0]).read_text(encoding="utf-8")


def test_the_library_is_the_published_one_with_its_licence() -> None:
    assert hashlib.sha256(library().encode()).hexdigest() == PLOTLY[1]
    assert "plotly.js (basic - minified) v4.1.1" in library()
    assert "MIT" in (Path(s2d.report.__file__).parent / "vendor/LICENSE-plotly.txt").read_text()


def test_size_stays_between_one_and_three_megabytes() -> None:
    assert 1_000_000 < len(render_report(sample.run()).encode()) < 3_000_000


def test_a_trial_says_that_its_numbers_mean_nothing() -> None:
    content = sample.run()
    content["run"]["trial"] = True
    text = render_report(content)
    assert "<h1>Only a trial: these numbers mean nothing</h1>" in text and "S2D helps" not in text
    assert "<h1>Only a trial" not in render_report(sample.run())


def test_a_trend_page_is_whole() -> None:
    words = " ".join(Page(render_report(sample.trend())).words)
    assert (
        "From checkpoint to checkpoint" in words
        and "It learned more, and quantizes worse" in words
        and "53.5× → 214×" in words
    )
    assert "accuracy against bits" in words and "step 40" in words
    content = sample.trend() | {"records": []}
    assert "The outliers grew, the worst of them by 4.00×" in " ".join(Page(render_report(content)).words)
    content["audits"] = dict(reversed(content["audits"].items()))
    assert "The outliers shrank, the worst of them by 4.00×" in " ".join(Page(render_report(content)).words)


def test_the_same_results_give_the_same_page() -> None:
    assert render_report(sample.run()) == render_report(json.loads(json.dumps(sample.run())))


def test_writing_makes_folders_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "report.html"
    assert write_report(sample.audit(), target) == target
    first = target.read_text(encoding="utf-8")
    write_report(sample.audit("another"), target)
    assert target.read_text(encoding="utf-8") != first
    assert os.listdir(target.parent) == ["report.html"]


def test_a_failed_write_leaves_the_old_page_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(sample.audit(), target)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("place", ["folder", "file/report.html"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=place):
        write_report(sample.audit(), tmp_path / place)


def test_bad_results_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        write_report({"records": []}, tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


def test_without_jinja2_the_install_line_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"s2d\[report\]"):
        render_report(sample.audit())


def test_neither_import_nor_page_needs_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "from s2d.report import render_report\n"
        "render_report({'kind': 'audit', 'records': [{'weight': 'w', 'output_ratio': 3.0}]})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_page_says_which_rule_selected_a_weight() -> None:
    audit = sample.audit()
    chosen = [row for row in audit["records"] if row["selected"]]
    for row in chosen:
        row["selected_by"] = "data"
    words = " ".join(Page(render_report(audit)).words)
    assert "A few principal directions make this model's outliers" in words
    assert "not by singular components of the weight" in words and "selected (by its outputs' directions)" in words
    chosen[0]["selected_by"] = "weight"
    words = " ".join(Page(render_report(audit)).words)
    assert "A few singular values make" in words
    assert f"Of the {len(chosen)} selected weights, {len(chosen) - 1} are selected by principal directions" in words
