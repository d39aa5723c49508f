"""Result JSON, checked by pydantic and typed. The rest of the report sees only these classes, never the raw file.

A measure of the wrong type counts as missing; a structure of the wrong type is an error. Modules that only name these
classes import them for type checkers, so that pydantic is loaded when a file is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from s2d.errors import InputError, visible
from s2d.io.files import JSON

T = TypeVar("T")
_RANKED = ("sigma", "pcdr", "pcdr_data")  # measures of the first three singular components
_WRONG_TYPE = {"list_type": "a list", "tuple_type": "a list", "dict_type": "an object", "dataclass_type": "an object"}


def _number(value: object) -> float:
    """A float; NaN for any other value (a missing measure)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _numbers(value: object) -> list[float]:
    return [_number(item) for item in value] if isinstance(value, (list, tuple)) else []


def _first(value: object) -> float:
    return _number(next(iter(value), None) if isinstance(value, (list, tuple)) else value)


def _curve(value: object) -> list[tuple[float, float]]:
    ranks, values = (_numbers(value.get(key)) if isinstance(value, dict) else [] for key in ("rank", "sigma"))
    return sorted((r, v) for r, v in zip(ranks, values, strict=False) if math.isfinite(r) and math.isfinite(v))


def _sides(value: object) -> str:
    return " × ".join(map(visible, value)) if isinstance(value, (list, tuple)) else ""


def _or(default: object) -> BeforeValidator:
    """What is null, empty or zero reads as `default`."""
    return BeforeValidator(lambda value: value or default)


Number = Annotated[float, BeforeValidator(_number)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
First = Annotated[float, BeforeValidator(_first)]  # of a list, or a number
Words = Annotated[str, BeforeValidator(lambda value: visible("" if value is None else value))]
Depth = Annotated[int | None, BeforeValidator(lambda value: value if type(value) is int else None)]
Shape = Annotated[str, BeforeValidator(_sides)]
Flag = Annotated[bool, BeforeValidator(bool)]
_BY_NAME = ConfigDict(populate_by_name=True)  # as well as by the name in the file


@dataclass(frozen=True, config=_BY_NAME)
class Record:
    """One measured number."""

    task: Words
    conditioning: Words
    spec: Words
    metric: Words
    value: Number
    model: Words = ""
    seed: Words = ""
    method: Words = ""
    observer: Words = ""
    split: Words = ""
    higher_is_better: Flag = True
    seconds: Number = math.nan
    peak_mb: Number = math.nan

    @cached_property
    def quantizer(self) -> str:
        """Method and observer together, "" at full precision."""
        parts = [] if self.spec == "fp32" else [self.method, self.observer]
        return " · ".join(part for part in parts if part not in ("", "none"))


@dataclass(frozen=True, config=_BY_NAME)
class Histogram:
    """The distribution of one activation tensor and the quantizer's levels over it."""

    edges: Numbers
    counts: Numbers
    grid: Annotated[Numbers, AfterValidator(lambda levels: tuple(sorted(levels)))]
    of: Annotated[Words, _or("input")] = "input"

    @model_validator(mode="after")
    def _is_one(self) -> Histogram:
        edges, counts, grid = self.edges, self.counts, self.grid
        if len(edges) != len(counts) + 1 or not counts or len(grid) < 2:
            raise InputError(
                "a histogram needs n + 1 edges, n counts and a grid of levels, "
                f"not {len(edges)}, {len(counts)} and {len(grid)}"
            )
        if not all(math.isfinite(item) for item in [*edges, *counts, *grid]) or min(counts) < 0 or sum(counts) <= 0:
            raise InputError("a histogram must be finite, and count at least one value")
        if any(a >= b for a, b in pairwise(edges)):
            raise InputError("the histogram's edges must increase")
        return self

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


@dataclass(frozen=True, config=_BY_NAME)
class Weight:
    """One row of an audit.

    ``selected_by`` names the rule that selected it: ``"weight"`` (singular components of the weight), ``"data"``
    (principal directions of its outputs), or nothing.
    """

    name: Words = Field(validation_alias="weight")
    role: Words = "other"
    depth: Depth = None
    shape: Shape = ""
    selected: Flag = False
    selected_by: Words = ""
    sigma: Numbers = ()
    pcdr: Numbers = ()
    pcdr_data: Numbers = ()
    sigma_over_median: Number = math.nan
    stable_rank: Number = math.nan
    output_max: Number = math.nan
    output_ratio: Number = math.nan
    input_max: Number = math.nan
    input_ratio: Number = math.nan
    w4a4_error: Number = math.nan
    spectrum: Annotated[tuple[tuple[float, float], ...], BeforeValidator(_curve)] = ()  # (rank, singular value)
    histogram: Annotated[Histogram | None, _or(None)] = None

    @model_validator(mode="before")
    @classmethod
    def _with_role(cls, row: Any) -> Any:
        return {**row, "role": row.get("role") or row.get("kind") or "other"} if isinstance(row, dict) else row

    @cached_property
    def values(self) -> dict[str, float]:
        """Every measure that was taken, by its key in ``MEASURES`` and a few more (``sigma_1``)."""
        taken = {f"{key}_{rank}": value for key in _RANKED for rank, value in enumerate(getattr(self, key), 1)}
        taken |= {each.name: getattr(self, each.name) for each in fields(self) if each.type == "Number"}
        return {key: value for key, value in taken.items() if not math.isnan(value)}


@dataclass(frozen=True, config=_BY_NAME)
class Audit:
    """One checkpoint, weight by weight."""

    weights: tuple[Weight, ...] = Field(validation_alias="records")
    label: Words = ""
    model: Annotated[Words, _or("model")] = "model"
    run: Annotated[JSON, _or({})] = field(default_factory=dict)

    def weight(self, name: str) -> Weight | None:
        """The row of this name."""
        return next((weight for weight in self.weights if weight.name == name), None)


@dataclass(frozen=True, config=_BY_NAME)
class Moment:
    """One weight at one refresh of the decay."""

    step: Number = math.nan
    weight: Words = ""
    sigma: First = math.nan
    ratio: Number = Field(default=math.nan, validation_alias=AliasChoices("output_ratio", "outlier_ratio", "outlier"))
    pcdr: First = math.nan
    selected: Flag = False
    seed: Words = ""


@dataclass(frozen=True, config=_BY_NAME)
class Lost:
    """The points that a file lost, and their upper bound."""

    points: Number = math.nan
    upper: Number = math.nan


@dataclass(frozen=True, config=_BY_NAME)
class PromisedFile:
    """A file that was judged."""

    name: Words
    drop: Lost
    bytes: Number = math.nan
    ms: Number = math.nan
    accepted: Flag = False


@dataclass(frozen=True, config=_BY_NAME)
class Promised:
    """The verdict on a promise; the result is the last of the frontier if it is met."""

    status: Words
    runtime: Words = ""
    metric: Words = ""
    file: Words = ""
    help: Words = ""
    within: Number = math.nan
    frontier: tuple[PromisedFile, ...] = ()


@dataclass(frozen=True, config=_BY_NAME)
class _Run:
    """One file of a run or a trend."""

    records: tuple[Record, ...]
    run: Annotated[JSON, _or({})] = field(default_factory=dict)
    audits: Annotated[dict[str, Audit], _or({})] = field(default_factory=dict)
    history: Annotated[tuple[Moment, ...], _or(())] = ()
    promises: Annotated[dict[str, Promised], _or({})] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """Everything a page is made from."""

    records: tuple[Record, ...] = ()
    audits: tuple[Audit, ...] = ()
    history: tuple[Moment, ...] = ()
    runs: tuple[JSON, ...] = ()
    trend: bool = False  # the audits are checkpoints of one training, in its order
    promises: dict[str, Promised] = field(default_factory=dict)

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
    promises: dict[str, Promised] = {}
    trend = False
    for number, content in enumerate(files, 1):
        where = "results" if len(files) == 1 else f"results file {number}"
        if not isinstance(content, dict) or not isinstance(content.get("records"), list):
            raise InputError(f'{where}: not a results file of s2d (a JSON object with a list "records" is expected)')
        trend = trend or content.get("kind") == "trend"
        if content.get("kind") == "audit":
            audits.append(_checked_as(Audit, content, where))
            runs.append(audits[-1].run)
            continue
        read = _checked_as(_Run, content, where)
        runs.append(read.run)
        records += read.records
        promises |= {visible(name): each for name, each in read.promises.items()}
        audits += [replace(audit, label=label) for label, audit in read.audits.items()]
        # One run's history is drawn; of several seeds, the first.
        history += [m for m in read.history if m.seed == read.history[0].seed and math.isfinite(m.step)]
    if not records and not any(audit.weights for audit in audits):
        raise InputError("results: there is no record in it, so nothing to report; run the audit or the recipe again")
    trend = trend or (len(audits) > 2 and not records)
    return Results(tuple(records), _distinct(audits), tuple(history), tuple(runs), trend, promises)


def _distinct(audits: list[Audit]) -> tuple[Audit, ...]:
    """The audits with labels that tell them apart."""
    seen: dict[str, int] = {}
    named = []
    for audit in audits:
        label = audit.label or audit.model
        seen[label] = seen.get(label, 0) + 1
        named.append(replace(audit, label=f"{label} ({seen[label]})" if seen[label] > 1 else label))
    return tuple(named)


def _checked_as(kind: type[T], content: JSON, where: str) -> T:
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise InputError(_explained(error, where)) from None


def _explained(error: ValidationError, where: str) -> str:
    """The first thing that is wrong and where, in one line."""
    first, *others = error.errors()
    *above, last = first["loc"] or ("",)
    if first["type"] == "missing":
        beside = [other["loc"][-1] for other in others if other["type"] == "missing" and other["loc"][:-1] == (*above,)]
        return f"{_place(where, above)}: {', '.join(map(str, (last, *beside)))} missing"
    if expected := _WRONG_TYPE.get(first["type"]):
        found = type(first["input"]).__name__
        if isinstance(last, str) and above[-1:] != ["audits"]:
            return f'{_place(where, above)}: "{last}" must be {expected}, not {found}'
        return f"{_place(where, first['loc'])}: {expected} is expected, not {found}"
    return f"{_place(where, first['loc'])}: {visible(first['msg'].removeprefix('Value error, '))}"


def _place(where: str, path: Sequence[str | int]) -> str:
    """A path into a file, in words: ``results, audit 'adamw', record 3``."""
    parts = [where]
    for above, part in pairwise(("", *path)):
        if isinstance(part, int):
            parts.append(f"{str(above).removesuffix('s')} {part}")
        elif above == "audits":
            parts.append(f"audit {part!r}")
        elif part not in ("records", "audits", "history"):
            parts.append(part)
    return visible(", ".join(parts))
