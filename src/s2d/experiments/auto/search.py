"""The search: candidates in simulation, files in their runtime, and a verdict on the promise.

    the safest candidate becomes a file                            # so that a file stands early
    full precision, and that file in its runtime, on the acceptance data
    the ladder (`climbing`): candidates in simulation, the one of greatest expected gain per minute next
    a round: the candidates worth a file, the safest first, judged one by one until the first that fails
    where time is left and the most wanted was not accepted: repair, and another round; twice

Only judged files are scored on the acceptance data (a split). Results are kept after every step.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s2d import quant
from s2d.errors import InputError
from s2d.experiments.auto.candidates import Candidate, Objective, tables_of
from s2d.experiments.auto.climbing import Climbing
from s2d.experiments.auto.judging import Judge, Judged, outcomes_on
from s2d.experiments.auto.ladder import first, scored_specs
from s2d.experiments.auto.promise import Promise
from s2d.experiments.auto.repair import repaired
from s2d.experiments.auto.rounds import Rounds
from s2d.experiments.auto.search_records import CANDIDATES, File, Records, with_companions
from s2d.experiments.auto.simulation import Simulation, as_in_file
from s2d.experiments.auto.verdict import Verdict, status_of, what_would_help
from s2d.experiments.watcher import Silent, Watcher
from s2d.export import example_of, export
from s2d.export.onnx import write_onnx
from s2d.io.files import sweep
from s2d.io.folder_lock import locked
from s2d.models import Loaded, fingerprint
from s2d.models.saved import save_parts
from s2d.tasks import Split, Task
from s2d.tasks.base import Outcomes

REPAIRS = ("conditioning", "training")
_TRAINING = 120.0  # seconds below which no repair begins
_RESERVED = 0.5  # of the time, for judging
_MORE = 1.5  # times the examples that would accept the safest file: its drop is an estimate, and is held to more
_MOST_ROUNDS = 4  # with the repairs' two


def auto(
    loaded: Loaded,
    model: nn.Module,
    task: Task,
    *,
    runtime: str,
    within: float,
    out: str | Path,
    minutes: float | None = None,
    objective: Objective = "smallest",
    split: Split = "validation",
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Verdict:
    """The smallest or the fastest file for a runtime that loses at most so many points.

    Args:
        loaded: Source of the model (`s2d.load`): its tokenizer is stored with the file.
        model: The task's model in full precision: from ``task.build``, or `s2d.tasks.evaluation.model_for`.
        task: Its data and metric.
        runtime: A name from `s2d.export.runtime.runtimes`.
        within: Points of the task's metric that may be lost.
        out: The folder of the search. A file that keeps the promise is ``out/model.*``; without one there is none.
        minutes: Approximate time limit; training is tried only with a limit. None for the whole ladder.
        objective: ``"smallest"`` or ``"fastest"``.
        split: The acceptance data; the search never sees it.
        seed: Seed of all random numbers.
        watcher: Receives the progress.

    Returns:
        The verdict.

    Raises:
        InputError: The request cannot be carried out; raised before any work.
    """
    promise = Promise.parse(runtime, within, minutes, objective, split)
    return Search(loaded, model, task, promise, Path(out), seed, watcher or Silent()).run()


class Search:
    """One promise in one folder."""

    def __init__(
        self,
        loaded: Loaded,
        model: nn.Module,
        task: Task,
        promise: Promise,
        out: Path,
        seed: int,
        watcher: Watcher,
    ) -> None:
        """Check that the promise can be tried with this task.

        Raises:
            InputError: See `Promise.refuse_task`.
        """
        self.began = time.monotonic()
        self.loaded, self.model, self.task, self.promise, self.out = loaded, model.eval(), task, promise, out
        self.runtime, self.seed, self.watcher = promise.runtime, seed, watcher
        promise.refuse_task(task)
        self.runs = self.runtime.installed
        self.simulation = Simulation(model, task, seed)
        self.examples = self.simulation.affordable(promise.split, promise.minutes, promise.within)
        self.tables = max(self.runtime.embedding_bits) if tables_of(model) else 0
        self.climbing = Climbing(model, self.runtime, self.simulation, promise, self.tables, watcher)
        self.safest = first(self.runtime, self.tables, self.climbing.legal)
        self.records = Records(out, {})  # until `run` opens the folder
        self._judge: Judge | None = None
        self._slowest = 0.0
        self._stopped = False

    def beginning(self) -> list[tuple[Candidate, int, str | None]]:
        """The candidates that need no scores, with their predicted bytes and, if one is not legal, the reason."""
        found = [self.safest, *(Candidate(each, "rtn", self.tables, "ranges") for each in scored_specs(self.runtime))]
        once = {each.key: each for each in found}.values()
        return [(each, self.climbing.bytes(each), self.climbing.complaint(each)) for each in once]

    def expected_seconds(self) -> float:
        """Estimate the time of the whole search from the time of one forward."""
        return self.simulation.expected_seconds(self.examples)

    # -- the work

    def run(self) -> Verdict:
        """Do all missing work within the time limit."""
        with locked(self.out):
            self.records = Records.open(self.out, self.key())
            self.examples = self.records.examples = self.records.examples or self.examples
            sweep(self.out, age=0.0)  # left by a killed call; no other process uses this folder
            self._slowest = max((each.seconds for each in self.records.files.values()), default=0.0)
            (self.out / CANDIDATES).mkdir(parents=True, exist_ok=True)
            self._refuse_full_disk(self.safest)
            self.records.write()
            self._begin()
            self.full = self._full()
            higher = self.task.higher_is_better
            within, objective = self.promise.within, self.promise.objective
            self.rounds = Rounds(self.records, self.safest, self.full, within, objective, higher)
            if (told := self.rounds.too_few(self.promise.split)) is not None:
                self.watcher.say(told)
            save_parts(self.out / "model.inputs", self.loaded.tokenizer, self.loaded.processor)
            with tempfile.TemporaryDirectory(prefix=".judging-", dir=self.out) as scratch:
                self._scratch = Path(scratch)
                self._decide()  # judge the existing files by the promise of this call
                try:
                    self._work()
                finally:
                    self.records.seconds += time.monotonic() - self.began
                    self.records.write()
            return self._verdict()

    def _begin(self) -> None:
        """Write the safest file; if that fails, `_file` says why when it is judged."""
        complaint = self.climbing.complaint(self.safest)
        if complaint is not None:
            raise InputError(complaint)
        try:
            self._write(self.safest)
        except InputError as error:
            if isinstance(error.__cause__, OSError):
                raise

    def _work(self) -> None:
        self._file(self.safest)
        self._score_more()
        self._decide()
        self._judge_rounds()
        hopeless = self.safest.key in self.records.files and self.safest.key not in self.rounds.accepted
        climbed, within = self.records.climbed, self.promise.within
        # Where the safest is not accepted, every round would end with it; what a looser promise found is enough.
        while not (hopeless or self._stopped or (max(climbed, default=0.0) >= within and self.rounds.wanted_most)):
            ended = within in climbed or self.climbing.climb(self.records, lambda: self._left() - self._reserve())
            if ended and within not in climbed:
                climbed.append(within)
            planned = self._next_round()
            if not planned:
                break
            self._plan_round(planned)
            self._judge_rounds()
            self._stopped = self._stopped or not ended
        if hopeless and not self.rounds.drop(self.safest, 0).beyond(within):
            return  # what is too few are the examples
        for kind in REPAIRS:
            if self.rounds.wanted_most or self._left() <= _TRAINING + 2 * self._slowest or self.promise.minutes is None:
                break
            if kind not in self._repairs_done():
                self._repair(kind)

    def _score_more(self) -> None:
        """Take more examples where they cannot tell whether the safest file keeps the promise, and judge it again."""
        if self.safest.key not in self.records.files or self.safest.key in self.rounds.accepted:
            return
        needed = self.rounds.drop(self.safest, 0).examples_needed(self.promise.within)
        most = self.task.sizes()[self.promise.split]
        if self.promise.minutes is not None:
            most = min(most, self.simulation.scored_in(self._left() / 2, scorings=2))
        wanted = 0 if needed is None else min(most, math.ceil(_MORE * needed))
        if wanted <= self.examples:
            return
        self.watcher.say(f"{self.examples} examples cannot decide on the safest file; {wanted} are scored instead")
        self.examples, self._judge = wanted, None
        self.records.extend(wanted)
        self.full = self.rounds.full = self._full()
        self._file(self.safest)

    def _next_round(self) -> list[Candidate]:
        """The candidates to judge next, the safest first: at first all that are worth a file, later those between the
        best accepted and the first that failed, if they were not judged (for an earlier, less strict promise).
        """
        worth = self.climbing.worth_a_file(self.records)
        if not self.records.rounds:
            return [self.safest, *worth]
        if len(self.records.rounds) >= _MOST_ROUNDS:
            return []
        accepted, chosen = self.rounds.accepted, self.rounds.chosen
        forecast = self.climbing.forecast(self.records)
        failed = [forecast.error(each.candidate) for key, each in self.records.files.items() if key not in accepted]
        saved = -math.inf if chosen is None else forecast.saving(chosen)
        return [
            each
            for each in worth
            if each.key not in self.records.files
            and forecast.error(each) < min(failed, default=math.inf)
            and forecast.saving(each) > saved
        ]

    def _repairs_done(self) -> set[str]:
        """The kinds of repair that were judged."""
        return {each.rung for planned in self.records.rounds for each in planned if each.repaired}

    def _reserve(self) -> float:
        """Seconds kept for judging."""
        limit = self.promise.minutes
        return 0.0 if limit is None else max(_RESERVED * 60.0 * limit, 2.0 * self._slowest)

    def key(self) -> dict[str, Any]:
        """What all results of a folder depend on."""
        return {
            "model": fingerprint(self.model),
            "data": self.task.fingerprint,
            "length": self.task.tokens,
            "task": self.task.name,
            "runtime": self.runtime.name,
            "split": self.promise.split,
            "seed": self.seed,
            "objective": self.promise.objective,
        }

    def _left(self) -> float:
        """Seconds left; infinite without a limit (then nothing is trained)."""
        if self.promise.minutes is None:
            return math.inf
        return 60.0 * self.promise.minutes - (time.monotonic() - self.began)

    def _full(self) -> Outcomes:
        kept = self.records.outcomes("full")
        if kept is None or len(kept.values) != self.examples:
            self.watcher.stage(f"full precision on {self.promise.split}", 1)
            kept = outcomes_on(self.model, self.task, self.promise.split, self.examples)
            self.records.save_outcomes("full", kept)
        if not math.isfinite(kept.score()):
            raise InputError(f"{self.loaded.source} has {self.task.primary} {kept.score()} in full precision")
        self.watcher.say(
            f"{self.task.primary} in full precision: {kept.score():.2f} ({self.examples} of {self.promise.split})"
        )
        return kept

    def _refuse_full_disk(self, candidate: Candidate) -> None:
        """Refuse to begin a file for which there is no space: its own, and full precision's for the comparison."""
        plain = sum(4 * each.numel() for each in self.model.parameters())
        needed, free = 3 * self.climbing.bytes(candidate) + plain, shutil.disk_usage(self.out).free
        if free < needed:
            raise InputError(
                f"{self.out} has {free / 1e6:,.0f} MB free, and a candidate needs about {needed / 1e6:,.0f} MB; free "
                "some space or choose another --out; what is done is kept"
            )

    # -- files

    def _plan_round(self, candidates: Sequence[Candidate]) -> None:
        planned = list({each.key: each for each in candidates}.values())
        self.records.rounds.append(planned)
        self.records.write()

    def _judge_rounds(self) -> None:
        for number, planned in enumerate(self.records.rounds):
            self.watcher.stage(f"round {number + 1}: files", len(planned), self._left())
            for done, candidate in enumerate(planned):
                if candidate.key not in self.records.files and candidate.key not in self.records.refused:
                    if self._left() < self._slowest:
                        self._stopped = True
                        return
                    self.watcher.advance(done, candidate.label)
                    self._file(candidate)
                    self._decide()
                judged = candidate.key in self.records.files
                if judged and not self.rounds.drop(candidate, number).within(self.promise.within):
                    break

    def _write(self, candidate: Candidate) -> tuple[Path, nn.Module | None]:
        """Export a candidate, unless its file is there.

        Returns:
            The file, and its model where that was made or is needed.
        """
        target = self.out / CANDIDATES / f"{candidate.key}{self.promise.suffix}"
        if self.runs and target.with_suffix(".json").is_file():  # the report comes last
            return target, None
        complaint = self.climbing.complaint(candidate)
        if complaint is not None:
            raise InputError(complaint)
        made = self.simulation.quantized(candidate, self.out / CANDIDATES / candidate.key)
        example, tables = self._example(), candidate.embeddings
        export(made, target, example=example, embeddings=tables, time_it=False, describe=False)
        self.watcher.say(f"{CANDIDATES}/{target.name} stands after {time.monotonic() - self.began:.0f} s")
        return target, made

    def _file(self, candidate: Candidate) -> None:
        """Make a candidate's file and judge it, unless this was done before."""
        if candidate.key in self.records.files or candidate.key in self.records.refused:
            return
        start = time.monotonic()
        self._refuse_full_disk(candidate)
        try:
            target, made = self._write(candidate)
            judged = self._judged(made, candidate, target)
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # a full disk says nothing of the candidate
                raise
            self.records.refused[candidate.key] = str(error)
            self.records.write()
            self.watcher.say(f"{candidate.label}: {error}")
            return
        self.records.save_outcomes(candidate.key, judged.outcomes)
        seconds = time.monotonic() - start
        size = sum(each.stat().st_size for each in with_companions(target) if each.suffix != ".json")
        name = f"{CANDIDATES}/{target.name}"
        self.records.files[candidate.key] = File(
            candidate, name, size, judged.ms, judged.full_ms, judged.ms is not None, seconds
        )
        self._slowest = max(self._slowest, seconds)
        self.records.write()
        drop = self.rounds.drop(candidate, 0)
        self.watcher.say(f"{name}: {size / 1e6:.1f} MB, {drop.points:+.2f} points lost, at most {drop.upper:.2f}")

    def _example(self) -> dict[str, Tensor]:
        return example_of(self.simulation.calibration())

    def _judged(self, made: nn.Module | None, candidate: Candidate, target: Path) -> Judged:
        if not self.runs:
            assert made is not None
            return Judged(outcomes_on(as_in_file(made, candidate), self.task, self.promise.split, self.examples))
        if self._judge is None:
            full = self._scratch / "full.onnx"
            write_onnx(self.model, self._example(), full, beside=True)
            assert self.runtime.runner is not None
            self._judge = Judge(self.task, self.promise.split, self.examples, self.runtime.runner, self._scratch, full)
        return self._judge.judge(target)

    # -- the verdict

    def _decide(self) -> None:
        """Publish the most wanted accepted file as the result, or remove an old result."""
        self._result = self.records.publish(self.rounds.chosen)

    def _verdict(self) -> Verdict:
        self._decide()
        rows, chosen = self.rounds.rows(), self.rounds.chosen
        failed = [row.drop for row in rows if not row.accepted]
        status = status_of(chosen is not None, [row.drop for row in rows], self.promise.within, self.runs)
        help = what_would_help(
            status,
            min(failed, key=lambda drop: drop.upper, default=None),
            self.promise.within,
            self.promise.split,
            trained=any(each.candidate.repaired for each in self.records.files.values()),
            stopped=self._stopped,
            next=next(iter(failed), None),
        )
        if not self.runs:
            help = f"Run the files with {self.runtime.name} and score them there; s2d cannot do it here."
        return Verdict(
            status,
            None if self._result is None else str(self._result),
            self.runtime.name,
            self.task.primary,
            self.full.score(),
            self.promise.within,
            self.promise.split,
            self.examples,
            rows,
            help,
            self._notes(),
            self.records.seconds,
        )

    def _notes(self) -> list[str]:
        notes = []
        if not self.runs:
            why = "is not installed here" if self.runtime.runner else "does not run on this machine"
            notes.append(f"the files were not run: {self.runtime.name} {why}; their drops are those of the simulation")
        size = self.task.sizes()[self.promise.split]
        if self.examples < size:
            notes.append(f"{self.examples:,} of {size:,} examples were scored, as the minutes allowed")
        rounds = len(self.records.rounds)
        return [*notes, f"round {rounds} is held to {self.rounds.level(rounds - 1):.2%}"] if rounds > 1 else notes

    # -- repair

    def _repair(self, kind: str) -> None:
        """Train the most wanted form in a part of the time that is left, and judge it."""
        kept = self.records.repair
        if kept is None or kept.rung != kind:
            share = 0.5 if kind == REPAIRS[0] else 1.0
            minutes = round(share * (self._left() - 1.5 * self._slowest) / 60.0, 2)
            start = self.climbing.narrowest(self.records)
            conditioned = kind == REPAIRS[0]
            method, spent = (start.method, {"conditioned": minutes}) if conditioned else ("rtn", {"trained": minutes})
            kept = replace(start, rung=kind, method=method, **spent)
            self.records.repair = kept
            self.records.write()
        folder = self.out / CANDIDATES / kept.key
        state = folder.with_suffix(".training")
        self.watcher.stage(f"{kind}: {kept.label} for {kept.conditioned or kept.trained:.1f} minutes", 1)
        try:
            made = repaired(kept, self.simulation, self.seed, state, lambda step, loss: None)
        except InputError as error:
            self.watcher.say(f"{kept.label}: {error}")
            self.records.refused[kept.key] = str(error)
        else:
            quant.save(made, folder)
            self.climbing.attempt(kept, self.records)
        state.unlink(missing_ok=True)
        self.records.repair = None
        self._plan_round([kept])
        self._judge_rounds()
