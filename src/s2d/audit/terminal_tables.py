"""Audits as tables for the terminal; columns that do not fit are left out, the least important ones first."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.table import Table

from s2d.errors import visible

if TYPE_CHECKING:
    pass

_NONE = "–"
_SPACING = 2


@dataclass
class _Column:
    heading: str
    cells: list[str]
    rank: int = 0  # 0: always shown; of the others the highest rank is left out first
    right: bool = True

    @property
    def width(self) -> int:
        return max(map(cell_len, [self.heading, *self.cells])) + _SPACING


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


def bars(rows: Sequence[tuple[str, float]], width: int = 30) -> list[str]:
    """A bar chart, a line for each label and value (none negative); the longest bar has `width` characters."""
    longest, wide = max((value for _, value in rows), default=0.0), max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        bar = "█" * max(1, round(width * value / longest)) if value > 0 else ""
        lines.append(f"  {name:<{wide}}  {bar:<{width}}  {short(value)}")
    return lines


def short(value: float | None) -> str:
    """Three significant digits; more only where they stand before the decimal point."""
    if value is None:
        return _NONE
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(value: float | None) -> str:
    """Two decimals."""
    return _NONE if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    """One decimal."""
    return _NONE if value is None else f"{100 * value:.1f} %"
