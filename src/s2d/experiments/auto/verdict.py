"""The verdict on a promise: MET, NOT SURE or NOT MET, the file if there is one, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from s2d.experiments.auto.acceptance import Drop

Status = Literal["MET", "NOT SURE", "NOT MET"]
EXIT_CODES: dict[Status, int] = {"MET": 0, "NOT SURE": 3, "NOT MET": 4}


@dataclass(frozen=True)
class Row:
    """One file of the frontier.

    Attributes:
        name: The candidate, for people.
        file: Where it is, below the folder of the search.
        bytes: On disk, weights beside the file included.
        ms: One row on one thread; None where the file was not run.
        speedup: Against full precision in the same runtime; None likewise.
        score: Of the file, on the acceptance data; of the simulation where the file was not run.
        drop: From full precision.
        accepted: Its drop is within the promise, for sure.
        ran: In its runtime.
    """

    name: str
    file: str
    bytes: int
    ms: float | None
    speedup: float | None
    score: float
    drop: Drop
    accepted: bool
    ran: bool


@dataclass
class Verdict:
    """What became of a promise.

    Attributes:
        status: ``MET``: `file` keeps the promise. ``NOT SURE``: no file does for sure. ``NOT MET``: those that were
            tried surely do not.
        file: The result, None unless the promise is met.
        runtime: Where it runs.
        metric: Of the task.
        full: Its value in full precision.
        within: Points that may be lost.
        split: The acceptance data.
        examples: How many there are.
        frontier: Every file that was judged, in the order of judging.
        help: One sentence on what would help.
        notes: What the user should know besides.
        seconds: Of all calls together.
    """

    status: Status
    file: str | None
    runtime: str
    metric: str
    full: float
    within: float
    split: str
    examples: int
    frontier: list[Row] = field(default_factory=list)
    help: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """Of the command: 0, 3 or 4."""
        return EXIT_CODES[self.status]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "exit_code": self.exit_code}

    @property
    def lines(self) -> list[str]:
        """For people."""
        told = [f"{self.status}: {self._sentence}"]
        told += [_line(row, self.within) for row in self.frontier]
        return [*told, *self.notes, *([self.help] if self.help else [])]

    @property
    def _sentence(self) -> str:
        data = f"{self.examples} examples of {self.split}, {self.metric} {self.full:.2f} in full precision"
        named = [row for row in self.frontier if row.accepted]
        if self.status != "MET" or not named:
            return f"no file is named that loses at most {self.within:g} points for sure ({data})"
        row = named[-1]
        speed = "" if row.speedup is None else f", {row.speedup:.2f} times as fast as full precision"
        return (
            f"{self.file} loses {row.drop.points:.2f} points, at most {row.drop.upper:.2f} with {row.drop.level:.0%} "
            f"certainty, of {self.within:g} ({data}); {row.bytes / 1e6:.1f} MB{speed} in {self.runtime}"
        )


def _line(row: Row, within: float) -> str:
    time = "not run" if row.ms is None else f"{row.ms:.1f} ms"
    speed = "" if row.speedup is None else f" ({row.speedup:.2f}x)"
    judged = "within" if row.accepted else "surely beyond" if row.drop.beyond(within) else "not surely within"
    return (
        f"  {row.file}: {row.bytes / 1e6:.1f} MB, {time}{speed}, {row.drop.points:+.2f} points lost "
        f"({row.drop.lower:+.2f} to {row.drop.upper:+.2f}), {judged} {within:g}"
    )


def status_of(accepted: bool, drops: Sequence[Drop], within: float, ran: bool) -> Status:
    """The verdict on what was judged.

    Args:
        accepted: A file was accepted.
        drops: Of all files that were judged.
        within: The promise.
        ran: The files ran in their runtime.
    """
    if accepted and ran:
        return "MET"
    return "NOT MET" if drops and all(drop.beyond(within) for drop in drops) else "NOT SURE"


def what_would_help(
    status: Status, nearest: Drop | None, within: float, split: str, *, trained: bool, stopped: bool, next: Drop | None
) -> str:
    """One sentence.

    Args:
        status: The verdict.
        nearest: The least drop that was seen, among files that were not accepted.
        within: The promise.
        split: The acceptance data.
        trained: A model was trained with the quantizers in place.
        stopped: The time ended before the ladder did.
        next: The drop of the file at which the sequence ended, behind an accepted one.
    """
    if status == "MET":
        if next is None:
            return ""
        needed = next.examples_needed(within)
        if needed is not None:
            more = _examples(needed, next, split)
            return f"A still better file lost {next.points:.2f} points; {more} would decide on it."
        return f"The next file lost {next.points:.2f} points; {_training(trained)} may bring it within {within:g}."
    if nearest is None:
        return "More minutes would help: no file was judged yet."
    needed = nearest.examples_needed(within)
    if status == "NOT SURE" and needed is not None:
        more = _examples(needed, nearest, split)
        return f"{more.capitalize()} would decide on a drop like this ({nearest.points:.2f} points)."
    if stopped:
        return "More minutes would help: the ladder was not tried to its end; the same command continues."
    return f"{_training(trained).capitalize()} may help, or a promise of {max(nearest.upper, 0.0):.1f} points."


def _examples(needed: int, drop: Drop, split: str) -> str:
    return f"about {needed - drop.examples:,} more examples in {split} ({needed:,} instead of {drop.examples:,})"


def _training(trained: bool) -> str:
    return "more minutes of training with the quantizers in place" if trained else "training (--minutes 20)"
