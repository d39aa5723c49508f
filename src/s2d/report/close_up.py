"""The details of one weight: its measures in words and numbers, and the data of its charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from s2d.report.formatting import percent, ratio, show, two_decimals
from s2d.report.histograms import caption, chosen, histogram_figure, span
from s2d.report.histories import Track, track_figure
from s2d.report.scores import style
from s2d.report.summary import LABELS, worst_weight

if TYPE_CHECKING:
    from s2d.report.schema import Audit, Weight

    Found = list[tuple[str, Weight]]  # (checkpoint, its row)

COLUMNS = (
    # heading, key of the value, how it is written
    ("σ₁", "sigma_1", show),
    ("σ₂", "sigma_2", show),
    ("σ₃", "sigma_3", show),
    ("σ₁ / median", "sigma_over_median", ratio),
    ("stable rank", "stable_rank", show),
    ("PCDR₁", "pcdr_1", two_decimals),
    ("PCDR₂", "pcdr_2", two_decimals),
    ("PCDR₃", "pcdr_3", two_decimals),
    ("PCDR₁ (data)", "pcdr_data_1", two_decimals),
    ("PCDR₃ (data)", "pcdr_data_3", two_decimals),
    ("output max", "output_max", show),
    ("output max / RMS", "output_ratio", ratio),
    ("input max", "input_max", show),
    ("input max / RMS", "input_ratio", ratio),
    ("W4A4 error", "w4a4_error", percent),
)


def used_columns(audits: Sequence[Audit]) -> list[tuple[str, str, Any]]:
    """The columns that some weight has a value for."""
    present = {key for audit in audits for weight in audit.weights for key in weight.values}
    return [column for column in COLUMNS if column[1] in present]


def cell(weight: Weight, key: str, write: Any) -> tuple[str, str]:
    """(what is shown, what is sorted by)."""
    value = weight.values.get(key, math.nan)
    return write(value), "" if math.isnan(value) else repr(value)


def close_ups(audits: Sequence[Audit], told: Mapping[str, Track]) -> list[dict[str, Any]]:
    """Every weight once, with its rows from all checkpoints; the worst one that has a picture is shown first."""
    found = _rows(audits)
    pictured = [name for name, rows in found.items() if any(weight.histogram for _, weight in rows)]
    worst = worst_weight(audits[0]) if audits else None
    otherwise = worst.name if worst else next(iter(found), "")
    first = max(pictured, key=lambda name: _severity(found[name]), default=otherwise)
    columns = used_columns(audits)
    return [_close_up(name, rows, columns, name == first, name in told) for name, rows in found.items()]


def _rows(audits: Sequence[Audit]) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for audit in audits:
        for weight in audit.weights:
            found.setdefault(weight.name, []).append((audit.label, weight))
    return found


def _severity(rows: Found) -> tuple[bool, float]:
    """A sort key: weights with a picture of every checkpoint first, then by the size of their outliers."""
    worst = max(max(weight.values.get(key, 0.0) for key in ("output_ratio", "input_ratio")) for _, weight in rows)
    return (all(weight.histogram for _, weight in rows), worst)


def _close_up(name: str, rows: Found, columns: Sequence[Any], shown: bool, history: bool) -> dict[str, Any]:
    table = [
        (heading, [write(weight.values.get(key, math.nan)) for _, weight in rows])
        for heading, key, write in columns
        if any(key in weight.values for _, weight in rows)
    ]
    return {
        "name": name,
        "shown": shown,
        "shape": rows[0][1].shape,
        "labels": [checkpoint for checkpoint, _ in rows],
        "selected": [_decay_words(weight) for _, weight in rows],
        "table": table,
        "captions": [(checkpoint, caption(weight.histogram)) for checkpoint, weight in rows if weight.histogram],
        "pictured": any(weight.histogram for _, weight in rows),
        "curves": any(weight.spectrum for _, weight in rows),
        "history": history,
    }


def _decay_words(weight: Weight) -> str:
    rule = {"data": " (by its outputs' directions)", "weight": " (by its singular values)"}.get(weight.selected_by, "")
    return f"selected{rule}" if weight.selected else "not selected"


def weight_figures(audits: Sequence[Audit], told: Mapping[str, Track]) -> dict[str, Any]:
    """The data of each weight's charts, by its name; weights that only the decay saw have only a history."""
    found = _rows(audits)
    labels = [audit.label for audit in audits]
    figures: dict[str, Any] = {}
    for name, rows in found.items():
        figures[name] = {
            "histograms": _histograms(rows),
            "spectra": [_spectrum(label, weight, labels) for label, weight in rows if weight.spectrum],
            "pcdr": [_pcdr(label, weight, labels) for label, weight in rows if "pcdr_1" in weight.values],
        }
    for name, track in told.items():
        figures.setdefault(name, {})["history"] = track_figure(track)
    return figures


def _histograms(rows: Found) -> list[dict[str, Any]]:
    pictures = chosen([(label, weight.histogram) for label, weight in rows if weight.histogram])
    if not pictures:
        return []
    window = span(*(histogram for _, histogram in pictures))
    return [histogram_figure(histogram, window, label) for label, histogram in pictures]


def _look(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """A run's arms look as they do everywhere on the page; the checkpoints of a training go from pale to strong."""
    if len(labels) > 3:
        return {"ramp": labels.index(label) / (len(labels) - 1), "dash": "solid", "symbol": "circle"}
    if len(labels) == 1:
        return {"colour": "--s2d", "dash": "solid", "symbol": "circle"}
    raw = {shown: name for name, shown in LABELS.items()}
    return style(raw.get(label, label), [raw.get(name, name) for name in labels])


def _spectrum(label: str, weight: Weight, labels: Sequence[str]) -> dict[str, Any]:
    ranks, values = zip(*((rank, value if value > 0 else None) for rank, value in weight.spectrum), strict=True)
    return {"name": label, **_look(label, labels), "rank": list(ranks), "sigma": list(values)}


def _pcdr(label: str, weight: Weight, labels: Sequence[str]) -> dict[str, Any]:
    def of(key: str) -> list[float | None]:
        values = (weight.values.get(f"{key}_{rank}") for rank in (1, 2, 3))
        return [None if value is None else round(value, 4) for value in values]

    return {"name": label, **_look(label, labels), "weight": of("pcdr"), "data": of("pcdr_data")}
