"""The figure of promises: every file is there, and so is what was promised; names are only text."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from s2d.report.frontier import frontier_plot
from s2d.report.page import render_report
from s2d.report.schema import read_results

SVG = "{http://www.w3.org/2000/svg}"


def results(name: str = "s2d-0") -> dict[str, Any]:
    def file(label: str, size: int, points: float, accepted: bool) -> dict[str, Any]:
        drop = {"points": points, "upper": points + 0.5, "lower": points - 0.5}
        return {"name": label, "bytes": size, "ms": 2.5, "drop": drop, "accepted": accepted}

    frontier = [file("w4a8", 5_000_000, 3.0, False), file("w8a8", 9_000_000, 0.1, True)]
    verdict = {"status": "MET", "runtime": "onnxruntime", "within": 1.0, "metric": "accuracy", "file": f"{name}.onnx"}
    record = {"task": "t", "conditioning": "s2d", "spec": "fp32", "metric": "accuracy", "value": 90.0}
    return {"records": [record], "promises": {name: {**verdict, "frontier": frontier}}}


def test_a_point_for_every_file_and_a_line_at_the_promise() -> None:
    read = read_results(results())
    drawn = ElementTree.fromstring(frontier_plot(read.promises))
    (circle,), squares = drawn.iter(f"{SVG}circle"), [r for r in drawn.iter(f"{SVG}rect") if r.get("width") == "10"]
    (square,) = squares  # the result
    assert circle.get("fill") == "#fff" != square.get("fill"), "only accepted files are filled"
    assert float(circle.get("cx") or 0) < float(square.get("x") or 0), "the smaller file is on the left"
    assert float(circle.get("cy") or 0) < float(square.get("y") or 0), "what loses more is higher"
    texts = [each.text for each in drawn.iter(f"{SVG}text")]
    assert "promised: 1" in texts and "s2d-0: MET, onnxruntime" in texts and texts.count("2.5 ms") == 2
    assert frontier_plot({}) == ""


def test_the_page_has_the_figure_and_every_file_and_hostile_names_are_words() -> None:
    page = render_report(results("<script>alert(1)</script>"))
    assert "promised: 1" in page and "w4a8" in page and "<script>alert(1)" not in page
    assert "Files that keep the accuracy" not in render_report({"records": results()["records"]})
    broken = results()
    broken["promises"]["s2d-0"]["frontier"][0].update(bytes="many", ms=None)
    assert "w8a8" in render_report(broken)
