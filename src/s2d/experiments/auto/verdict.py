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
        name: The candidate's label.
        file: Its path below the folder of the search.
        bytes: Size on disk, weights beside the file included.
        ms: Milliseconds of one row on one thread; None where the file was not run.
        speedup: Speed relative to full precision in the same runtime; None likewise.
        score: Score of the file on the acceptance data; of the simulation where the file was not run.
        drop: Drop from full precision.
        accepted: Whether its drop is surely within the promise.
        ran: Whether it ran in its runtime.
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
    """The outcome of a promise.

    Attributes:
        status: ``MET``: `file` keeps the promise. ``NOT SURE``: no file surely keeps it. ``NOT MET``: the files that
            were tried surely break it.
        file: The result, None unless the promise is met.
        runtime: The runtime of the file.
        metric: The task's metric.
        full: Value of the metric in full precision.
        within: Points that may be lost.
        split: The acceptance data.
        examples: Number of examples in it.
        frontier: Every file that was judged, in the order of judging.
        help: One sentence on what would help.
        notes: Further messages for the user.
        seconds: Total time of all calls.
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
        """Exit code of the command: 0, 3 or 4."""
        return EXIT_CODES[self.status]

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "exit_code": self.exit_code}

    @property
    def lines(self) -> list[str]:
        """The verdict as lines of text for people."""
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
    """The status of a promise from the judged files.

    Args:
        accepted: Whether a file was accepted.
        drops: Drops of all judged files.
        within: Points that may be lost.
        ran: Whether the files ran in their runtime.
    """
    if accepted and ran:
        return "MET"
    return "NOT MET" if drops and all(drop.beyond(within) for drop in drops) else "NOT SURE"


def what_would_help(
    status: Status, nearest: Drop | None, within: float, split: str, *, trained: bool, stopped: bool, next: Drop | None
) -> str:
    """One sentence of advice.

    Args:
        status: The status.
        nearest: The smallest drop among files that were not accepted.
        within: Points that may be lost.
        split: The acceptance data.
        trained: Whether a model was trained with the quantizers in place.
        stopped: Whether the time ended before the ladder.
        next: Drop of the file that ended the sequence after an accepted one.
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
