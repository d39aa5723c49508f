"""Rounds: which of the judged files are accepted, and which of those is the result.

A round is an order of candidates, the safest first, fixed before any of them is scored on the acceptance data. Its
files are accepted up to the first whose drop is not surely within the promise; `acceptance` explains why this is valid.
"""

from __future__ import annotations

from s2d.experiments.auto.acceptance import Drop, level_of, paired_drop
from s2d.experiments.auto.candidates import Candidate, Objective, cost
from s2d.experiments.auto.search_records import Records
from s2d.experiments.auto.verdict import Row
from s2d.tasks.base import Outcomes


class Rounds:
    """The state of a promise, from the records."""

    def __init__(
        self,
        records: Records,
        safest: Candidate,
        full: Outcomes,
        within: float,
        objective: Objective,
        higher_is_better: bool,
    ) -> None:
        """Read the records; later changes of them are seen too.

        Args:
            records: The records of the search.
            safest: The candidate that is judged before the first round.
            full: The full-precision model's outcomes.
            within: Points that may be lost.
            objective: ``"smallest"`` or ``"fastest"``.
            higher_is_better: Whether a higher metric is better.
        """
        self.records, self.safest, self.full, self.within = records, safest, full, within
        self.objective: Objective = objective
        self.higher = higher_is_better

    @property
    def orders(self) -> list[list[Candidate]]:
        """Every round, the first of them with the safest candidate, which is judged before any is planned."""
        rounds = self.records.rounds
        planned = any(each.key == self.safest.key for order in rounds for each in order)
        return rounds if planned else [[self.safest], *rounds]

    def level(self, number: int) -> float:
        """The level of a round's bounds (from 0); examples that became more count as rounds."""
        return level_of(number + 1 + self.records.extended)

    def drop(self, candidate: Candidate, number: int) -> Drop:
        """The drop of a judged file, with bounds at the level of a round (from 0)."""
        outcomes = self.records.outcomes(candidate.key)
        assert outcomes is not None, "a file is recorded after its outcomes"
        return paired_drop(self.full, outcomes, self.higher, self.level(number))

    @property
    def accepted(self) -> dict[str, Drop]:
        """The drops of the accepted files, by the candidate's key."""
        found = {}
        for number, order in enumerate(self.orders):
            for candidate in self._made(order):
                if candidate.key not in self.records.files:
                    break
                drop = self.drop(candidate, number)
                if not drop.within(self.within):
                    break
                found.setdefault(candidate.key, drop)
        return found

    @property
    def finished(self) -> bool:
        """Whether every round ended: at its last file, or at the first that was not accepted."""
        accepted = self.accepted
        for order in self.orders:
            waiting = next((each for each in self._made(order) if each.key not in accepted), None)
            if waiting is not None and waiting.key not in self.records.files:
                return False
        return True

    @property
    def chosen(self) -> Candidate | None:
        """The most wanted accepted file that ran; None if there is none."""
        files = [self.records.files[key] for key in self.accepted]
        return min((each.candidate for each in files if each.ran), key=self._preference, default=None)

    @property
    def wanted_most(self) -> bool:
        """Whether the last file of a round was accepted, so that no better file is left."""
        accepted = self.accepted
        return any(
            made[-1].key in accepted for order in self.records.rounds or [[self.safest]] if (made := self._made(order))
        )

    def too_few(self, split: str) -> str | None:
        """A message if there are too few examples to accept any file, even one that changes nothing."""
        best = paired_drop(self.full, self.full, self.higher, self.level(0))
        if best.within(self.within):
            return None
        needed = best.examples_needed(self.within)
        number = "more than a million" if needed is None else f"about {needed:,}"
        return (
            f"{len(self.full.values)} examples of {split} cannot show a drop of at most {self.within:g} points: "
            f"even a file that changes nothing needs {number}"
        )

    def rows(self) -> list[Row]:
        """Every judged file, in the order of judging; the chosen one is the last of the accepted ones."""
        accepted = self.accepted
        found: dict[str, Row] = {}
        for number, order in enumerate(self.orders):
            for candidate in order:
                if candidate.key in self.records.files and candidate.key not in found:
                    drop = accepted.get(candidate.key) or self.drop(candidate, number)
                    found[candidate.key] = self._row(candidate, drop, candidate.key in accepted)
        if self.chosen is not None:
            found[self.chosen.key] = found.pop(self.chosen.key)
        return list(found.values())

    def _made(self, order: list[Candidate]) -> list[Candidate]:
        return [each for each in order if each.key not in self.records.refused]

    def _row(self, candidate: Candidate, drop: Drop, accepted: bool) -> Row:
        file, outcomes = self.records.files[candidate.key], self.records.outcomes(candidate.key)
        assert outcomes is not None
        speedup = file.full_ms / file.ms if file.ms and file.full_ms else None
        return Row(candidate.label, file.file, file.bytes, file.ms, speedup, outcomes.score(), drop, accepted, file.ran)

    def _preference(self, candidate: Candidate) -> float:
        file = self.records.files[candidate.key]
        return cost(file.bytes, file.ms / file.full_ms if file.ms and file.full_ms else None, self.objective)
