"""The trend over the checkpoints of one training: outliers, the effect of the decay, and low-bit scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s2d.report.formatting import percent, points, ratio, two_decimals
from s2d.report.summary import Verdict, audit_change, groups, label, primary, target_spec, worst_weight

if TYPE_CHECKING:
    from s2d.report.schema import Audit, Record

WEIGHTS = 6
_MEASURES = (
    # key, heading, of all weights, logarithmic, how a value is said
    ("output_ratio", "worst output, max / RMS", max, True, ratio),
    ("sigma_over_median", "σ₁ / median σ, median weight", statistics.median, False, ratio),
    ("pcdr_1", "PCDR₁, median weight", statistics.median, False, two_decimals),
    ("w4a4_error", "W4A4 error, median weight", statistics.median, False, percent),
)


def trend_figure(audits: Sequence[Audit], records: Sequence[Record]) -> dict[str, Any] | None:
    """Panels over the checkpoints: scores at every bit width where they were measured, then the audits' measures."""
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
                    "percent": write is percent,
                    "series": [{"name": "", "values": line}],
                    "said": f"{heading}: {said}",
                }
            )
    counts = [sum(weight.selected for weight in audit.weights) for audit in audits]
    panels.append(
        {
            "heading": "weights flagged",
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
    heading = "the worst outputs, max / RMS"
    return [{"heading": heading, "logarithmic": True, "series": series, "said": f"{heading}: {', '.join(names)}"}]


def trend_verdict(audits: Sequence[Audit], records: Sequence[Record]) -> Verdict:
    """From the first checkpoint to the last: the worst outliers, the flagged weights, and the scores where measured."""
    first, last = audits[0], audits[-1]
    span = f"{label(first.label)} to {label(last.label)}"
    tiles: list[tuple[str, str]] = []
    growth = 1.0
    ends = [worst_weight(audit) for audit in (first, last)]
    if ends[0] and ends[1]:
        before, after = (end.values["output_ratio"] for end in ends if end)
        growth = after / before if before > 0 else 1.0
        tiles.append((f"{ratio(before)} → {ratio(after)}", f"worst output, largest / RMS · {span}"))
    counts = [sum(weight.selected for weight in audit.weights) for audit in (first, last)]
    tiles.append((f"{counts[0]} → {counts[1]}", f"of {len(last.weights)} weights with outliers of few components"))
    names = (first.label, last.label)
    paradox = False
    for group in primary(groups(record for record in records if record.conditioning in names)):
        sign = 1 if group.higher_is_better else -1
        changes = {}
        for spec in dict.fromkeys(("fp32", target_spec(group))):
            rows = [group.values(name, spec) for name in names]
            if all(rows):
                start, end = (statistics.fmean(row) for row in rows)
                changes[spec] = sign * (end - start)
                tiles.append((f"{points(start)} → {points(end)}", f"{group.metric} at {spec.upper()} · {span}"))
        paradox = paradox or (changes.get("fp32", 0) > 0 > changes.get(target_spec(group), 0))
    if paradox:
        return Verdict("It learned more, and quantizes worse", "bad", tuple(tiles), audit_change(audits))
    if 0.8 < growth < 1.25:
        return Verdict("The worst outliers hardly changed", "plain", tuple(tiles), audit_change(audits))
    headline, tone = ("The outliers grew", "bad") if growth > 1 else ("The outliers shrank", "good")
    times = growth if growth > 1 else 1 / growth
    return Verdict(f"{headline}, the worst of them by {ratio(times)}", tone, tuple(tiles), audit_change(audits))
