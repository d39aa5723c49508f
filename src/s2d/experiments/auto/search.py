"""The search: candidates in simulation, files in their runtime, and a verdict on the promise.

    full precision on the acceptance data
    the safest candidate becomes a file and is judged              # so that a file stands early
    the ladder: every rung's candidates in simulation, on training examples outside of the calibration
    a round: the candidates worth a file, the safest first, judged one by one until the first that fails
    where time is left and the promise is not kept by the most wanted: training, and another round

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

import torch
from torch import Tensor, nn

from s2d import quant
from s2d.errors import InputError
from s2d.experiments.auto.acceptance import level_of, paired_drop
from s2d.experiments.auto.candidates import Candidate, Objective, Scored, file_bytes, front, tables_of
from s2d.experiments.auto.judging import Judge, Judged, outcomes_on
from s2d.experiments.auto.ladder import RUNGS, View, first
from s2d.experiments.auto.promise import Promise
from s2d.experiments.auto.rounds import Rounds
from s2d.experiments.auto.search_records import CANDIDATES, File, Records, with_companions
from s2d.experiments.auto.simulation import SEARCHED, Simulation, as_in_file
from s2d.experiments.auto.verdict import Verdict, status_of, what_would_help
from s2d.experiments.watcher import Silent, Watcher
from s2d.export import example_of, export
from s2d.export.onnx import write_onnx
from s2d.io.files import sweep
from s2d.io.folder_lock import locked
from s2d.models import Loaded, fingerprint
from s2d.models.running import evaluating
from s2d.models.saved import save_parts
from s2d.tasks import Split, Task
from s2d.tasks.base import Outcomes
from s2d.training.qat_loop import train_quantized
from s2d.training.train_settings import TrainSettings

_TRAINING = 120.0  # seconds below which no training begins
_RESERVED = 0.5  # of the time, for judging


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
        self.examples = task.sizes()[promise.split]
        self.runs = self.runtime.installed
        self.simulation = Simulation(model, task, seed)
        self.tables = max(self.runtime.embedding_bits) if tables_of(model) else 0
        self.safest = first(self.runtime, self.tables)
        self.records = Records(out, {})  # until `run` opens the folder
        self._judge: Judge | None = None
        self._slowest = 0.0
        self._stopped = False

    # -- the plan

    def legal(self, candidate: Candidate) -> str | None:
        """The reason why the runtime would refuse a candidate; None when it is legal."""
        return self.runtime.complaint(quant.plan(self.model, candidate.spec))

    def beginning(self) -> list[tuple[Candidate, int, str | None]]:
        """The candidates that need no scores, with their predicted bytes and, if one is not legal, the reason."""
        found = {each.key: each for each in (self.safest, *RUNGS[0].propose(self._view()))}.values()
        return [(each, self._bytes(each), self.legal(each)) for each in found]

    def _view(self) -> View:
        return View(self.runtime, list(self.records.scored.values()), self.tables, self.simulation.sensitivity)

    def expected_seconds(self) -> float:
        """Estimate the time of the whole ladder from the time of one forward."""
        batch = self.simulation.calibration()[0]
        with torch.no_grad(), evaluating(self.model):
            self.model(**batch)
            start = time.perf_counter()
            self.model(**batch)
            forward = time.perf_counter() - start
        per_row = forward / max(len(next(iter(batch.values()))), 1)
        layers = sum(isinstance(module, nn.Linear) for module in self.model.modules())
        tried = 20 * per_row * (3 * self.simulation.samples + SEARCHED)
        measured = 3 * layers * per_row * self.simulation.samples
        judged = 5 * (15.0 + 150 * forward + 2 * per_row * self.examples)
        return tried + measured + judged + per_row * self.examples

    def _bytes(self, candidate: Candidate) -> int:
        return file_bytes(self.model, quant.plan(self.model, candidate.spec), self.runtime, candidate.embeddings)

    # -- the work

    def run(self) -> Verdict:
        """Do all missing work within the time limit."""
        with locked(self.out):
            self.records = Records.open(self.out, self._key())
            sweep(self.out, age=0.0)  # left by a killed call; no other process uses this folder
            self._slowest = max((each.seconds for each in self.records.files.values()), default=0.0)
            (self.out / CANDIDATES).mkdir(parents=True, exist_ok=True)
            self._refuse_full_disk()
            self.records.write()
            self.full = self._full()
            higher = self.task.higher_is_better
            within, objective = self.promise.within, self.promise.objective
            self.rounds = Rounds(self.records, self.safest, self.full, within, objective, higher)
            self._tell_few()
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

    def _work(self) -> None:
        complaint = self.legal(self.safest)
        if complaint is not None:
            raise InputError(complaint)
        self._file(self.safest)
        self._decide()
        if not self.records.rounds or not self.rounds.finished:
            self._climb()
            if not self.records.rounds:
                self._plan_round([self.safest, *(each.candidate for each in self._front())])
            self._judge_rounds()
        trained = any(each.trained for planned in self.records.rounds for each in planned)
        enough = self.promise.minutes is not None and self._left() > _TRAINING + 2 * self._slowest
        if enough and not trained and not self.rounds.wanted_most:
            self._train()

    def _key(self) -> dict[str, Any]:
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
        if kept is None:
            self.watcher.stage(f"full precision on {self.promise.split}", 1)
            kept = outcomes_on(self.model, self.task, self.promise.split)
            self.records.save_outcomes("full", kept)
        if not math.isfinite(kept.score()):
            raise InputError(f"{self.loaded.source} has {self.task.primary} {kept.score()} in full precision")
        self.watcher.say(
            f"{self.task.primary} in full precision: {kept.score():.2f} ({self.examples} of {self.promise.split})"
        )
        return kept

    def _tell_few(self) -> None:
        """Tell the user before the work if there are too few examples to accept any file."""
        best = paired_drop(self.full, self.full, self.task.higher_is_better)
        if not best.within(self.promise.within):
            needed = best.examples_needed(self.promise.within)
            self.watcher.say(
                f"{self.examples} examples of {self.promise.split} cannot show a drop of at most "
                f"{self.promise.within:g} points: even a file that changes nothing needs about {needed:,}"
            )

    def _refuse_full_disk(self) -> None:
        largest = self._bytes(self.safest)
        plain = sum(4 * each.numel() for each in self.model.parameters())
        needed, free = 3 * largest + plain, shutil.disk_usage(self.out).free
        if free < needed:
            raise InputError(
                f"{self.out} has {free / 1e6:,.0f} MB free, and a candidate needs about {needed / 1e6:,.0f} MB; free "
                "some space or choose another --out"
            )

    # -- in simulation

    def _climb(self) -> None:
        """Try the candidates of every rung, as long as there is time."""
        for rung in RUNGS:
            if self._out_of_time():
                return
            proposed = rung.propose(self._view())
            done = {*self.records.scored, *self.records.refused}
            new = [each for each in proposed if each.key not in done]
            self.watcher.stage(rung.name, len(new))
            for number, candidate in enumerate(new):
                if self._out_of_time():
                    return
                self.watcher.advance(number, candidate.label)
                self._try(candidate)
                self.records.write()
            self.watcher.say(f"{rung.name}: {self._told(new)}")

    def _told(self, candidates: Sequence[Candidate]) -> str:
        parts = []
        for each in candidates:
            scored = self.records.scored.get(each.key)
            parts.append(f"{each.label} {'refused' if scored is None else f'{scored.error:.2g}'}")
        return ", ".join(parts) or "tried already"

    def _out_of_time(self) -> bool:
        """Whether the remaining time is needed for judging."""
        left = self._left()
        if self.promise.minutes is None:
            return False
        needed = max(4 * self._slowest, _RESERVED * 60.0 * self.promise.minutes)
        self._stopped = self._stopped or left < needed
        return left < needed

    def _try(self, candidate: Candidate) -> None:
        complaint = self.legal(candidate)
        if complaint is not None:
            self.records.refused[candidate.key] = complaint
            return
        start = time.monotonic()
        try:
            made = self.simulation.quantized(candidate, self.out / CANDIDATES / candidate.key)
            error, points = self.simulation.compared(as_in_file(made, candidate))
        except InputError as error:  # a method that does not fit this model
            self.records.refused[candidate.key] = str(error)
            return
        sites = quant.plan(self.model, candidate.spec)
        size = file_bytes(self.model, sites, self.runtime, candidate.embeddings)
        scored = Scored(candidate, error, points, size, self.runtime.time_of(sites), time.monotonic() - start)
        self.records.scored[candidate.key] = scored

    def _front(self) -> list[Scored]:
        """The candidates to export, without those that lost far too much on the training examples already."""
        hopeful = [each for each in self.records.scored.values() if each.points <= 3 * self.promise.within + 1.0]
        return front(hopeful, self.promise.objective)

    # -- files

    def _plan_round(self, candidates: Sequence[Candidate]) -> None:
        planned = list({each.key: each for each in candidates}.values())
        self.records.rounds.append(planned)
        self.records.write()

    def _judge_rounds(self) -> None:
        for number, planned in enumerate(self.records.rounds):
            self.watcher.stage(f"round {number + 1}: files", len(planned))
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

    def _file(self, candidate: Candidate) -> None:
        """Make a candidate's file and judge it, unless this was done before."""
        if candidate.key in self.records.files or candidate.key in self.records.refused:
            return
        start = time.monotonic()
        target = self.out / CANDIDATES / f"{candidate.key}{self.promise.suffix}"
        try:
            made = self.simulation.quantized(candidate, self.out / CANDIDATES / candidate.key)
            tables = candidate.embeddings
            export(made, target, example=self._example(), embeddings=tables, time_it=False, describe=False)
            judged = self._judged(made, candidate, target)
        except InputError as error:
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

    def _judged(self, made: nn.Module, candidate: Candidate, target: Path) -> Judged:
        if not self.runs:
            return Judged(outcomes_on(as_in_file(made, candidate), self.task, self.promise.split))
        if self._judge is None:
            full = self._scratch / "full.onnx"
            write_onnx(self.model, self._example(), full, beside=True)
            assert self.runtime.runner is not None
            self._judge = Judge(self.task, self.promise.split, self.runtime.runner, self._scratch, full)
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
            trained=any(each.candidate.trained for each in self.records.files.values()),
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
        if len(self.records.rounds) > 1:
            notes.append(f"round {len(self.records.rounds)} is held to {level_of(len(self.records.rounds)):.2%}")
        return notes

    # -- training

    def _train(self) -> None:
        """Train the most wanted form with its quantizers in place, for the time that is left, and judge it."""
        bits = min(self.runtime.weight_bits)
        view = self._view()
        start = view.best(bits, "tensor") or view.best(bits)
        if start is None:
            return
        minutes = (self._left() - 1.5 * self._slowest) / 60.0
        candidate = replace(start.candidate, method="rtn", rung="trained", trained=round(minutes, 2))
        self.watcher.stage(f"training {candidate.label} for {minutes:.1f} minutes", 1)
        settings = TrainSettings(steps=1_000_000, minutes=minutes, batch_size=self.simulation.batch, lr=5e-5)
        trained, done = train_quantized(
            self.model,
            self.task,
            candidate.spec,
            settings,
            calibration=self.simulation.calibration(),
            seed=self.seed,
        )
        self.watcher.say(f"{candidate.label}: {done.steps} steps in {done.seconds:.0f} s")
        quant.save(trained, self.out / CANDIDATES / candidate.key)
        self._try(candidate)
        self._plan_round([candidate])
        self._judge_rounds()
