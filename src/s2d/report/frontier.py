"""The frontier of promises as one SVG: what every file loses, against its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from s2d.report.speeds import COLOURS, text_at

if TYPE_CHECKING:
    from s2d.report.schema import Promised, PromisedFile

_LEFT, _TOP, _WIDE, _HIGH, _LEGEND = 64, 40, 520, 300, 22


def frontier_plot(promises: Mapping[str, Promised]) -> str:
    """A point for every file that was judged, with the bound of its drop, and a line at what may be lost.

    Args:
        promises: Verdicts by the name of their model; one or more. A filled point is an accepted file, a square one the
            result. Milliseconds stand beside the points.

    Returns:
        SVG, self-contained, or empty without a file that can be drawn; names are text in it, whatever they hold.
    """
    drawn = {name: [file for file in each.frontier if _finite(file)] for name, each in promises.items()}
    files = [file for members in drawn.values() for file in members]
    if not files:
        return ""
    sizes = [file.bytes / 1e6 for file in files]
    limits = [each.within for each in promises.values() if math.isfinite(each.within)]
    top = max([*(file.drop.upper for file in files), *limits, 0.1]) * 1.1
    bottom = min([*(file.drop.points for file in files), 0.0]) * 1.1
    left, right = 0.9 * min(sizes), 1.1 * max(sizes)

    def x(size: float) -> float:
        return _LEFT + _WIDE * (size - left) / (right - left)

    def y(lost: float) -> float:
        return _TOP + _HIGH * (top - lost) / (top - bottom)

    parts = [text_at(_LEFT, 22, "points lost (bar: at most, 95 %), by MB", size=15)]
    for lost in (bottom, 0.0, top):
        parts.append(f'<path d="M{_LEFT} {y(lost):.1f}h{_WIDE}" stroke="#8884" fill="none"/>')
        parts.append(text_at(_LEFT - 8, y(lost) + 4, f"{lost:.2f}", anchor="end"))
    parts += [text_at(x(size), _TOP + _HIGH + 20, f"{size:.3g}", anchor="middle") for size in sorted({*sizes})]
    for limit in sorted({*limits}):
        parts.append(f'<path d="M{_LEFT} {y(limit):.1f}h{_WIDE}" stroke="#c62828" stroke-dasharray="6 3" fill="none"/>')
        parts.append(text_at(_LEFT + _WIDE, y(limit) - 6, f"promised: {limit:g}", anchor="end"))
    for index, (name, members) in enumerate(drawn.items()):
        colour = COLOURS[index % len(COLOURS)]
        for file in members:
            result = file is members[-1] and promises[name].status == "MET"
            parts.append(_point(file, x(file.bytes / 1e6), y, colour, result))
        line = _TOP + _HIGH + 48 + index * _LEGEND
        parts.append(f'<path d="M{_LEFT} {line - 4}h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(text_at(_LEFT + 32, line, f"{name}: {promises[name].status}, {promises[name].runtime}"))
    height, width = _TOP + _HIGH + 48 + len(drawn) * _LEGEND, _LEFT + _WIDE + 48
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'font-family="system-ui, sans-serif"><title>Points lost by size of the file</title>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _finite(file: PromisedFile) -> bool:
    return file.bytes > 0 and all(map(math.isfinite, (file.bytes, file.drop.points, file.drop.upper)))


def _point(file: PromisedFile, at: float, y: Callable[[float], float], colour: str, result: bool) -> str:
    middle, fill = y(file.drop.points), colour if file.accepted else "#fff"
    bar = f'<path d="M{at:.1f} {middle:.1f}V{y(file.drop.upper):.1f}" stroke="{colour}" fill="none"/>'
    style = f'fill="{fill}" stroke="{colour}" stroke-width="2"'
    shape = f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="4" {style}/>'
    if result:
        shape = f'<rect x="{at - 5:.1f}" y="{middle - 5:.1f}" width="10" height="10" {style}/>'
    time = text_at(at + 8, middle + 4, f"{file.ms:.1f} ms") if math.isfinite(file.ms) else ""
    return bar + shape + time
