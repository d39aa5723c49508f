"""The layer map: depth by role, coloured by one measure at a time, several checkpoints on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2d.report.formatting import percent, ratio, two_decimals

if TYPE_CHECKING:
    from s2d.report.schema import Audit, Weight


@dataclass(frozen=True)
class Measure:
    """Something the map can be coloured by. Larger is always worse."""

    key: str
    name: str
    explanation: str
    logarithmic: bool
    kind: str  # "share", "ratio" or "error": how its numbers are written

    def write(self, value: float) -> str:
        """A value of this measure in words."""
        return {"share": two_decimals, "ratio": ratio, "error": percent}[self.kind](value)


MEASURES = (
    Measure("pcdr_1", "PCDR₁", "share of the outliers that the first singular component makes", False, "share"),
    Measure("sigma_over_median", "σ₁ / median σ", "how far the leading singular value stands out", True, "ratio"),
    Measure("output_ratio", "output max / RMS", "how far the largest output stands out", True, "ratio"),
    Measure("input_ratio", "input max / RMS", "how far the largest input stands out", True, "ratio"),
    Measure(
        "w4a4_error",
        "W4A4 error",
        "relative error of the typical output channel when only this weight and its input are quantized",
        False,
        "error",
    ),
)

# Cividis (Nunez, Anderton, Renslow 2018), made to look alike with and without colour blindness; nine of its colours.
_CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838")


@dataclass(frozen=True)
class Cell:
    """One place of the map. Two weights of one role in one block share it; the worse one is shown."""

    weight: str
    value: str
    tip: str
    background: str
    ink: str
    selected: bool


@dataclass(frozen=True)
class Map:
    """One measure over one checkpoint: rows from first to last block, then (role, cell) of what is in no block."""

    label: str
    roles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    outside: tuple[tuple[str, Cell], ...]


@dataclass(frozen=True)
class Layer:
    """One measure over all checkpoints, with its colour scale in words."""

    measure: Measure
    maps: tuple[Map, ...]
    low: str
    middle: str
    high: str


def gradient() -> str:
    """The colour scale as CSS, for the legend."""
    return "linear-gradient(90deg, " + ", ".join(_CIVIDIS) + ")"


def colour(share: float) -> tuple[str, str]:
    """(background, ink) at ``share`` in [0, 1] of the scale; the ink is the readable one of black and white."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    index = min(int(place), len(_CIVIDIS) - 2)
    first, second = (_channels(_CIVIDIS[index + offset]) for offset in (0, 1))
    mixed = [round(a + (b - a) * (place - index)) for a, b in zip(first, second, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#000" if _luminance(mixed) > 0.18 else "#fff"


def _channels(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _luminance(channels: Sequence[int]) -> float:
    """Relative luminance as WCAG 2 defines it; 0.18 is where black and white ink read equally well."""
    straight = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * straight[0] + 0.7152 * straight[1] + 0.0722 * straight[2]


def layers(audits: Sequence[Audit]) -> list[Layer]:
    """A map per measure that was taken, and per checkpoint."""
    result = []
    for measure in MEASURES:
        values = [
            value
            for audit in audits
            for weight in audit.weights
            if math.isfinite(value := weight.values.get(measure.key, math.nan))
        ]
        if not values:
            continue
        low, high = _range(measure, values)
        middle = math.sqrt(low * high) if measure.logarithmic else (low + high) / 2
        maps = tuple(_map(audit, measure, low, high) for audit in audits)
        result.append(Layer(measure, maps, measure.write(low), measure.write(middle), measure.write(high)))
    return result


def _range(measure: Measure, values: Sequence[float]) -> tuple[float, float]:
    if measure.kind == "share":
        return (0.0, 1.0)
    if measure.logarithmic:
        low = max(min(values), 1e-12)
        return (low, max(max(values), low * 1.01))
    return (0.0, max(*values, 1e-12) if len(values) > 1 else max(values[0], 1e-12))


def _share(measure: Measure, value: float, low: float, high: float) -> float:
    if measure.logarithmic:
        return (math.log(max(value, low)) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


def _map(audit: Audit, measure: Measure, low: float, high: float) -> Map:
    inside = [weight for weight in audit.weights if weight.depth is not None]
    roles = tuple(dict.fromkeys(weight.role for weight in inside))
    rows = []
    for depth in sorted({weight.depth for weight in inside if weight.depth is not None}):
        cells = []
        for role in roles:
            members = [weight for weight in inside if weight.depth == depth and weight.role == role]
            cells.append(_cell(members, measure, low, high) if members else None)
        rows.append((str(depth), tuple(cells)))
    outside = [weight for weight in audit.weights if weight.depth is None]
    beside = tuple((weight.role, _cell([weight], measure, low, high)) for weight in outside)
    return Map(audit.label, roles, tuple(rows), beside)


def _cell(members: Sequence[Weight], measure: Measure, low: float, high: float) -> Cell:
    worst = max(members, key=lambda weight: weight.values.get(measure.key, -math.inf))
    value = worst.values.get(measure.key, math.nan)
    background, ink = ("", "") if math.isnan(value) else colour(_share(measure, value, low, high))
    more = f" (the worst of {len(members)} here)" if len(members) > 1 else ""
    return Cell(
        weight=worst.name,
        value=measure.write(value).replace("\u202f", ""),
        tip=f"{worst.name}{more}: {measure.name} {measure.write(value)}" + (", selected" if worst.selected else ""),
        background=background,
        ink=ink,
        selected=any(weight.selected for weight in members),
    )
