"""Several checkpoints of one training, in its order: what grows, what decay took away, and what low bits make of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from s2d.report.formatting import percent, ratio, two_decimals
from s2d.report.results import Audit, Record
from s2d.report.summary import groups, label, primary

WEIGHTS = 6
_MEASURES = (
    # key, heading, of all weights, logarithmic, how a value is said
    ("output_ratio", "largest output / RMS, worst weight", max, True, ratio),
    ("sigma_over_median", "σ₁ / median σ, median over weights", statistics.median, False, ratio),
    ("pcdr_1", "PCDR₁, median over weights", statistics.median, False, two_decimals),
    ("w4a4_error", "W4A4 error, median over weights", statistics.median, False, percent),
)


def trend_figure(audits: Sequence[Audit], records: Sequence[Record]) -> dict[str, Any] | None:
    """Panels over the checkpoints: scores at every bit width where they were measured, then what the audits say."""
    if len(audits) < 2:
        return None
    names = [audit.label for audit in audits]
    panels = [*_score_panels(names, records)]
    for key, heading, over, logarithmic, write in _MEASURES:
        values = [[weight.values[key] for weight in audit.weights if key in weight.values] for audit in audits]
        line = [over(row) if row else None for row in values]
        if sum(value is not None for value in line) > 1:
            said = ", ".join(f"{n} {write(v)}" for n, v in zip(names, line, strict=True) if v is not None)
            panels.append(
                {
                    "heading": heading,
                    "logarithmic": logarithmic,
                    "series": [{"name": "", "values": line}],
                    "said": f"{heading}: {said}",
                }
            )
    counts = [sum(weight.selected for weight in audit.weights) for audit in audits]
    panels.append(
        {
            "heading": "weights whose outliers come from few components",
            "logarithmic": False,
            "series": [{"name": "", "values": counts}],
            "said": "flagged weights: " + ", ".join(f"{n} {c}" for n, c in zip(names, counts, strict=True)),
        }
    )
    panels += _worst(audits)
    return {"labels": [label(name) for name in names], "panels": panels}


def _score_panels(names: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
    """One per task and model, where the records' conditionings are the checkpoints' labels."""
    panels = []
    for group in primary(groups(record for record in records if record.conditioning in names)):
        if sum(name in group.conditionings for name in names) < 2:
            continue
        series = []
        for spec in group.specs:
            values = [group.values(name, spec) for name in names]
            line = [statistics.fmean(row) if row else None for row in values]
            series.append({"name": spec.upper(), "values": line})
        panels.append(
            {
                "heading": f"{group.metric}, {group.task}",
                "logarithmic": False,
                "series": series,
                "said": f"{group.metric} over the checkpoints, at {', '.join(spec.upper() for spec in group.specs)}",
            }
        )
    return panels


def _worst(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    """The weights whose outputs stand out most in any checkpoint, one line each."""
    peaks: dict[str, float] = {}
    for audit in audits:
        for weight in audit.weights:
            if "output_ratio" in weight.values:
                peaks[weight.name] = max(peaks.get(weight.name, 0.0), weight.values["output_ratio"])
    names = sorted(peaks, key=lambda name: peaks[name], reverse=True)[:WEIGHTS]
    series = []
    for name in names:
        rows = [audit.weight(name) for audit in audits]
        series.append({"name": name, "values": [row.values.get("output_ratio") if row else None for row in rows]})
    heading = "largest output / RMS, the worst weights"
    return [{"heading": heading, "logarithmic": True, "series": series, "said": f"{heading}: {', '.join(names)}"}]
