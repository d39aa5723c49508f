"""From results to one HTML page: gathers the parts, fills the template, writes the file atomically."""

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
from typing import TYPE_CHECKING, Any, BinaryIO

from s2d.errors import visible
from s2d.io.files import JSON, write_atomic
from s2d.optional import require
from s2d.report import layermap
from s2d.report.close_up import cell, close_ups, used_columns, weight_figures
from s2d.report.formatting import MISSING, points, show, signed, two_decimals
from s2d.report.frontier import frontier_plot
from s2d.report.histories import history_figure, most_decayed, tracks
from s2d.report.scores import score_figure
from s2d.report.summary import (
    Group,
    Verdict,
    audit_change,
    audit_verdict,
    gain,
    groups,
    label,
    mean_and_spread,
    primary,
    rivals,
    run_verdict,
)
from s2d.report.trend import trend_figure, trend_verdict

if TYPE_CHECKING:
    from s2d.report.schema import Audit, Promised, Record, Results

# The charting library, as it was published (plotly.js-basic-dist-min 4.1.1 on npm); its licence is beside it.
PLOTLY = ("vendor/plotly-basic.min.js", "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba")


def render_report(results: object) -> str:
    """The HTML page of one results dict or of a list of them (see the package's first page for what is read).

    Raises:
        InputError: It is not a results file of s2d, or holds no record.
        MissingExtra: jinja2 is not installed.
    """
    from s2d.report.schema import read_results

    jinja2 = require("jinja2", "report")
    markup = jinja2.utils.markupsafe.Markup
    read = read_results(results)
    read = dataclasses.replace(
        read, audits=tuple(dataclasses.replace(audit, label=label(audit.label)) for audit in read.audits)
    )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(_asset("templates/report.html.j2"))
    context, figures = _context(read)
    library, scripts = _asset(PLOTLY[0]), [_asset("templates/report.js"), _asset("templates/charts.js")]
    # The page's parser must not see a closing tag in Plotly's file; it has none.
    assert "</script" not in library.lower() and hashlib.sha256(library.encode()).hexdigest() == PLOTLY[1]
    scripts = [library, *scripts]
    return page.render(
        **context,
        frontier=markup(frontier_plot(read.promises)),
        data=markup(_as_script(figures)),
        style=markup(_asset("templates/report.css")),
        scripts=[markup(script) for script in scripts],
        script_hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def _as_script(figures: object) -> str:
    """JSON that may stand inside a script element: whatever a name says, it cannot end the element or begin another."""
    text = json.dumps(figures, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


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
    return importlib.resources.files("s2d.report").joinpath(*name.split("/")).read_text(encoding="utf-8")


def _context(results: Results) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of the template, and the data of the charts."""
    found = groups(results.records)
    first = primary(found)
    audits = results.audits
    told = tracks(results.history)
    history = history_figure(most_decayed(told))
    trend = trend_figure(audits, results.records) if results.trend else None
    compared = found if not results.trend else []
    context = {
        "title": _title(results, found),
        "kind": "trend" if results.trend else "run" if found else "audit",
        "verdict": _verdict(results, compared),
        "extra": audit_change(audits) if compared else (),
        "groups": [_group(group, group in first) for group in found],
        "promises": [(name, each, _promised_rows(each)) for name, each in results.promises.items()],
        "audits": audits,
        "trend": trend,
        "layers": layermap.layers(audits),
        "gradient": layermap.gradient(),
        "weights": close_ups(audits, told),
        "columns": [(heading, key) for heading, key, _ in used_columns(audits)],
        "audit_rows": _audit_rows(audits),
        "records": [_record_row(record) for record in results.records],
        "history": history,
        "runs": [{"summary": _said(name, run), "lines": _flat(run)} for name, run in _distinct_runs(results)],
    }
    figures = {
        "scores": [] if results.trend else [score_figure(group) for group in found],
        "trend": trend,
        "history": history,
        "weights": weight_figures(audits, told),
    }
    return context, figures


def _title(results: Results, found: Sequence[Group]) -> str:
    """The models; of a training, from which checkpoint to which."""
    models = [group.model for group in found] + [audit.model for audit in results.audits if not results.trend]
    names = ", ".join(dict.fromkeys(model for model in models if model))
    ends = [label(audit.label) for audit in (results.audits[0], results.audits[-1])] if results.trend else []
    return " · ".join(part for part in (names, " → ".join(ends)) if part) or "s2d"


def _verdict(results: Results, found: Sequence[Group]) -> Verdict:
    if results.trend and len(results.audits) > 1:
        verdict = trend_verdict(results.audits, results.records)
    else:
        verdict = run_verdict(found) if found else audit_verdict(results.audits)
    if not results.trial:
        return verdict
    words = "A tiny random model learned from made-up data for a few steps: the recipe runs from end to end, no more."
    return Verdict("Only a trial: these numbers mean nothing", "bad", (), (words,))


def _group(group: Group, judged: bool) -> dict[str, Any]:
    names = group.conditionings
    figure = score_figure(group)
    return {
        "judged": judged,
        "task": group.task,
        "model": group.model,
        "metric": group.metric,
        "direction": "higher is better" if group.higher_is_better else "lower is better",
        "panels": [] if figure is None else figure["panels"],
        "spread": any(len(group.values(name, spec)) > 1 for name in names for spec in group.specs),
        "specs": [spec.upper() for spec in group.specs],
        "blocks": _pivot(group),
    }


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


def _audit_rows(audits: Sequence[Audit]) -> list[dict[str, Any]]:
    columns = used_columns(audits)
    return [
        {"audit": audit.label, "weight": weight, "cells": [cell(weight, key, write) for _, key, write in columns]}
        for audit in audits
        for weight in audit.weights
    ]


def _promised_rows(promise: Promised) -> list[dict[str, str]]:
    """A row for every file that was judged."""
    return [
        {
            "name": file.name,
            "size": show(file.bytes / 1e6),
            "ms": show(file.ms),
            "lost": two_decimals(file.drop.points),
            "most": two_decimals(file.drop.upper),
            "accepted": "yes" if file.accepted else "no",
        }
        for file in promise.frontier
    ]


def _record_row(record: Record) -> dict[str, Any]:
    return {
        "record": record,
        "conditioning": label(record.conditioning),
        "value": points(record.value),
        "sort": "" if math.isnan(record.value) else repr(record.value),
        "seconds": show(record.seconds),
        "memory": show(record.peak_mb),
    }


def _distinct_runs(results: Results) -> list[tuple[str, JSON]]:
    """Every "run" part once, an audit's with its label; an audit inside a run usually repeats that run's."""
    found: list[tuple[str, JSON]] = []
    for name, run in [*(("", run) for run in results.runs), *((audit.label, audit.run) for audit in results.audits)]:
        if run and all(run != other for _, other in found):
            found.append((name, run))
    return found


def _said(name: str, run: JSON) -> str:
    """A run in one line: what was run, when, with which version."""
    versions = run.get("versions")
    parts = [
        name,
        str(run.get("command") or run.get("recipe") or "settings"),
        str(run.get("started") or "")[:10],
        f"s2d {versions.get('s2d')}" if isinstance(versions, dict) and versions.get("s2d") else "",
    ]
    return visible(" · ".join(part for part in parts if part))


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
