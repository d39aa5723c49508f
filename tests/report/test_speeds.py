"""The plot of `s2d bench`: every line is there, higher is faster, and names are only text."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from s2d.report.speeds import speed_plot

SVG = "{http://www.w3.org/2000/svg}"


def row(model: str, batch: int, speed: float, threads: int = 1) -> dict[str, Any]:
    return {"model": model, "runtime": "torch", "threads": threads, "batch": batch, "per_second": speed}


def test_a_line_for_every_contestant_and_a_point_for_every_batch() -> None:
    rows = [row("slow", batch, 20.0 * batch) for batch in (1, 8, 32)]
    rows += [row("fast", batch, 60.0 * batch, threads=2) for batch in (1, 8, 32)]
    drawn = ElementTree.fromstring(speed_plot(rows))
    lines = [each.get("points", "").split() for each in drawn.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [3, 3] and len(list(drawn.iter(f"{SVG}circle"))) == 6
    places = [[tuple(map(float, point.split(","))) for point in points] for points in lines]
    assert all(fast[1] < slow[1] and fast[0] == slow[0] for slow, fast in zip(*places, strict=True))
    texts = [each.text for each in drawn.iter(f"{SVG}text")]
    assert "slow, torch, 1 thread" in texts and "fast, torch, 2 threads" in texts


def test_one_row_and_hostile_names() -> None:
    drawn = ElementTree.fromstring(speed_plot([row("<script>alert(1)</script>&", 4, 100.0)]))
    assert not list(drawn.iter(f"{SVG}script")) and len(list(drawn.iter(f"{SVG}circle"))) == 1
    assert any("<script>alert(1)</script>&, torch" in (each.text or "") for each in drawn.iter(f"{SVG}text"))
