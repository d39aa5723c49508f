"""From results to one HTML page: gathers the parts, fills the template, writes the file whole or not at all."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from s2d.errors import require
from s2d.report import histogram_chart, layermap, svg
from s2d.report.charts import bits_panels, series_class, series_mark
from s2d.report.formatting import MISSING, percent, points, ratio, show, signed
from s2d.report.history_chart import history_panels, most_decayed
from s2d.report.results import JSON, Audit, Record, Results, Weight, read_results, visible
from s2d.report.summary import (
    Group,
    audit_change,
    audit_verdict,
    gain,
    groups,
    label,
    mean_and_spread,
    primary,
    rivals,
    run_verdict,
    worst_weight,
)
from s2d.results import write_atomic

PICTURED = 24  # histograms are the heaviest part of the page: this many of the worst weights have theirs

_COLUMNS = (
    # heading, key of the value or attribute, how it is written
    ("σ₁", "sigma_1", show),
    ("σ₂", "sigma_2", show),
    ("σ₃", "sigma_3", show),
    ("σ₁ / median", "sigma_over_median", ratio),
    ("stable rank", "stable_rank", show),
    ("PCDR₁", "pcdr_1", show),
    ("PCDR₂", "pcdr_2", show),
    ("PCDR₃", "pcdr_3", show),
    ("PCDR₁ (data)", "pcdr_data_1", show),
    ("PCDR₃ (data)", "pcdr_data_3", show),
    ("output max", "output_max", show),
    ("output max / RMS", "output_ratio", ratio),
    ("input max", "input_max", show),
    ("input max / RMS", "input_ratio", ratio),
    ("W4A4 error", "w4a4_error", percent),
)


def render_report(results: object) -> str:
    """The HTML page of one results dict or of a list of them (see the package's first page for what is read).

    Raises:
        InputError: It is not a results file of s2d, or holds no record.
        MissingExtra: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report")
    markup = jinja2.utils.markupsafe.Markup
    read = read_results(results)
    read = dataclasses.replace(
        read, audits=tuple(dataclasses.replace(audit, label=label(audit.label)) for audit in read.audits)
    )
    script, style = _asset("report.js"), _asset("report.css")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["drawing"] = markup  # svg.py has escaped every word in it
    page = environment.from_string(_asset("report.html.j2"))
    return page.render(
        **_context(read),
        style=markup(style),
        script=markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_report(results: object, path: str | os.PathLike[str]) -> Path:
    """Write the page to ``path``: complete, or not at all. Missing folders are made.

    Returns:
        The path written.

    Raises:
        InputError: As for `render_report`, or ``path`` cannot be written.
    """
    page = render_report(results).encode("utf-8")

    def write(file: BinaryIO) -> None:
        file.write(page)

    return write_atomic(path, write)


def _asset(name: str) -> str:
    return (importlib.resources.files("s2d.report") / "templates" / name).read_text(encoding="utf-8")


def _context(results: Results) -> dict[str, Any]:
    found = groups(results.records)
    verdict = run_verdict(found) if found else audit_verdict(results.audits)
    first = primary(found)
    tracks = most_decayed(results.history)
    models = dict.fromkeys([*(group.model for group in found), *(audit.model for audit in results.audits)])
    return {
        "title": ", ".join(model for model in models if model) or "s2d",
        "kind": "run" if found else "audit",
        "verdict": verdict,
        "extra": audit_change(results.audits) if found else (),
        "groups": [_group(group, group in first) for group in found],
        "audits": results.audits,
        "layers": layermap.layers(results.audits),
        "gradient": layermap.gradient(),
        "weights": _weights(results.audits),
        "columns": [(heading, key) for heading, key, _ in _used_columns(results.audits)],
        "audit_rows": _audit_rows(results.audits),
        "records": [_record_row(record) for record in results.records],
        "history": history_panels(tracks),
        "history_names": [(track.style, track.weight) for track in tracks],
        "runs": [_flat(run) for run in _distinct_runs(results)],
    }


def _group(group: Group, judged: bool) -> dict[str, Any]:
    names = group.conditionings
    return {
        "judged": judged,
        "task": group.task,
        "model": group.model,
        "metric": group.metric,
        "direction": "higher is better" if group.higher_is_better else "lower is better",
        "legend": [(_key(series_mark(name, names), series_class(name, names)), label(name)) for name in names],
        "panels": bits_panels(group),
        "spread": any(len(group.values(name, spec)) > 1 for name in names for spec in group.specs),
        "specs": [spec.upper() for spec in group.specs],
        "blocks": _pivot(group),
    }


def _key(shape: str, colour: str) -> str:
    """A line of the legend, as a small drawing."""
    line = svg.line(0, 8, 26, 8, f"series {colour}")
    return svg.element(
        "svg", line + svg.mark(shape, 13, 8, f"mark {colour}"), viewBox="0 0 26 16", class_="key", aria_hidden="true"
    )


def _pivot(group: Group) -> list[tuple[str, list[dict[str, Any]]]]:
    """(calibration, rows) blocks of the table: a row per conditioning, and the paired difference below them."""
    quantizers = group.quantizers
    blocks: list[tuple[str, Group]] = [("mean of all calibrations", group)] if len(quantizers) > 1 else []
    blocks += [(quantizer, _only(group, quantizer)) for quantizer in quantizers] or [("", group)]
    result = []
    for heading, part in blocks:
        rows = []
        for name in part.conditionings:
            cells = [mean_and_spread(part.values(name, spec)) for spec in group.specs]
            rows.append({"name": label(name), "cells": cells, "difference": False})
        if rivals(part) is not None:
            differences = [gain(part, spec) for spec in group.specs]
            cells = [(MISSING if found is None else signed(found.mean), "") for found in differences]
            rows.append({"name": "gain", "cells": cells, "difference": True})
        result.append((heading, rows))
    return result


def _only(group: Group, quantizer: str) -> Group:
    kept = tuple(record for record in group.records if record.quantizer in ("", quantizer))
    return Group(group.task, group.model, group.metric, kept)


def _used_columns(audits: Sequence[Audit]) -> list[tuple[str, str, Any]]:
    present = {key for audit in audits for weight in audit.weights for key in weight.values}
    return [column for column in _COLUMNS if column[1] in present]


def _audit_rows(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    columns = _used_columns(audits)
    return [
        {"audit": audit.label, "weight": weight, "cells": [_cell(weight, key, write) for _, key, write in columns]}
        for audit in audits
        for weight in audit.weights
    ]


def _cell(weight: Weight, key: str, write: Any) -> tuple[str, str]:
    """(what is shown, what is sorted by)."""
    value = weight.values.get(key, math.nan)
    return write(value), "" if math.isnan(value) else repr(value)


def _weights(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    """The close-ups: every weight once, with its rows from all checkpoints; the worst one is shown first."""
    if not audits:
        return []
    names = list(dict.fromkeys(weight.name for audit in audits for weight in audit.weights))
    found = {name: [(audit.label, audit.weight(name)) for audit in audits] for name in names}
    pictured = [name for name in names if any(weight and weight.histogram for _, weight in found[name])]
    severity = {name: _severity([weight for _, weight in found[name] if weight]) for name in names}
    pictured = sorted(pictured, key=lambda name: severity[name], reverse=True)[:PICTURED]
    worst = worst_weight(audits[0])
    first = pictured[0] if pictured else (worst.name if worst else names[0] if names else "")
    return [_close_up(name, found[name], name in pictured, name == first, _used_columns(audits)) for name in names]


def _severity(rows: Sequence[Weight]) -> tuple[bool, float]:
    worst = max((row.values.get("output_ratio", 0.0) for row in rows), default=0.0)
    return (any(row.selected for row in rows), worst)


def _close_up(
    name: str, rows: Sequence[tuple[str, Weight | None]], pictured: bool, shown: bool, columns: Any
) -> dict[str, Any]:
    present = [(checkpoint, weight) for checkpoint, weight in rows if weight is not None]
    pictures = []
    drawn = [(checkpoint, weight.histogram) for checkpoint, weight in present if weight.histogram] if pictured else []
    if drawn:
        window = histogram_chart.span(*(histogram for _, histogram in drawn))
        for checkpoint, histogram in drawn:
            words = histogram_chart.caption(histogram)
            whose = f"{checkpoint}: {histogram.of} of {name}"
            close = histogram_chart.bulk(histogram)
            pictures.append(
                {
                    "label": checkpoint,
                    "of": histogram.of,
                    "levels": len(histogram.grid),
                    "full": histogram_chart.histogram_drawing(histogram, window, f"{whose}, all values. {words}"),
                    "close": histogram_chart.histogram_drawing(histogram, close, f"{whose}, the middle 99.9 %")
                    if close
                    else "",
                    "caption": words,
                }
            )
    table = [
        (heading, [write(weight.values.get(key, math.nan)) for _, weight in present])
        for heading, key, write in columns
        if any(key in weight.values for _, weight in present)
    ]
    return {
        "name": name,
        "shown": shown,
        "shape": present[0][1].shape if present else "",
        "labels": [checkpoint for checkpoint, _ in present],
        "selected": [_decay_words(weight) for _, weight in present],
        "table": table,
        "pictures": pictures,
    }


def _decay_words(weight: Weight) -> str:
    rule = {"data": " (by its outputs' directions)", "weight": " (by its singular values)"}.get(weight.selected_by, "")
    return f"selected{rule}" if weight.selected else "not selected"


def _record_row(record: Record) -> dict[str, Any]:
    seconds, memory = (record.raw.get(key) for key in ("seconds", "peak_mb"))
    return {
        "record": record,
        "conditioning": label(record.conditioning),
        "value": points(record.value),
        "sort": "" if math.isnan(record.value) else repr(record.value),
        "seconds": show(float(seconds)) if isinstance(seconds, (int, float)) else MISSING,
        "memory": show(float(memory)) if isinstance(memory, (int, float)) else MISSING,
    }


def _distinct_runs(results: Results) -> list[JSON]:
    """Every "run" part once; an audit inside a run usually repeats that run's."""
    found: list[JSON] = []
    for run in [*results.runs, *(audit.run for audit in results.audits)]:
        if run and run not in found:
            found.append(run)
    return found


def _flat(run: JSON, prefix: str = "") -> list[tuple[str, str]]:
    """(key, value) lines of a run's configuration; nested objects become dotted keys, lists one line."""
    lines: list[tuple[str, str]] = []
    for key, value in run.items():
        name = f"{prefix}{visible(key)}"
        if isinstance(value, dict):
            lines += _flat(value, f"{name}.")
        elif isinstance(value, list):
            lines.append((name, visible(json.dumps(value, ensure_ascii=False, default=str)[1:-1])))
        elif isinstance(value, str):
            lines.append((name, visible(value)))
        else:
            lines.append((name, visible(json.dumps(value, default=str))))
    return lines
