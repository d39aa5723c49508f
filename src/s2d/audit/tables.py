"""Audits as tables for the terminal; columns that do not fit are left out, the least important ones first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.table import Table

from s2d.errors import visible

if TYPE_CHECKING:
    from s2d.audit.results import Audit, Trend

_NONE = "–"
_SPACING = 2


@dataclass
class _Column:
    heading: str
    cells: list[str]
    rank: int = 0  # 0: always shown; of the others the highest goes first
    right: bool = True

    @property
    def width(self) -> int:
        return max(map(cell_len, [self.heading, *self.cells])) + _SPACING


def audit_table(audit: Audit, n: int, width: int | None = None) -> Table:
    """The n worst rows; ``data`` heads the PCDR of the outputs' principal directions."""
    rows = audit.worst(n)

    def column(heading: str, rank: int, get: Callable[[Any], Any], show: Callable[[Any], str]) -> _Column:
        return _Column(heading, [show(get(row)) for row in rows], rank)

    columns = [
        _Column("weight", [row.weight.removesuffix(".weight") for row in rows], right=False),
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
        _Column("selected", [f"{r.selected_by}, {r.components}" if r.selected else "" for r in rows], right=False),
    ]
    title = f"{audit.model}: few components make the outliers of {len(audit.selected)} of {len(audit.rows)} weights"
    table = _fitting(title, columns, width, bold=[row.selected for row in rows])
    if audit.missed:
        listed = ", ".join(list(audit.missed)[:3]) + (", ..." if len(audit.missed) > 3 else "")
        table.caption = f"{len(audit.missed)} weights without activations: {listed}"
    return table


def trend_table(trend: Trend, n: int, width: int | None = None) -> Table:
    """The n weights that stand out most in any checkpoint, below a row for all: medians, and the worst ``out/RMS``."""
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


def _fitting(title: str, columns: Sequence[_Column], width: int | None, bold: Sequence[bool]) -> Table:
    room = shutil.get_terminal_size().columns if width is None else width
    shown = list(columns)
    while sum(column.width for column in shown) > room and any(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    table = Table(
        title=visible(title), box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left"
    )
    for column in shown:
        first = column is shown[0]
        justify = "right" if column.right else "left"
        table.add_column(column.heading, justify=justify, no_wrap=not first, overflow="fold")
    for index, heavy in enumerate(bold):
        table.add_row(*(visible(column.cells[index]) for column in shown), style="bold" if heavy else None)
    return table


def ranked(values: Sequence[float] | None, rank: int = 1) -> float | None:
    """The value of a rank, or of the last one there is."""
    return values[min(rank, len(values)) - 1] if values else None


def short(value: float | None) -> str:
    """Three digits; more where they are before the point."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: float | None) -> str:
    """Two decimals."""
    return _NONE if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """One decimal."""
    return _NONE if value is None else f"{100 * value:.1f} %"
