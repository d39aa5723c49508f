"""Progress and result tables in the terminal. No torch."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from s2d.errors import visible
from s2d.report.summary import Group, groups, label, rivals

LINE_EVERY = 30.0  # seconds between two lines where the output is not a terminal
RECENT = 20  # number of latest parts from which the time left is estimated


class Watch:
    """Shows progress: a bar with the time left on a terminal, lines at intervals in a log, nothing when quiet."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self.task: TaskID | None = None
        self.text, self.total, self.spoke, self.end = "", 0, 0.0, math.inf
        self.times: deque[tuple[int, float]] = deque([(0, 0.0)], maxlen=RECENT)

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def stage(self, text: str, total: int, seconds: float = math.inf) -> None:
        """Begin a stage of this many parts, which ends after so many seconds at the latest."""
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(text, total=total, note="")
        self.text, self.total = text, total
        self.spoke = time.monotonic()
        self.end = self.spoke + seconds
        # The first part of a stage takes longer: it is left out as soon as there is another.
        self.times = deque([(0, self.spoke)], maxlen=RECENT)

    def advance(self, done: int, note: str = "") -> None:
        """Report the number of finished parts of the stage."""
        now = time.monotonic()
        if self.task is not None:
            most = f"at most {max(self.end - now, 0.0):.0f} s " if self.end < math.inf else ""
            self.bar.update(self.task, completed=done, note=f"{most}{note}")
        if done > self.times[-1][0]:
            self.times.append((done, now))
        if self.quiet or self.console.is_terminal or now - self.spoke < LINE_EVERY or not 0 < done < self.total:
            return
        self.spoke = now
        since, began = self.times[1 if len(self.times) > 2 and self.times[0][0] == 0 else 0]
        left = min((now - began) / (done - since) * (self.total - done), max(self.end - now, 0.0))
        self.say(f"{self.text} {done}/{self.total}, {note + ', ' if note else ''}about {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line to keep."""
        if not self.quiet:
            self.console.print(visible(text, 1500), highlight=False, markup=False, emoji=False, soft_wrap=True)


def comparison(results: Mapping[str, Any]) -> list[Table]:
    """One table for each task and metric of a run: a row per bit width and calibrator, a column per arm."""
    from s2d.report.schema import read_results

    return [_table(group) for group in groups(read_results(results).records)]


def _table(group: Group) -> Table:
    split = next((record.split for record in group.records if record.split), "")
    table = Table(title=f"{group.task} · {group.model} · {group.metric}" + (f" ({split})" if split else ""))
    table.add_column("bits")
    table.add_column("calibrator")
    for name in group.conditionings:
        table.add_column(label(name), justify="right")
    pair = rivals(group)
    if pair is not None:
        table.add_column("gain", justify="right")
    for spec in group.specs:
        quantizers = list(dict.fromkeys(record.quantizer for record in group.records if record.spec == spec))
        rows: list[tuple[str, str | None]] = [(quantizer.rpartition(" · ")[2], quantizer) for quantizer in quantizers]
        if len(rows) > 1:
            rows.append(("mean", None))
        for name, quantizer in rows:
            cells = [_cell(group.values(arm, spec, quantizer)) for arm in group.conditionings]
            if pair is not None:
                cells.append(_gain(group, pair, spec, quantizer))
            bits = spec.upper() if name == rows[0][0] else ""
            last = name == rows[-1][0]
            table.add_row(bits, name, *cells, style="bold" if name == "mean" else None, end_section=last)
    return table


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _gain(group: Group, pair: tuple[str, str], spec: str, quantizer: str | None) -> str:
    before, after = (group.values(arm, spec, quantizer) for arm in pair)
    if not before or not after:
        return "–"
    difference = statistics.fmean(after) - statistics.fmean(before)
    return f"{difference if group.higher_is_better else -difference:+.2f}"
