"""Results of an audit: one row per weight, as tables, JSON and HTML pages; several checkpoints side by side."""

from __future__ import annotations

import os
import re
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from s2d.audit.terminal_tables import _NONE, _Column, _fitting, bars, percent, share, short
from s2d.errors import InputError, MissingExtra
from s2d.io.files import JSON, read_json, write_json
from s2d.optional import require

if TYPE_CHECKING:
    from typing_extensions import Self

_ERROR_KEY = re.compile(r"w\d+a\d+_error")


@dataclass
class AuditRow:
    """Results of one weight. Fields that depend on the data are None where the weight's module was never called.

    Attributes:
        weight: The parameter's dotted name, with a suffix such as ``[0:384]`` for a slice.
        kind: ``"linear"`` or ``"conv"``.
        shape: ``[out, in]``; kernels are flattened into ``in``.
        depth: The block's number, None outside the blocks.
        role: Its role in the model's family (``"fc2"``), None where the family does not know it.
        sigma: The leading singular values, largest first.
        sigma_over_median: The largest over the median singular value; None where the median is 0.
        stable_rank: ``||W||_F^2 / sigma_1^2``.
        pcdr: PCDR_1..k: the share of the largest outputs that the first k singular components of the weight make.
        pcdr_data: The same for the k principal directions of the outputs (components in the metric of the inputs).
        output_max: Largest ``|x W^T|``, without the bias.
        output_ratio: `output_max` over the root mean square of all outputs.
        input_max: Largest ``|x|``.
        input_ratio: `input_max` over the root mean square of all inputs.
        selected: Few components make the outliers here; see `s2d.audit.measure.select`.
        selected_by: Which rule selected it: ``"weight"`` (the paper's) or ``"data"``.
        components: How many components make the outliers.
        error: ``||Q(x) Q(w)^T - x w^T|| / ||x w^T||`` of the typical output channel (the median over the rows w of W).
            Only this weight and its input are quantized. 1 means as much noise as signal.
        propagated: R of the weight's block: the squared error of what it gives, relative to it, when everything is
            quantized; None where it was not asked for. See `s2d.audit.rounded_copy`.
        carriers: The massive-activation tokens of a language model; see `s2d.audit.massive_tokens`.
        spectrum: All singular values as a curve of a few dozen points; see `s2d.audit.measure.curve`.
        expert: For a parameter that holds several experts: the one that all numbers are of, the worst by
            `output_ratio`; else None.
        experts: How many experts the parameter holds; None for a single matrix.
        histogram: Histogram of the inputs, for the worst weights; see `s2d.audit.accumulators.binned`.
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
    propagated: float | None = None
    carriers: JSON | None = None
    spectrum: JSON | None = None
    histogram: JSON | None = None
    expert: int | None = None
    experts: int | None = None


class _Saved(ABC):
    """Results that can be saved as plain JSON or as an HTML page."""

    @abstractmethod
    def to_json(self) -> JSON:
        """Everything, as plain JSON data."""

    @staticmethod
    @abstractmethod
    def from_json(content: object) -> Any:
        """The inverse of `to_json`."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a ``.json`` file or a self-contained ``.html`` page, atomically.

        A page of several checkpoints shows them side by side.

        Raises:
            InputError: Another ending, or the file cannot be written.
            MissingExtra: A page needs jinja2.
        """
        target = Path(path)
        if target.suffix.lower() in (".html", ".htm"):
            # The report package depends on this one, so it is imported only when a page is asked for.
            return require("s2d.report", "report").write_report(self.to_json(), target)
        if target.suffix.lower() != ".json":
            raise InputError(f"{target}: an audit is saved as .json or .html; name the file so")
        return write_json(target, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            InputError: It cannot be read, or holds something else.
        """
        return cls.from_json(read_json(path))


@dataclass
class Audit(_Saved):
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
        """The n rows with the largest output over RMS, selected or not; weights that were never called come last."""
        return sorted(self.rows, key=lambda row: -1.0 if row.output_ratio is None else row.output_ratio)[::-1][
            : max(n, 0)
        ]

    def picture(self, n: int = 6) -> str:
        """A bar chart in lines of text: the largest output over RMS of the n worst weights."""
        rows = [(row.weight, row.output_ratio) for row in self.worst(n) if row.output_ratio is not None]
        title = f"{self.model}: largest output over RMS of its {len(rows)} worst weights (a bell curve has about 5)"
        return "\n".join([title, *bars(rows)])

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
        """The rows as plain dictionaries, as they are in the JSON; the error's key names its bits, ``w4a4_error``.

        What was not asked for (``propagated``) has no key, nor has what only parameters of several experts have.
        """
        asked = any(row.propagated is not None for row in self.rows)
        return [
            {
                (f"{self.spec}_error" if name == "error" else name): value
                for name, value in vars(row).items()
                if (asked or name != "propagated") and (row.experts is not None or name not in ("expert", "experts"))
            }
            for row in self.rows
        ]

    def frame(self) -> Any:
        """The rows as a pandas DataFrame, one column per number (``sigma_1``, ``pcdr_1``, ...), without curves.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingExtra("pandas is needed for frame(); run: pip install pandas (or use records())") from None
        return pandas.DataFrame([_flat(record) for record in self.records()]).set_index("weight")

    def table(self, n: int = 20, width: int | None = None) -> Table:
        """The n worst rows as a table for a terminal of this width; columns that do not fit are left out."""
        return audit_table(self, n, width)

    def to_json(self) -> JSON:
        """Everything, as plain JSON data, for `s2d.report` and `from_json`."""
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


@dataclass
class Trend(_Saved):
    """Audits of several checkpoints, in the order of training: which outliers grow, and which the decay removed.

    Attributes:
        audits: By label, in order.
    """

    audits: dict[str, Audit]

    def records(self) -> list[JSON]:
        """One dictionary per weight. Its values are lists, one entry per checkpoint (None without the weight)."""
        names = dict.fromkeys(row.weight for audit in self.audits.values() for row in audit.rows)
        by_name = [{row.weight: row for row in audit.rows} for audit in self.audits.values()]
        return [_history(name, [rows.get(name) for rows in by_name]) for name in names]

    def summary(self) -> list[JSON]:
        """One dictionary per checkpoint: how many weights are selected, the worst and the median numbers."""
        return [{"checkpoint": label, **_overview(audit.rows)} for label, audit in self.audits.items()]

    def table(self, n: int = 20, width: int | None = None) -> Table:
        """The n weights with the largest outliers in any checkpoint, their numbers in order of the checkpoints."""
        return trend_table(self, n, width)

    def to_json(self) -> JSON:
        """The audits by label, as plain JSON data, for `s2d.report` and `from_json`."""
        audits = {label: audit.to_json() for label, audit in self.audits.items()}
        return {"kind": "trend", "run": {}, "records": [], "audits": audits}

    @staticmethod
    def from_json(content: object) -> Trend:
        """The inverse of `to_json`; it also accepts the audits of a run.

        Raises:
            InputError: There are no audits in it.
        """
        audits = content.get("audits") if isinstance(content, Mapping) else None
        if not isinstance(audits, Mapping) or not audits:
            raise InputError('these are not audits of s2d (a JSON object with "audits" by label is expected)')
        return Trend({str(label): Audit.from_json(audit) for label, audit in audits.items()})


def _history(name: str, rows: Sequence[AuditRow | None]) -> JSON:
    def of(get: Any) -> list[Any]:
        return [None if row is None else get(row) for row in rows]

    return {
        "weight": name,
        "sigma_1": of(lambda row: row.sigma[0]),
        "pcdr_1": of(lambda row: ranked(row.pcdr)),
        "pcdr_data_1": of(lambda row: ranked(row.pcdr_data)),
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
        "median_pcdr_1": median([ranked(row.pcdr) for row in rows]),
        "median_pcdr_data_1": median([ranked(row.pcdr_data) for row in rows]),
        "median_error": median([row.error for row in rows]),
    }


def _flat(record: JSON) -> JSON:
    flat: JSON = {}
    for key, value in record.items():
        if key in ("sigma", "pcdr", "pcdr_data"):
            flat.update({f"{key}_{rank}": number for rank, number in enumerate(value or [], 1)})
        elif key not in ("histogram", "spectrum", "carriers"):
            flat[key] = tuple(value) if isinstance(value, list) else value
    return flat


def audit_table(audit: Audit, n: int, width: int | None = None) -> Table:
    """The n worst rows. The column ``data`` holds the PCDR of the outputs' principal directions."""
    rows = audit.worst(n)

    def column(heading: str, rank: int, get: Callable[[Any], Any], show: Callable[[Any], str]) -> _Column:
        return _Column(heading, [show(get(row)) for row in rows], rank)

    columns = [
        _Column("weight", [_shown(row) for row in rows], right=False),
        column("shape", 9, lambda row: "×".join(map(str, row.shape)), str),
        column("σ₁", 6, lambda row: row.sigma[0], short),
        column("σ₁/med", 2, lambda row: row.sigma_over_median, short),
        column("PCDR₁", 0, lambda row: ranked(row.pcdr, 1), share),
        column("PCDR₃", 3, lambda row: ranked(row.pcdr, 3), share),
        column("data₁", 7, lambda row: ranked(row.pcdr_data, 1), share),
        column("data₃", 5, lambda row: ranked(row.pcdr_data, 3), share),
        column("out max", 8, lambda row: row.output_max, short),
        column("out/RMS", 0, lambda row: row.output_ratio, short),
        column("in/RMS", 4, lambda row: row.input_ratio, short),
        column(f"{audit.spec} error", 1, lambda row: row.error, percent),
        *(
            [column("R", 0, lambda row: row.propagated, short)]
            if any(row.propagated is not None for row in rows)
            else []
        ),
        _Column("selected", [f"{r.selected_by}, {r.components}" if r.selected else "" for r in rows], right=False),
    ]
    title = f"{audit.model}: few components make the outliers of {len(audit.selected)} of {len(audit.rows)} weights"
    table = _fitting(title, columns, width, bold=[row.selected for row in rows])
    if audit.missed:
        listed = ", ".join(list(audit.missed)[:3]) + (", ..." if len(audit.missed) > 3 else "")
        table.caption = f"{len(audit.missed)} weights without activations: {listed}"
    return table


def _shown(row: AuditRow) -> str:
    name = row.weight.removesuffix(".weight")
    return name if row.expert is None else f"{name}[{row.expert}]"


def trend_table(trend: Trend, n: int, width: int | None = None) -> Table:
    """The n weights with the largest outliers in any checkpoint.

    The first row summarises all weights: medians, and the worst ``out/RMS``.
    """
    found = trend.summary()
    worst = sorted(trend.records(), key=lambda record: -max(value or 0.0 for value in record["output_ratio"]))[
        : max(n, 0)
    ]

    def column(heading: str, rank: int, key: str, overall: str, show: Callable[[Any], str]) -> _Column:
        cells = [[item[overall] for item in found], *(record[key] for record in worst)]
        return _Column(heading, [" → ".join(map(show, values)) for values in cells], rank)

    counts = " → ".join(str(item["selected"]) for item in found)
    chosen = [" → ".join({True: "yes", False: "no"}.get(value, _NONE) for value in r["selected"]) for r in worst]
    columns = [
        _Column("weight", ["all", *(record["weight"].removesuffix(".weight") for record in worst)], right=False),
        column("σ₁", 1, "sigma_1", "median_sigma_1", short),
        column("PCDR₁", 0, "pcdr_1", "median_pcdr_1", share),
        column("data₁", 4, "pcdr_data_1", "median_pcdr_data_1", share),
        column("out/RMS", 0, "output_ratio", "worst_output_ratio", short),
        column("error", 2, "error", "median_error", percent),
        _Column("selected", [counts, *chosen], 3),
    ]
    return _fitting(" → ".join(trend.audits), columns, width, bold=[True, *[False] * len(worst)])


def ranked(values: Sequence[float] | None, rank: int = 1) -> float | None:
    """The value at a rank, or at the last rank that exists."""
    return values[min(rank, len(values)) - 1] if values else None
