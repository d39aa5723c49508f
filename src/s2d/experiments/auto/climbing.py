"""Climbing the ladder: scores once, then candidates in simulation, the one of greatest gain per minute next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from torch import nn

from s2d import quant
from s2d.errors import InputError
from s2d.experiments.auto.candidates import Candidate, Scored, added_bytes, file_bytes, front
from s2d.experiments.auto.forecast import Forecast
from s2d.experiments.auto.ladder import PRODUCTS, RUNGS, View, scored_specs
from s2d.experiments.auto.promise import Promise
from s2d.experiments.auto.search_records import CANDIDATES, SCORES, Records
from s2d.experiments.auto.simulation import Simulation, as_in_file
from s2d.experiments.watcher import Watcher
from s2d.export.runtime import Runtime
from s2d.quant import QuantSpec

_MOST = 40  # candidates that are tried, at most
_FILLS = 8  # of them only because they are expected on the front, between the safest and the most wanted


class Climbing:
    """The candidates of one model and promise."""

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        simulation: Simulation,
        promise: Promise,
        tables: int,
        watcher: Watcher,
    ) -> None:
        """Nothing is tried yet.

        Args:
            model: In full precision.
            runtime: Where the file will run.
            simulation: The model and its training data.
            promise: What is wanted.
            tables: The widest bits of embedding tables, 0 where there are none.
            watcher: Receives the progress.
        """
        self.model, self.runtime, self.simulation, self.promise = model, runtime, simulation, promise
        self.tables, self.watcher = tables, watcher
        self._sizes: dict[str, tuple[int, float | None, str | None]] = {}

    def complaint(self, candidate: Candidate) -> str | None:
        """The reason why the runtime would refuse a candidate; None when it is legal."""
        return self._facts(candidate)[2]

    def legal(self, spec: QuantSpec) -> bool:
        """Whether a spec fits the model and the runtime."""
        return self.complaint(Candidate(spec, "rtn", 0, "")) is None

    def bytes(self, candidate: Candidate) -> int:
        """The predicted bytes of its file."""
        return self._facts(candidate)[0]

    def _facts(self, candidate: Candidate) -> tuple[int, float | None, str | None]:
        name = f"{candidate.spec.to_dict()} {candidate.embeddings} {candidate.method}"
        if name not in self._sizes:
            try:
                sites = quant.plan(self.model, candidate.spec)
            except InputError as error:  # such as groups that do not divide a layer
                self._sizes[name] = (0, None, str(error))
                return self._sizes[name]
            size = file_bytes(self.model, sites, self.runtime, candidate.embeddings)
            size += added_bytes(sites, candidate.method)
            self._sizes[name] = (size, self.runtime.time_of(sites), self.runtime.complaint(sites))
        return self._sizes[name]

    # -- the ladder

    def climb(self, records: Records, left: Callable[[], float]) -> bool:
        """Try candidates while one is worth it and there is time; then those that are worth a file.

        Args:
            records: They get what was tried.
            left: The seconds that are left for it.

        Returns:
            Whether the end of the ladder was reached.
        """
        tried = fills = 0
        self.forecast(records)  # scores every layer at the first time, a stage of its own
        self.watcher.stage("candidates in simulation", _MOST, left())
        while tried < _MOST:
            forecast = self.forecast(records)
            pool = self._pool(forecast, records)
            chosen = forecast.next(pool)
            if chosen is None:
                missing = [each for each in self._front(forecast, pool, records) if each.key not in records.scored]
                if not missing or fills == _FILLS:
                    break
                chosen, fills = missing[0], fills + 1
            if left() <= 0:
                return False
            self.watcher.advance(tried, chosen.label)
            expected = forecast.points(chosen)
            self.attempt(chosen, records)
            tried += 1
            found = records.scored.get(chosen.key)
            if found is not None:
                self.watcher.say(
                    f"{chosen.rung}: {chosen.label}, {found.bytes / 1e6:.1f} MB, divergence {found.error:.2g} nats, "
                    f"{found.points:+.2f} points on training examples ({expected:.2f} predicted)"
                )
        return True

    def _score(self, records: Records) -> None:
        self.watcher.stage("scores of every layer", 1)
        tables = [bits for bits in self.runtime.embedding_bits if bits] if self.tables else []
        specs = [spec for spec in scored_specs(self.runtime) if self.legal(spec)]
        self.simulation.score(records.folder / SCORES, specs, tables)

    def forecast(self, records: Records) -> Forecast:
        """What is known of the candidates now; at first, they are scored."""
        if self.simulation.scores is None:
            self._score(records)
        return Forecast(
            self.simulation.predicted,
            self.bytes,
            lambda candidate: self._facts(candidate)[1],
            sum(4 * each.numel() for each in self.model.parameters()),
            self.promise.within,
            self.promise.objective,
            self.simulation.pass_seconds,
            records.scored,
        )

    def expected(self, records: Records) -> list[tuple[Candidate, float]]:
        """Every legal candidate with its expected drop in points."""
        forecast = self.forecast(records)
        return [(each, forecast.points(each)) for each in self._pool(forecast, records)]

    def _pool(self, forecast: Forecast, records: Records) -> list[Candidate]:
        """All legal candidates that were not refused, each once."""
        sensitivity, worst = self.simulation.sensitivity, self.simulation.worst_inputs
        view = View(self.runtime, self.tables, self.legal, forecast.error, sensitivity, worst)
        found = {each.key: each for rung in RUNGS for each in rung.propose(view)}
        return [each for key, each in found.items() if key not in records.refused and self.complaint(each) is None]

    def attempt(self, candidate: Candidate, records: Records) -> None:
        """Try a candidate in simulation; one that does not fit this model is refused."""
        start = time.monotonic()
        try:
            made = self.simulation.quantized(candidate, records.folder / CANDIDATES / candidate.key)
            error, points = self.simulation.compared(as_in_file(made, candidate))
        except InputError as problem:  # a method that does not fit this model
            records.refused[candidate.key] = str(problem)
        else:
            size, duration, _ = self._facts(candidate)
            predicted = None if candidate.repaired else self.simulation.predicted(candidate)
            records.scored[candidate.key] = Scored(
                candidate, error, points, size, duration, time.monotonic() - start, predicted
            )
        records.write()

    # -- what becomes a file

    def _front(self, forecast: Forecast, pool: Sequence[Candidate], records: Records) -> list[Candidate]:
        """The candidates that would be worth a file if the forecasts were true."""
        known = []
        for each in pool:
            tried = records.scored.get(each.key)
            size, duration, _ = self._facts(each)
            known.append(tried or Scored(each, forecast.error(each), 0.0, size, duration, 0.0))
        return self._hopeful(forecast, known)

    def worth_a_file(self, records: Records) -> list[Candidate]:
        """The candidates to export, without those that surely lose far too much."""
        tried = [each for each in records.scored.values() if not each.candidate.repaired]
        return self._hopeful(self.forecast(records), tried)

    def _hopeful(self, forecast: Forecast, known: Sequence[Scored]) -> list[Candidate]:
        limit = 3 * self.promise.within
        hopeful = [each for each in known if math.isfinite(each.error) and forecast.points(each.candidate) <= limit]
        return [each.candidate for each in front(hopeful, self.promise.objective)]

    def narrowest(self, records: Records) -> Candidate:
        """The smallest (or fastest) candidate without further products, of the least error among its equals."""
        forecast = self.forecast(records)
        pool = [each for each in self._pool(forecast, records) if each.method not in PRODUCTS]
        return max(pool, key=lambda each: (round(forecast.saving(each), 3), -forecast.error(each)))
