"""Score against bits: one panel per calibration, with and without decay, the spread over seeds as a band."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from s2d.report import svg
from s2d.report.formatting import points
from s2d.report.summary import Group, label

# One panel, in drawing units. Narrow enough that its text stays readable at the width of a phone.
WIDTH, HEIGHT = 290.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 34.0, 6.0, 10.0, 28.0


def series_class(conditioning: str, names: Sequence[str]) -> str:
    """The CSS class that colours a conditioning: three that mean something, the others in turn."""
    fixed = {"none": "c-none", "adamw": "c-adamw", "s2d": "c-s2d"}
    if conditioning in fixed:
        return fixed[conditioning]
    others = [name for name in names if name not in fixed]
    return f"c-other{others.index(conditioning) % 3 + 1}"


def series_mark(conditioning: str, names: Sequence[str]) -> str:
    """The shape of a conditioning's points."""
    fixed = {"none": "square", "adamw": "triangle", "s2d": "circle"}
    return fixed.get(conditioning, svg.MARKS[(list(names).index(conditioning) + 3) % len(svg.MARKS)])


def bits_panels(group: Group) -> list[tuple[str, str]]:
    """(heading, drawing) pairs on one scale: the mean over all quantizers, then every quantizer by itself."""
    quantizers = group.quantizers
    values = [record.value for record in group.records if math.isfinite(record.value)]
    if not values:
        return []
    panels = [("Mean of all calibrations", None), *((name, name) for name in quantizers)] if len(quantizers) > 1 else []
    panels = panels or [(quantizers[0] if quantizers else group.metric, None)]
    domain, logarithmic = _domain(group, values)
    return [(heading, _bits_panel(group, quantizer, domain, logarithmic)) for heading, quantizer in panels]


def _domain(group: Group, values: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """The common vertical scale. Scores start at zero; a perplexity that explodes is drawn on a logarithmic scale."""
    low, high = min(values), max(values)
    if not group.higher_is_better and low > 0 and high / low > 20:
        return (low / 1.3, high * 1.3), True
    if low >= 0 and (group.higher_is_better or low < 0.5 * high):
        return (0.0, (100.0 if 60 < high <= 100 else high * 1.08) or 1.0), False
    margin = 0.08 * (high - low or abs(high) or 1.0)
    return (low - margin, high + margin), False


def _bits_panel(group: Group, quantizer: str | None, domain: tuple[float, float], logarithmic: bool) -> str:
    scale = svg.logarithmic if logarithmic else svg.linear
    y = scale(domain, (HEIGHT - BOTTOM, TOP))
    specs = group.specs
    inset = 20.0 if len(specs) > 1 else 0.0
    x = svg.linear((0, max(len(specs) - 1, 0)), (LEFT + inset, WIDTH - RIGHT - inset))
    parts = []
    for value in svg.decades(*domain) if logarithmic else svg.ticks(*domain):
        parts.append(svg.line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid"))
        parts.append(svg.text(LEFT - 6, y(value) + 4, svg.tick_label(value), "tick", "end"))
    for index, spec in enumerate(specs):
        parts.append(svg.text(x(index), HEIGHT - BOTTOM + 18, spec.upper(), "tick", "middle"))
    names = group.conditionings
    bands, lines = [], []
    for number, conditioning in enumerate(names):
        colour, shape = series_class(conditioning, names), series_mark(conditioning, names)
        rows = [
            (index, found) for index, spec in enumerate(specs) if (found := group.values(conditioning, spec, quantizer))
        ]
        if not rows:
            continue
        means = [(x(index), y(statistics.fmean(found))) for index, found in rows]
        if any(len(found) > 1 for _, found in rows) and len(rows) > 1:
            upper = [(x(index), y(max(found))) for index, found in rows]
            lower = [(x(index), y(min(found))) for index, found in rows]
            bands.append(svg.element("path", d=svg.points_path(upper + lower[::-1]) + "Z", class_=f"band {colour}"))
        lines.append(svg.element("path", d=svg.points_path(means), class_=f"series {colour}"))
        for (index, found), (_, height) in zip(rows, means, strict=True):
            mean = statistics.fmean(found)
            spread = f" ({points(min(found))} to {points(max(found))}, {len(found)} seeds)" if len(found) > 1 else ""
            tip = f"{label(conditioning)}, {specs[index].upper()}: {points(mean)}{spread}"
            lines.append(
                svg.mark(shape, x(index) + 1.5 * (number - (len(names) - 1) / 2), height, f"mark {colour}", tip)
            )
    said = "; ".join(f"{label(name)} {_in_words(group, name, quantizer)}" for name in names)
    return svg.drawing(WIDTH, HEIGHT, [*parts, *bands, *lines], f"{group.metric} by bit width. {said}")


def _in_words(group: Group, conditioning: str, quantizer: str | None) -> str:
    """A line of the panel for a screen reader."""
    found = ((spec, group.values(conditioning, spec, quantizer)) for spec in group.specs)
    return ", ".join(f"{spec.upper()} {points(statistics.fmean(values))}" for spec, values in found if values)
