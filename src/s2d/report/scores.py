"""Score against bits: one panel per calibration, with and without decay, the spread over seeds as a band."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from s2d.report.formatting import points
from s2d.report.summary import Group, label

# Colour (a variable of the style sheet), dash and mark: a conditioning looks the same on the whole page, and no two
# differ by colour alone.
_STYLES = {
    "none": ("--none", "dot", "square"),
    "adamw": ("--adamw", "dash", "triangle-up"),
    "s2d": ("--s2d", "solid", "circle"),
}
_OTHERS = (
    ("--other1", "longdash", "diamond"),
    ("--other2", "dashdot", "cross"),
    ("--other3", "longdashdot", "x"),
)


def style(name: str, names: Sequence[str]) -> dict[str, str]:
    """How a conditioning or a checkpoint is drawn among its neighbours."""
    kinds = [other.partition(" (")[0] for other in names]
    kind = name.partition(" (")[0]
    if name in _STYLES or (kind in _STYLES and kinds.count(kind) == 1):
        colour, dash, symbol = _STYLES[kind]
    else:
        others = [other for other in names if other not in _STYLES]  # two decays of one model among them
        colour, dash, symbol = _OTHERS[others.index(name) % len(_OTHERS)]
    return {"colour": colour, "dash": dash, "symbol": symbol}


def score_figure(group: Group) -> dict[str, Any] | None:
    """The panels on one vertical scale: the mean over all quantizers, then every quantizer by itself."""
    quantizers = group.quantizers
    values = [record.value for record in group.records if math.isfinite(record.value)]
    if not values or len(group.specs) < 2:
        return None  # one width makes no curve; the table shows it
    panels = [("mean of all calibrations", None), *((name, name) for name in quantizers)] if len(quantizers) > 1 else []
    panels = panels or [(quantizers[0] if quantizers else "", None)]
    scale, logarithmic = _scale(group, values)
    return {
        "metric": group.metric,
        "specs": [spec.upper() for spec in group.specs],
        "range": scale,
        "logarithmic": logarithmic,
        "panels": [_panel(group, heading, quantizer) for heading, quantizer in panels],
    }


def _scale(group: Group, values: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """The common vertical scale. Scores start at zero; a perplexity that explodes is drawn on a logarithmic scale."""
    low, high = min(values), max(values)
    if not group.higher_is_better and low > 0 and high / low > 20:
        return (low / 1.3, high * 1.3), True
    if low >= 0 and (group.higher_is_better or low < 0.5 * high):
        return (0.0, (103.0 if 90 < high <= 100 else high * 1.08) or 1.0), False
    margin = 0.08 * (high - low or abs(high) or 1.0)
    return (low - margin, high + margin), False


def _panel(group: Group, heading: str, quantizer: str | None) -> dict[str, Any]:
    names = group.conditionings
    series = []
    for name in names:
        rows = [group.values(name, spec, quantizer) for spec in group.specs]
        if any(rows):
            series.append(
                {
                    "name": label(name),
                    **style(name, names),
                    "mean": [statistics.fmean(row) if row else None for row in rows],
                    "low": [min(row) if row else None for row in rows],
                    "high": [max(row) if row else None for row in rows],
                    "seeds": [len(row) for row in rows],
                }
            )
    said = "; ".join(f"{label(name)} {_in_words(group, name, quantizer)}" for name in names)
    return {"heading": heading, "series": series, "said": f"{group.metric} by bit width. {said}"}


def _in_words(group: Group, conditioning: str, quantizer: str | None) -> str:
    """A line of the panel for a screen reader."""
    found = ((spec, group.values(conditioning, spec, quantizer)) for spec in group.specs)
    return ", ".join(f"{spec.upper()} {points(statistics.fmean(values))}" for spec, values in found if values)
