"""What an audit found: rows, one per weight; tables, JSON and pages of them; several checkpoints side by side."""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from s2d.errors import InputError, MissingExtra, require

JSON = dict[str, Any]

_ERROR_KEY = re.compile(r"w\d+a\d+_error")


@dataclass
class AuditRow:
    """One weight. What depends on the data is None where the weight's module was never called.

    Attributes:
        weight: The parameter's dotted name, with a suffix such as ``[0:384]`` for a slice.
        kind: ``"linear"`` or ``"conv"``.
        shape: ``[out, in]``; kernels are flattened into ``in``.
        depth: The block's number, None outside the blocks.
        role: What the model's family calls it (``"fc2"``), None where the family does not know.
        sigma: The leading singular values, largest first.
        sigma_over_median: The largest over the median singular value; None where the median is 0.
        stable_rank: ``||W||_F^2 / sigma_1^2``.
        pcdr: PCDR_1..k: the share of the largest outputs that the first k singular components of the weight make.
        pcdr_data: The same for the k principal directions of the outputs (components in the metric of the inputs).
        output_max: Largest ``|x W^T|``, without the bias.
        output_ratio: That over the root mean square of all outputs.
        input_max: Largest ``|x|``.
        input_ratio: That over the root mean square of all inputs.
        selected: Few components make the outliers here; see :func:`s2d.audit.measure.select`.
        selected_by: Which rule says so: ``"weight"`` (the paper's) or ``"data"``.
        components: How many components that takes.
        error: ``||Q(x) Q(W)^T - x W^T|| / ||x W^T||`` with this weight and its input quantized, nothing else.
        histogram: Of the inputs, for the worst weights; see :func:`s2d.audit.streams.binned`.
    """

    weight: str
    kind: str
    shape: list[int]
    depth: int | None
    role: str | None
    sigma: list[float]
    sigma_over_median: float | None
    stable_rank: float
    pcdr: list[float] | None = None
    pcdr_data: list[float] | None = None
    output_max: float | None = None
    output_ratio: float | None = None
    input_max: float | None = None
    input_ratio: float | None = None
    selected: bool = False
    selected_by: Literal["weight", "data"] | None = None
    components: int | None = None
    error: float | None = None
    histogram: JSON | None = None

    @property
    def severity(self) -> tuple[bool, float]:
        """A sort key: selected weights first, then by how far the outputs stand out."""
        return self.selected, -1.0 if self.output_ratio is None else self.output_ratio


@dataclass
class Audit:
    """One checkpoint, weight by weight, in the model's order.

    Attributes:
        rows: One per weight.
        model: The model's name.
        run: Versions, settings, seconds, tokens seen, fingerprint of the weights.
        missed: Weights without activations, with the reason.
    """

    rows: list[AuditRow]
    model: str
    run: JSON = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> str:
        """The bit widths of the errors, such as ``"w4a4"``."""
        return str(self.run.get("spec", "w4a4"))

    @property
    def selected(self) -> list[AuditRow]:
        """The rows of the selected weights."""
        return [row for row in self.rows if row.selected]

    def worst(self, n: int = 10) -> list[AuditRow]:
        """The n worst rows: selected ones first, then by how far their largest output stands out."""
        return sorted(self.rows, key=lambda row: row.severity, reverse=True)[: max(n, 0)]

    def row(self, weight: str) -> AuditRow:
        """The row of a weight, by its name.

        Raises:
            InputError: There is none.
        """
        for row in self.rows:
            if row.weight == weight:
                return row
        raise InputError(f"the audit of {self.model} has no weight {weight!r}; it has {self.rows[0].weight}, ...")

    def records(self) -> list[JSON]:
        """The rows as plain dictionaries, as they are in the JSON; the error's key names its bits, ``w4a4_error``."""
        return [
            {(f"{self.spec}_error" if name == "error" else name): value for name, value in vars(row).items()}
            for row in self.rows
        ]

    def frame(self) -> Any:
        """The rows as a pandas DataFrame, one column per number (``sigma_1``, ``pcdr_1``, ...), without histograms.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingExtra("pandas is needed for frame(); run: pip install pandas (or use records())") from None
        return pandas.DataFrame([_flat(record) for record in self.records()]).set_index("weight")

    def table(self, n: int = 20) -> Table:
        """The n worst rows as a table for the terminal."""
        title = f"{self.model}: few components make the outliers of {len(self.selected)} of {len(self.rows)} weights"
        table = Table(title=title)
        for heading in ("weight", "shape"):
            table.add_column(heading, overflow="fold")
        for heading in ("σ₁", "σ₁/med", "PCDR₁", "PCDR₁ data", "out max", "out/RMS", "in/RMS", f"{self.spec} err"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("selected", no_wrap=True)
        for row in self.worst(n):
            table.add_row(
                row.weight.removesuffix(".weight"),
                "×".join(map(str, row.shape)),
                *map(_short, (row.sigma[0], row.sigma_over_median, _first(row.pcdr), _first(row.pcdr_data))),
                *map(_short, (row.output_max, row.output_ratio, row.input_ratio)),
                _percent(row.error),
                f"{row.selected_by}, {row.components}" if row.selected else "",
                style="bold" if row.selected else None,
            )
        if self.missed:
            listed = ", ".join(list(self.missed)[:3]) + (", ..." if len(self.missed) > 3 else "")
            table.caption = f"{len(self.missed)} weights without activations: {listed}"
        return table

    def to_json(self) -> JSON:
        """Everything, as plain JSON data: what `s2d.report` reads and `from_json` takes back."""
        return {
            "kind": "audit",
            "model": self.model,
            "run": self.run,
            "missed": self.missed,
            "records": self.records(),
        }

    @staticmethod
    def from_json(content: object) -> Audit:
        """The inverse of `to_json`.

        Raises:
            InputError: It is not an audit.
        """
        records = content.get("records") if isinstance(content, Mapping) else None
        if not isinstance(content, Mapping) or content.get("kind") != "audit" or not isinstance(records, list):
            raise InputError('this is not an audit of s2d (a JSON object of kind "audit" with records is expected)')
        names = {f.name for f in fields(AuditRow)}
        rows = []
        for index, record in enumerate(records, 1):
            try:
                found = {"error" if _ERROR_KEY.fullmatch(key) else key: value for key, value in record.items()}
                rows.append(AuditRow(**{key: value for key, value in found.items() if key in names}))
            except (AttributeError, TypeError) as error:
                raise InputError(f"record {index} of the audit is not a weight's row: {error}") from None
        return Audit(rows, str(content.get("model")), dict(content.get("run") or {}), dict(content.get("missed") or {}))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.json`` file, or a self-contained ``.html`` page; complete, or not at all.

        Raises:
            InputError: Another ending, or the file cannot be written.
            MissingExtra: A page needs jinja2.
        """
        return _save(self.to_json(), path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Audit:
        """Read a file that `save` wrote.

        Raises:
            InputError: It cannot be read, or is not an audit.
        """
        return Audit.from_json(_read(path))


@dataclass
class Trend:
    """Audits of several checkpoints, in the order of training: what grows, what decay took away.

    Attributes:
        audits: By label, in order.
    """

    audits: dict[str, Audit]

    def records(self) -> list[JSON]:
        """One dictionary per weight, its values lists with an entry per checkpoint (None where it lacks the weight)."""
        names = dict.fromkeys(row.weight for audit in self.audits.values() for row in audit.rows)
        by_name = [{row.weight: row for row in audit.rows} for audit in self.audits.values()]
        return [_history(name, [rows.get(name) for rows in by_name]) for name in names]

    def summary(self) -> list[JSON]:
        """One dictionary per checkpoint: how many weights are selected, the worst and the median numbers."""
        return [{"checkpoint": label, **_overview(audit.rows)} for label, audit in self.audits.items()]

    def table(self, n: int = 20) -> Table:
        """The n weights that stand out most in any checkpoint, with their numbers in order of the checkpoints."""
        table = Table(title=" → ".join(self.audits))
        table.add_column("weight", overflow="fold")
        for heading in ("σ₁", "PCDR₁", "PCDR₁ data", "out/RMS", "error", "selected"):
            table.add_column(heading, justify="right")
        table.add_row("all: median, of out/RMS the worst", *self._overall(), style="bold", end_section=True)
        worst = sorted(self.records(), key=lambda record: -max(value or 0.0 for value in record["output_ratio"]))
        for record in worst[: max(n, 0)]:
            table.add_row(
                record["weight"].removesuffix(".weight"),
                *(_arrows(record[key]) for key in ("sigma_1", "pcdr_1", "pcdr_data_1", "output_ratio")),
                _arrows(record["error"], _percent),
                _arrows(record["selected"], lambda value: {True: "yes", False: "no"}.get(value, "–")),
            )
        return table

    def _overall(self) -> list[str]:
        found = self.summary()

        def arrows(key: str, show: Any = _short) -> str:
            return _arrows([item[key] for item in found], show)

        return [
            *(arrows(f"median_{key}") for key in ("sigma_1", "pcdr_1", "pcdr_data_1")),
            arrows("worst_output_ratio"),
            arrows("median_error", _percent),
            arrows("selected"),
        ]

    def to_json(self) -> list[JSON]:
        """The audits as JSON, each with its ``label``: what `s2d.report` reads and `from_json` takes back."""
        return [{**audit.to_json(), "label": label} for label, audit in self.audits.items()]

    @staticmethod
    def from_json(content: object) -> Trend:
        """The inverse of `to_json`.

        Raises:
            InputError: It is not a list of audits.
        """
        if not isinstance(content, list) or not content:
            raise InputError("this is not a list of audits of s2d")
        audits = [(item, Audit.from_json(item)) for item in content]
        return Trend({str(item.get("label") or audit.model): audit for item, audit in audits})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.json`` file, or a self-contained ``.html`` page with the checkpoints side by side.

        Raises:
            InputError: Another ending, or the file cannot be written.
            MissingExtra: A page needs jinja2.
        """
        return _save(self.to_json(), path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Trend:
        """Read a file that `save` wrote.

        Raises:
            InputError: It cannot be read, or is not a list of audits.
        """
        return Trend.from_json(_read(path))


def _history(name: str, rows: Sequence[AuditRow | None]) -> JSON:
    def of(get: Any) -> list[Any]:
        return [None if row is None else get(row) for row in rows]

    return {
        "weight": name,
        "sigma_1": of(lambda row: row.sigma[0]),
        "pcdr_1": of(lambda row: _first(row.pcdr)),
        "pcdr_data_1": of(lambda row: _first(row.pcdr_data)),
        "output_ratio": of(lambda row: row.output_ratio),
        "input_ratio": of(lambda row: row.input_ratio),
        "error": of(lambda row: row.error),
        "selected": of(lambda row: row.selected),
    }


def _overview(rows: Sequence[AuditRow]) -> JSON:
    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    return {
        "weights": len(rows),
        "selected": sum(row.selected for row in rows),
        "worst_output_ratio": max((row.output_ratio for row in rows if row.output_ratio is not None), default=None),
        "median_sigma_1": median([row.sigma[0] for row in rows]),
        "median_sigma_over_median": median([row.sigma_over_median for row in rows]),
        "median_pcdr_1": median([_first(row.pcdr) for row in rows]),
        "median_pcdr_data_1": median([_first(row.pcdr_data) for row in rows]),
        "median_error": median([row.error for row in rows]),
    }


def _flat(record: JSON) -> JSON:
    flat: JSON = {}
    for key, value in record.items():
        if key in ("sigma", "pcdr", "pcdr_data"):
            flat.update({f"{key}_{rank}": number for rank, number in enumerate(value or [], 1)})
        elif key != "histogram":
            flat[key] = tuple(value) if isinstance(value, list) else value
    return flat


def _first(values: Sequence[float] | None) -> float | None:
    return values[0] if values else None


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _arrows(values: Sequence[Any], show: Any = _short) -> str:
    return " → ".join(show(value) for value in values)


def _save(content: JSON | list[JSON], path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() in (".html", ".htm"):
        # The report stands on a higher floor and is no part of auditing; it is fetched when a page is asked for.
        return require("s2d.report", "report").write_report(content, target)
    if target.suffix.lower() != ".json":
        raise InputError(f"{target}: an audit is saved as .json or .html; name the file so")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{target}: the audit cannot be written ({reason}); choose another place") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return target


def _read(path: str | os.PathLike[str]) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an audit: {error}") from error
