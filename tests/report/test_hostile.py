"""Names of models, layers and tasks come from files that anybody may have made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.report import sample
from tests.report.test_page import Page

from s2d.report import render_report

HOSTILE = (
    "</script><img src=x onerror=alert(3)><!--<script>alert(1)</script>"
    "\"' onmouseover='alert(2)' </svg></style>{{ 7*7 }}{% raw %}\x1b[31m\u202e"
)


def everywhere(content: Any, replace: Callable[[str], str]) -> Any:
    """The results with every string value replaced, and the keys of free-form objects too."""
    if isinstance(content, dict):
        return {key: everywhere(value, replace) for key, value in content.items()}
    if isinstance(content, list):
        return [everywhere(item, replace) for item in content]
    return replace(content) if isinstance(content, str) else content


def attack(text: str) -> str:
    return text if text in ("audit", "trend", "fp32", "w4a4", "adamw", "s2d") else text + HOSTILE


def check(text: str) -> None:
    read = Page(text)
    assert len(read.all("script")) == 4  # the data, the library, the page's own two
    assert not read.all("img")
    assert not any(key.startswith("on") for _, attributes in read.found for key in attributes)
    assert "alert(1)" in " ".join(read.words)  # shown as words
    assert "{{ 7*7 }}" in " ".join(read.words)  # and not run as a template
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31m" in text


def test_hostile_strings_in_a_run_are_only_words() -> None:
    content = everywhere(sample.run(), attack)
    content["audits"] = {key + HOSTILE: audit for key, audit in content["audits"].items()}
    content["run"][HOSTILE] = {HOSTILE: [HOSTILE]}
    check(render_report(content))


def test_hostile_strings_in_an_audit_are_only_words() -> None:
    check(render_report(everywhere(sample.audit(), attack)))


def test_hostile_strings_in_a_trend_are_only_words() -> None:
    content = everywhere(sample.trend(), attack)
    content["audits"] = {key + HOSTILE: audit for key, audit in content["audits"].items()}
    check(render_report(content))


def test_values_of_the_wrong_type_are_missing_values() -> None:
    content = sample.run()
    for record in content["records"]:
        record["seconds"], record["peak_mb"] = HOSTILE, [HOSTILE]
    content["records"][0]["value"] = HOSTILE
    Page(render_report(content))


def test_a_depth_that_is_absurd_is_drawn_as_one_row() -> None:
    rows = [
        {"weight": "w", "role": "fc1", "depth": 10**12, "output_ratio": 1e308},
        {"weight": "v", "depth": -1, "output_ratio": 0},
    ]
    Page(render_report({"kind": "audit", "records": rows}))
