"""Rows a second by batch size, as one SVG: what `s2d bench --plot` draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = ("#3949ab", "#c62828", "#2e7d32", "#ef6c00", "#6a1b9a", "#00838f", "#5d4037", "#546e7a")
_LEFT, _TOP, _WIDE, _HIGH, _LEGEND = 64, 40, 520, 300, 22


def speed_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for every model, runtime and number of threads, on logarithmic axes.

    Args:
        rows: As `s2d.export.timing.Timing.to_dict` gives them, one or more.

    Returns:
        SVG, self-contained; names of models are text in it, whatever they hold.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        lines.setdefault(f"{row['model']}, {row['runtime']}, {threads}", []).append((row["batch"], row["per_second"]))
    batches = sorted({row["batch"] for row in rows})
    speeds = [row["per_second"] for row in rows]
    low, high = 10.0 ** math.floor(math.log10(min(speeds))), 10.0 ** math.ceil(math.log10(max(speeds)))
    high = high if high > low else low * 10.0

    def x(batch: int) -> float:
        first, last = math.log2(batches[0]), math.log2(batches[-1])
        return _LEFT + _WIDE * ((math.log2(batch) - first) / (last - first) if last > first else 0.5)

    def y(speed: float) -> float:
        return _TOP + _HIGH * (1.0 - math.log10(speed / low) / math.log10(high / low))

    parts = [text_at(_LEFT, 22, "rows a second, by rows at once", size=15)]
    tick = low
    while tick <= high * 1.001:
        parts.append(f'<path d="M{_LEFT} {y(tick):.1f}h{_WIDE}" stroke="#8884" fill="none"/>')
        parts.append(text_at(_LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end"))
        tick *= 10.0
    parts += [text_at(x(batch), _TOP + _HIGH + 20, str(batch), anchor="middle") for batch in batches]
    for index, (name, points) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        dash = "" if index < len(COLOURS) else ' stroke-dasharray="6 3"'
        path = " ".join(f"{x(batch):.1f},{y(speed):.1f}" for batch, speed in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x(b):.1f}" cy="{y(s):.1f}" r="3.5" fill="{colour}"/>' for b, s in points]
        line = _TOP + _HIGH + 48 + index * _LEGEND
        parts.append(f'<path d="M{_LEFT} {line - 4}h24" stroke="{colour}" stroke-width="3"{dash}/>')
        parts.append(text_at(_LEFT + 32, line, name))
    height = _TOP + _HIGH + 48 + len(lines) * _LEGEND
    width = _LEFT + _WIDE + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'font-family="system-ui, sans-serif"><title>Rows a second by batch size</title>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def text_at(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> str:
    """Words at a place of an SVG."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'
