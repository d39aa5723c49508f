"""The files of several arms compared: the most wanted of those that keep the promise is put where it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from s2d.errors import InputError
from s2d.experiments.auto.candidates import Objective, cost
from s2d.experiments.auto.search_records import put, with_companions
from s2d.experiments.auto.verdict import Row, Verdict


def best_of(verdicts: Mapping[str, Verdict], objective: Objective) -> str | None:
    """The name of the verdict with the smallest (or fastest) accepted file; None where no promise is met."""

    def wanted(name: str) -> float:
        row: Row = next(row for row in reversed(verdicts[name].frontier) if row.accepted)
        return cost(row.bytes, 1.0 / row.speedup if row.speedup else None, objective)

    return min((name for name, each in verdicts.items() if each.status == "MET"), key=wanted, default=None)


def publish_best(verdicts: Mapping[str, Verdict], objective: Objective, target: Path) -> str:
    """Put the most wanted file of all arms at a path, and remove an old one where there is none.

    Returns:
        What happened, in one line.

    Raises:
        InputError: The path cannot be written.
    """
    name = best_of(verdicts, objective)
    try:
        for old in with_companions(target):
            old.unlink(missing_ok=True)
        if name is None:
            return f"{target} is not written: no arm keeps the promise"
        source = Path(verdicts[name].file or "")
        target.parent.mkdir(parents=True, exist_ok=True)
        for part in reversed(with_companions(source)):
            put(part, target.with_suffix(part.suffix))
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error
    return f"{target}: the {objective} file, of {name}"
