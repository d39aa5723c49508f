"""Histograms: a distribution of activations, and the levels of a 4-bit quantizer over it.

A uniform quantizer spends its levels evenly between the smallest and the largest value. One outlier stretches that
grid, and nearly everything else falls on one or two levels. The values of neighbouring levels are filled in two
alternating tints, so one sees at a glance how many levels the bulk of the values has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s2d.report.formatting import show

if TYPE_CHECKING:
    from s2d.report.schema import Histogram

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


def pieces(histogram: Histogram) -> list[tuple[float, float, float, int]]:
    """The bins cut where the rounding changes: (left, right, values per unit, the level they are rounded to)."""
    cells = histogram.cells()
    found = []
    for left, right, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        if count <= 0:
            continue
        for level, (low, high) in enumerate(cells):
            a, b = max(left, low), min(right, high)
            if b > a:
                found.append((a, b, count / (right - left), level))
    return found


def histogram_figure(histogram: Histogram, window: tuple[float, float], name: str) -> dict[str, Any]:
    """One distribution: its pieces, the levels, what share of the values each takes, and the two windows."""
    total = sum(histogram.counts)
    return {
        "name": name,
        "of": histogram.of,
        "pieces": [[_short(a), _short(b), _short(density), level] for a, b, density, level in pieces(histogram)],
        "grid": [_short(level) for level in histogram.grid],
        "shares": [_short(histogram.mass(low, high) / total) for low, high in histogram.cells()],
        "window": window,
        "close": bulk(histogram),
        "caption": caption(histogram),
    }


def _short(value: float) -> float:
    """Six digits: more than a screen shows, less than JSON would write."""
    return float(f"{value:.6g}")


def caption(histogram: Histogram) -> str:
    """The caption of a histogram."""
    used, levels = histogram.levels_used(), len(histogram.grid)
    step = (histogram.grid[-1] - histogram.grid[0]) / (levels - 1)
    half = abs(histogram.quantile(0.75) - histogram.quantile(0.25))
    return (
        f"99 % of the values share {used} of the {levels} levels; neighbouring levels are {show(step)} apart, "
        f"and the middle half of the values spans {show(half)}."
    )


def chosen(histograms: Sequence[tuple[str, Histogram]], most: int = 4) -> list[tuple[str, Histogram]]:
    """The checkpoints whose histograms are shown: all if they are few, else the first and the last."""
    return list(histograms) if len(histograms) <= most else [histograms[0], histograms[-1]]
