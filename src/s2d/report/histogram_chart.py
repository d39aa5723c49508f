"""The picture that explains the idea: a distribution of activations with the 4-bit grid drawn over it.

A uniform quantizer spends its levels evenly between the smallest and the largest value. One outlier stretches that
grid, and nearly everything else falls on one or two levels. The values of neighbouring levels are filled in two
alternating tints, so one sees at a glance how many levels the bulk of the values has left.
"""

from __future__ import annotations

import math

from s2d.report import svg
from s2d.report.formatting import percent, show
from s2d.report.results import Histogram

WIDTH, HEIGHT = 420.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 10.0, 10.0, 10.0, 46.0
BULK = 0.999  # the share of the values that the close-up shows


def span(*histograms: Histogram) -> tuple[float, float]:
    """The range that holds every value and every level of all of them, for a common axis."""
    low = min(min(item.edges[0], item.grid[0]) for item in histograms)
    high = max(max(item.edges[-1], item.grid[-1]) for item in histograms)
    margin = 0.02 * (high - low)
    return (low - margin, high + margin)


def bulk(*histograms: Histogram) -> tuple[float, float] | None:
    """The range of the central 99.9 % of the values of all; None where the bins are too wide to look that close."""
    low = min(item.quantile((1 - BULK) / 2) for item in histograms)
    high = max(item.quantile((1 + BULK) / 2) for item in histograms)
    full = span(*histograms)
    if high - low > 0.6 * (full[1] - full[0]):
        return None
    fine = all(sum(low <= edge <= high for edge in item.edges) >= 10 for item in histograms)
    margin = 0.04 * (high - low)
    return (low - margin, high + margin) if fine else None


def histogram_drawing(histogram: Histogram, window: tuple[float, float], label: str) -> str:
    """One distribution over one window of values.

    Heights are densities on a logarithmic scale, so single outliers stay visible.
    """
    bins = [
        (max(left, window[0]), min(right, window[1]), count / (right - left))
        for left, right, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
        if right > window[0] and left < window[1]
    ]
    seen = [density for _, _, density in bins if density > 0]
    if not seen:
        return ""
    everywhere = [
        count / (b - a)
        for a, b, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
        if count > 0
    ]
    y = svg.logarithmic((min(everywhere) / 3, max(everywhere) * 1.6), (HEIGHT - BOTTOM, TOP))
    x = svg.linear(window, (LEFT, WIDTH - RIGHT))
    floor = HEIGHT - BOTTOM
    parts = []
    for index, (low, high) in enumerate(histogram.cells()):
        area = "".join(
            f"M{svg.number(x(max(left, low)))} {svg.number(floor)}V{svg.number(y(density))}"
            f"H{svg.number(x(min(right, high)))}V{svg.number(floor)}Z"
            for left, right, density in bins
            if density > 0 and min(right, high) > max(left, low)
        )
        if area:
            share = histogram.mass(low, high) / sum(histogram.counts)
            tip = f"level {index + 1}, {show(histogram.grid[index])}: {_share(share)} of the values"
            parts.append(svg.element("path", svg.title(tip), d=area, class_=f"cell-{index % 2}"))
    inside = [level for level in histogram.grid if window[0] <= level <= window[1]]
    for level in inside:
        parts.append(svg.line(x(level), TOP, x(level), floor + 7, "level"))
    parts.append(svg.line(LEFT, floor, WIDTH - RIGHT, floor, "axis"))
    for value in svg.ticks(*window, 6):
        parts.append(svg.text(x(value), floor + 20, svg.tick_label(value), "tick", "middle"))
    words = f"value of the activation · {len(inside)} of {len(histogram.grid)} levels in view"
    parts.append(svg.text(WIDTH / 2, HEIGHT - 6, words, "tick", "middle"))
    return svg.drawing(WIDTH, HEIGHT, parts, label, "chart histogram")


def _share(share: float) -> str:
    """A share of the values, with the small ones told apart from none."""
    return percent(share) if share >= 0.01 else ("less than 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %")


def caption(histogram: Histogram) -> str:
    """What the picture says, in words."""
    used, levels = histogram.levels_used(), len(histogram.grid)
    step = (histogram.grid[-1] - histogram.grid[0]) / (levels - 1)
    return (
        f"99 % of the values share {used} of the {levels} levels; neighbouring levels are {show(step)} apart, "
        f"and the middle half of the values spans {show(_middle_half(histogram))}."
    )


def _middle_half(histogram: Histogram) -> float:
    return math.fabs(histogram.quantile(0.75) - histogram.quantile(0.25))
