"""The decay at work: singular values and outliers of the most decayed weights, refresh by refresh."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s2d.report import svg
from s2d.report.formatting import ratio, show
from s2d.report.results import Moment

WIDTH, HEIGHT = 460.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 40.0
SHOWN = 6  # as many as there are colours that everybody can tell apart


@dataclass(frozen=True)
class Track:
    """One weight over the refreshes, in order of steps."""

    weight: str
    moments: tuple[Moment, ...]
    style: str  # CSS class of its colour and dash

    def series(self, measure: str) -> list[tuple[float, float, bool]]:
        """(step, value, selected) where the measure was taken and can be drawn on a logarithmic scale."""
        values = ((moment.step, getattr(moment, measure), moment.selected) for moment in self.moments)
        return [(step, value, selected) for step, value, selected in values if math.isfinite(value) and value > 0]


def most_decayed(history: Sequence[Moment]) -> list[Track]:
    """The weights that were ever selected, those whose outliers fell by the largest factor first."""
    found: dict[str, list[Moment]] = defaultdict(list)
    for moment in history:
        found[moment.weight].append(moment)
    tracks = [
        Track(weight, tuple(sorted(moments, key=lambda moment: moment.step)), "")
        for weight, moments in found.items()
        if len(moments) > 1 and any(moment.selected for moment in moments)
    ]
    tracks.sort(key=_fall, reverse=True)
    return [Track(track.weight, track.moments, f"c-line{index}") for index, track in enumerate(tracks[:SHOWN], 1)]


def _fall(track: Track) -> float:
    """By which factor the outliers fell; the leading singular value where no outliers were logged."""
    series = track.series("ratio") or track.series("sigma")
    return series[0][1] / series[-1][1] if len(series) > 1 else 0.0


def history_panels(tracks: Sequence[Track]) -> list[tuple[str, str]]:
    """(heading, drawing) pairs: the leading singular value, and the outliers."""
    panels = []
    measures = (("sigma", "Leading singular value σ₁", show), ("ratio", "Largest output / RMS", ratio))
    for measure, heading, unit in measures:
        lines = [(track, series) for track in tracks if len(series := track.series(measure)) > 1]
        if lines:
            panels.append((heading, _panel(heading, lines, unit)))
    return panels


def _panel(
    heading: str, lines: Sequence[tuple[Track, list[tuple[float, float, bool]]]], unit: Callable[[float], str]
) -> str:
    steps = [step for _, series in lines for step, _, _ in series]
    values = [value for _, series in lines for _, value, _ in series]
    low, high = min(values) / 1.15, max(values) * 1.15
    x = svg.linear((min(steps), max(steps)), (LEFT, WIDTH - RIGHT))
    y = svg.logarithmic((low, high), (HEIGHT - BOTTOM, TOP))
    parts = []
    for value in _log_ticks(low, high):
        parts.append(svg.line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid"))
        parts.append(svg.text(LEFT - 6, y(value) + 4, svg.tick_label(value), "tick", "end"))
    for step in svg.ticks(min(steps), max(steps), 5):
        parts.append(svg.text(x(step), HEIGHT - BOTTOM + 16, svg.tick_label(step), "tick", "middle"))
    parts.append(svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "optimizer step", "tick", "middle"))
    said = []
    for track, series in lines:
        path = svg.points_path([(x(step), y(value)) for step, value, _ in series])
        words = f"{track.weight}: {unit(series[0][1])} to {unit(series[-1][1])}"
        parts.append(svg.element("path", svg.title(words), d=path, class_=f"series {track.style}"))
        for step, value, selected in series:
            if selected:
                tip = f"{track.weight}, step {svg.tick_label(step)}: {unit(value)}, selected"
                parts.append(svg.mark("circle", x(step), y(value), f"mark {track.style}", tip, 2.4))
        said.append(words)
    return svg.drawing(WIDTH, HEIGHT, parts, f"{heading} by optimizer step. " + "; ".join(said))


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten where the scale spans much, also 2 and 5 times those where less, even steps where little."""
    if high / low > 200:
        return svg.decades(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [tick for power in powers for factor in (1, 2, 5) if low <= (tick := factor * 10.0**power) <= high]
    return found if len(found) > 2 else svg.ticks(low, high, 4)
