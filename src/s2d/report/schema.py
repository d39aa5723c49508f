"""Result JSON, checked and typed. Whatever a file says, the rest of the report sees only these classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2d.errors import InputError, visible

JSON = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One measured number."""

    task: str
    model: str
    conditioning: str
    seed: str
    spec: str
    quantizer: str  # method and observer together, "" at full precision
    metric: str
    value: float
    higher_is_better: bool
    split: str
    raw: JSON


@dataclass(frozen=True)
class Histogram:
    """The distribution of one activation tensor and the quantizer's levels over it."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    grid: tuple[float, ...]
    of: str

    def mass(self, low: float, high: float) -> float:
        """The number of values in [low, high), a bin's counts taken as spread evenly over it."""
        total = 0.0
        for left, right, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            overlap = min(high, right) - max(low, left)
            if overlap > 0:
                total += count * overlap / (right - left)
        return total

    def cells(self) -> list[tuple[float, float]]:
        """The interval of values that each level stands for, in order; the outer two reach the ends of the data."""
        middles = [(a + b) / 2 for a, b in zip(self.grid, self.grid[1:], strict=False)]
        low = min(self.edges[0], self.grid[0])
        high = max(self.edges[-1], self.grid[-1])
        return list(zip([low, *middles], [*middles, high], strict=True))

    def levels_used(self, share: float = 0.99) -> int:
        """How many levels hold ``share`` of the values: the fewest, most loaded first."""
        loads = sorted((self.mass(low, high) for low, high in self.cells()), reverse=True)
        wanted = share * sum(loads)
        for used, load in enumerate(loads, 1):
            wanted -= load
            if wanted <= 1e-9:
                return used
        return len(loads)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of the values lie."""
        wanted = share * sum(self.counts)
        for left, right, count in zip(self.edges, self.edges[1:], self.counts, strict=False):
            if count > 0 and wanted <= count:
                return left + (right - left) * max(wanted, 0.0) / count
            wanted -= count
        return self.edges[-1]


@dataclass(frozen=True)
class Weight:
    """One row of an audit. ``values`` holds every measure that was taken, by its key in ``MEASURES`` and a few more.

    ``selected_by`` names the rule that selected it: ``"weight"`` (singular components of the weight), ``"data"``
    (principal directions of its outputs), or nothing.
    """

    name: str
    role: str
    depth: int | None
    shape: str
    selected: bool
    selected_by: str
    values: Mapping[str, float]
    spectrum: tuple[tuple[float, float], ...]  # (rank, singular value), ranks increasing
    histogram: Histogram | None


@dataclass(frozen=True)
class Audit:
    """One checkpoint, weight by weight."""

    label: str
    model: str
    weights: tuple[Weight, ...]
    run: JSON

    def weight(self, name: str) -> Weight | None:
        """The row of this name."""
        return next((weight for weight in self.weights if weight.name == name), None)


@dataclass(frozen=True)
class Moment:
    """One weight at one refresh of the decay."""

    step: float
    weight: str
    sigma: float
    ratio: float
    pcdr: float
    selected: bool


@dataclass(frozen=True)
class Results:
    """Everything a page is made from."""

    records: tuple[Record, ...] = ()
    audits: tuple[Audit, ...] = ()
    history: tuple[Moment, ...] = ()
    runs: tuple[JSON, ...] = field(default=())
    trend: bool = False  # the audits are checkpoints of one training, in its order

    @property
    def trial(self) -> bool:
        """Whether any of it comes from a trial on a tiny random model."""
        return any(run.get("trial") is True for run in self.runs)


def read_results(results: object) -> Results:
    """Check one results dict or a list of them and merge them.

    Raises:
        InputError: This is not a results file of s2d; the message says which part is wrong.
    """
    files = results if isinstance(results, Sequence) and not isinstance(results, (str, bytes)) else [results]
    records: list[Record] = []
    audits: list[Audit] = []
    history: list[Moment] = []
    runs: list[JSON] = []
    trend = False
    for number, content in enumerate(files, 1):
        where = "results" if len(files) == 1 else f"results file {number}"
        if not isinstance(content, Mapping) or not isinstance(content.get("records"), list):
            raise InputError(f'{where}: not a results file of s2d (a JSON object with a list "records" is expected)')
        run = content.get("run") or {}
        if not isinstance(run, Mapping):
            raise InputError(f'{where}: "run" must be an object, not {type(run).__name__}')
        runs.append(run)
        trend = trend or content.get("kind") == "trend"
        if content.get("kind") == "audit":
            audits.append(_audit(content, label=str(content.get("label") or ""), where=where))
            continue
        records += [_record(row, f"{where}, record {index}") for index, row in enumerate(content["records"])]
        named = content.get("audits") or {}
        if not isinstance(named, Mapping):
            raise InputError(f'{where}: "audits" must be an object of audits by name')
        audits += [_audit(audit, label=str(label), where=f"{where}, audit {label!r}") for label, audit in named.items()]
        history += _history(content.get("history") or [], where)
    if not records and not any(audit.weights for audit in audits):
        raise InputError("results: there is no record in it, so nothing to report; run the audit or the recipe again")
    trend = trend or (len(audits) > 2 and not records)
    return Results(tuple(records), _distinct(audits), tuple(history), tuple(runs), trend)


def _distinct(audits: list[Audit]) -> tuple[Audit, ...]:
    """The audits with labels that tell them apart."""
    seen: dict[str, int] = {}
    named = []
    for audit in audits:
        label = audit.label or audit.model
        seen[label] = seen.get(label, 0) + 1
        if seen[label] > 1:
            label = f"{label} ({seen[label]})"
        named.append(Audit(label, audit.model, audit.weights, audit.run))
    return tuple(named)


def _record(row: object, where: str) -> Record:
    row = _mapping(row, where)
    missing = [key for key in ("task", "conditioning", "spec", "metric", "value") if key not in row]
    if missing:
        raise InputError(f"{visible(where)}: {', '.join(missing)} missing")
    spec = visible(row["spec"])
    parts = [row.get("method"), row.get("observer")]
    quantizer = "" if spec == "fp32" else " · ".join(visible(part) for part in parts if part and part != "none")
    return Record(
        task=visible(row["task"]),
        model=visible(row.get("model") or ""),
        conditioning=visible(row["conditioning"]),
        seed=visible(row.get("seed", "")),
        spec=spec,
        quantizer=quantizer,
        metric=visible(row["metric"]),
        value=_number(row["value"]),
        higher_is_better=bool(row.get("higher_is_better", True)),
        split=visible(row.get("split") or ""),
        raw=row,
    )


def _audit(content: object, label: str, where: str) -> Audit:
    content = _mapping(content, where)
    rows = content.get("records")
    if not isinstance(rows, list):
        raise InputError(f'{visible(where)}: an audit has a list "records"')
    run = content.get("run")
    return Audit(
        label=visible(label),
        model=visible(content.get("model") or "model"),
        weights=tuple(_weight(row, f"{where}, record {index}") for index, row in enumerate(rows)),
        run=run if isinstance(run, Mapping) else {},
    )


def _weight(row: object, where: str) -> Weight:
    row = _mapping(row, where)
    if "weight" not in row:
        raise InputError(f"{visible(where)}: weight missing")
    values = {}
    for key in (
        "sigma_over_median",
        "stable_rank",
        "output_max",
        "output_ratio",
        "input_max",
        "input_ratio",
        "w4a4_error",
    ):
        values[key] = _number(row.get(key))
    for key in ("sigma", "pcdr", "pcdr_data"):
        triple = row.get(key)
        for rank, value in enumerate(triple if isinstance(triple, (list, tuple)) else [], 1):
            values[f"{key}_{rank}"] = _number(value)
    depth = row.get("depth")
    shape = row.get("shape")
    histogram = row.get("histogram")
    return Weight(
        name=visible(row["weight"]),
        role=visible(row.get("role") or row.get("kind") or "other"),
        depth=depth if isinstance(depth, int) and not isinstance(depth, bool) else None,
        shape=" × ".join(visible(side) for side in shape) if isinstance(shape, (list, tuple)) else "",
        selected=bool(row.get("selected")),
        selected_by=visible(row.get("selected_by") or ""),
        values={key: value for key, value in values.items() if not math.isnan(value)},
        spectrum=_spectrum(row.get("spectrum")),
        histogram=_histogram(histogram, where) if histogram else None,
    )


def _spectrum(content: object) -> tuple[tuple[float, float], ...]:
    if not isinstance(content, Mapping):
        return ()
    ranks, values = ([_number(item) for item in _listed(content.get(key))] for key in ("rank", "sigma"))
    return tuple(sorted((r, v) for r, v in zip(ranks, values, strict=False) if math.isfinite(r) and math.isfinite(v)))


def _listed(content: object) -> list[Any]:
    return list(content) if isinstance(content, (list, tuple)) else []


def _histogram(content: object, where: str) -> Histogram:
    content = _mapping(content, f"{where}, histogram")
    edges, counts, grid = ([_number(item) for item in _listed(content.get(key))] for key in ("edges", "counts", "grid"))
    if len(edges) != len(counts) + 1 or not counts or len(grid) < 2:
        raise InputError(
            f"{visible(where)}: a histogram needs n + 1 edges, n counts and a grid of levels, "
            f"not {len(edges)}, {len(counts)} and {len(grid)}"
        )
    if not all(math.isfinite(item) for item in [*edges, *counts, *grid]) or min(counts) < 0 or sum(counts) <= 0:
        raise InputError(f"{visible(where)}: a histogram must be finite, and count at least one value")
    if any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
        raise InputError(f"{visible(where)}: the histogram's edges must increase")
    return Histogram(tuple(edges), tuple(counts), tuple(sorted(grid)), visible(content.get("of") or "input"))


def _history(entries: object, where: str) -> list[Moment]:
    if not isinstance(entries, list):
        raise InputError(f'{visible(where)}: "history" must be a list')
    moments = []
    for index, entry in enumerate(entries):
        entry = _mapping(entry, f"{where}, history {index}")
        if entry.get("seed") != entries[0].get("seed"):
            continue  # one run's history is drawn; of several seeds, the first
        sigma = entry.get("sigma")
        ratio = entry.get("output_ratio", entry.get("outlier_ratio", entry.get("outlier")))
        moments.append(
            Moment(
                step=_number(entry.get("step")),
                weight=visible(entry.get("weight", "")),
                sigma=_number(sigma[0] if isinstance(sigma, (list, tuple)) and sigma else sigma),
                ratio=_number(ratio),
                pcdr=_number(next(iter(_listed(entry.get("pcdr"))), None)),
                selected=bool(entry.get("selected")),
            )
        )
    return [moment for moment in moments if math.isfinite(moment.step)]


def _mapping(content: object, where: str) -> JSON:
    if not isinstance(content, Mapping):
        raise InputError(f"{visible(where)}: an object is expected, not {type(content).__name__}")
    return content


def _number(value: object) -> float:
    """A float; NaN for everything that is none (a measure that was not taken)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
