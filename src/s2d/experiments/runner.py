"""Running a recipe: from a published model to a comparison, each stage kept on disk.

    load -> audit -> for each seed and arm: train -> evaluate -> for each bit width and calibrator: quantize, evaluate
         -> audit -> results.json, report.html

Every finished stage is a file in the run's folder. Its name is a digest of all its inputs, code included. So a repeated
run computes only stages that are missing or changed, and one folder can hold many experiments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d import quant
from s2d.audit import Audit, audit
from s2d.baselines import attach
from s2d.checkpoint import Loaded, load, save
from s2d.distributed import processes
from s2d.distributed.processes import device_of
from s2d.errors import InputError, MissingExtra
from s2d.experiments.auto.comparison import publish_best
from s2d.experiments.auto.search import Search
from s2d.experiments.auto.verdict import Verdict
from s2d.experiments.recipe import FULL, UNTRAINED, Cell, Recipe, arm_settings
from s2d.experiments.records import cell_name, records_of, shown_path, spec_name
from s2d.experiments.watcher import Silent, Watcher
from s2d.io.files import JSON, read_json, sweep, write_json
from s2d.io.provenance import code_digest, digest, measured, run_metadata
from s2d.models.tracing import trace
from s2d.quant import QuantSpec
from s2d.report import write_card, write_report
from s2d.tasks import Task, create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import evaluate, model_for
from s2d.training.loop import train
from s2d.training.qat_loop import train_quantized

# The code folders that a stage depends on: a change in one of them makes finished results stale. Loading and saving are
# left out of training and evaluation; the weights' fingerprint replaces them. Of quantization only the distance from
# the original is part of training: a new PTQ method retrains nothing.
_DISTILLING = ("quant/distillation.py", "models/blocks.py", "models/running.py", "models/masks.py", "targets")
_TOWERS = ("models/image_heads.py", "models/image_views.py", "models/dual_encoder.py")
_HEADS = ("models/heads.py", "models/classes.py", "models/preprocessing.py", *_TOWERS)
_SCORING = ("tasks", "data", *_HEADS)
_TRAINING = ("training", "distributed", *_SCORING, *_DISTILLING)
_SEEING = ("decay/selection", "models/graph.py", "models/tracing.py", "targets", "spectral", "distributed")
_DECAY = ("decay", "baselines", *_SEEING)
_QUANTIZING = ("quant", "models", "distributed")
_QAT = (*_QUANTIZING, *_TRAINING)
_AUDITING = ("audit", *_SEEING, "quant", "tasks", "data", "models")


class Runner:
    """One recipe in one folder."""

    def __init__(
        self, name: str, recipe: Recipe, folder: Path, watcher: Watcher | None = None, *, trial: bool = False
    ) -> None:
        """Load model and data; a recipe that cannot run fails here, before any work.

        A `trial` is marked in the results, because its numbers mean nothing.

        Raises:
            InputError: The model, the data, the folder, or settings that do not fit the model.
        """
        self.name, self.recipe, self.folder, self.trial = name, recipe, folder, trial
        self.watcher = watcher or Silent()
        # Computed at the start, not when a stage begins: the code that runs is the code that was read then.
        self.code = {
            "training": code_digest(*_TRAINING),
            "decay": code_digest(*_DECAY),
            "judging": code_digest(*_SCORING),
            "quantizing": code_digest(*_QUANTIZING),
            "qat": code_digest(*_QAT),
            "auditing": code_digest(*_AUDITING),
        }
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; name a folder for the run")
        self.watcher.stage(f"loading {recipe.task.label} and {recipe.model}", 3)
        self.task: Task = create(recipe.task.name, **recipe.task.options)
        self.watcher.advance(1)
        self.loaded: Loaded = load(recipe.model, device=device_of(recipe.device))
        self.watcher.advance(2)
        self._rehearse()
        self._told: list[str] = []
        self._tell_notes()
        if processes.leads():
            for part in ("arms", "cells", "audits", "qat"):
                sweep(folder / part)
            write_json(folder / "recipe.json", {"name": name, **recipe.model_dump()})
        self.watcher.advance(3)

    def _tell_notes(self) -> None:
        """Report the notes of the data so far; damaged images are found only when they are read."""
        notes = self.task.notes()
        for note in notes:
            if note not in self._told:
                self.watcher.say(note)
        self._told = notes

    def _rehearse(self) -> None:
        """Try the decay and the quantizers on the model once, so that errors appear now and not hours later."""
        recipe = self.recipe
        model = self.task.build(self.loaded, recipe.seeds[0])
        if self.task.new_head:
            self.watcher.say(self.task.new_head.replace("would be random", "is made", 1))
        if UNTRAINED in recipe.arms:
            model_for(self.loaded, self.task)
        optimizer = torch.optim.AdamW(model.parameters())
        for decay in recipe.arms.values():
            if decay is not None:
                attach(model, optimizer, decay).remove()
        specs = [*recipe.quantize.specs, *(recipe.qat.specs if recipe.qat else [])]
        if any(spec != FULL for spec in specs):
            size = recipe.quantize.calibration.batch_size
            inputs = calibration_inputs(self.task, size, size, recipe.seeds[0])
            graph = trace(model, inputs[0])
            for spec in specs:
                if spec != FULL:
                    quant.planned(model, QuantSpec.parse(spec), inputs, graph)

    def run(self) -> JSON:
        """Run all missing stages, then write results.json and report.html; return the results."""
        recipe, results, records, audits, history = self.recipe, {}, [], {}, []
        verdicts: dict[str, Verdict] = {}
        about = run_metadata(
            recipe=self.name,
            about=recipe.about,
            settings=self._shown_settings(),
            data_hash=self.task.fingerprint,
            data_sizes=self.task.sizes(),
            model_fingerprint=self.loaded.fingerprint,
            code=self.code,
            **({"trial": True} if self.trial else {}),
        )
        first = recipe.seeds[0]
        if recipe.audit:
            audits[UNTRAINED] = self._audit(UNTRAINED, first)
            for line in Audit.from_json(audits[UNTRAINED]).picture().splitlines():
                self.watcher.say(line)
        for seed in recipe.seeds:
            for arm in recipe.arms:
                if arm == UNTRAINED and seed != first:
                    continue  # it has no randomness
                training = self._train(arm, seed)
                records += self._cells(arm, seed)
                records += self._trained_cells(arm, seed)
                self._keep_promise(arm, seed, verdicts)
                self._describe(arm, seed, about, training, records)
                if recipe.audit and seed == first and arm not in audits:
                    audits[arm] = self._audit(arm, seed)
                if training is not None and seed == first and not history:
                    history = training["history"]  # of the first arm that decays
                # Partial results can be read during the run.
                self._tell_notes()
                about["left_out"] = self._told
                results = {"run": about, "records": records, "audits": audits, "history": history}
                results["promises"] = {name: verdict.to_dict() for name, verdict in verdicts.items()}
                self._write(results)
        if recipe.export is not None:
            self.watcher.say(publish_best(verdicts, recipe.quantize.objective, Path(recipe.export)))
        try:
            self.watcher.say(f"report: {shown_path(write_report(results, self.folder / 'report.html'))}")
        except MissingExtra as error:
            self.watcher.say(f"no report.html: {error}")
        return results

    def follow(self) -> None:
        """The part of `run` for all processes but the first: train with it, in the same order."""
        for seed in self.recipe.seeds:
            for arm in self.recipe.arms:
                if arm != UNTRAINED or seed == self.recipe.seeds[0]:
                    self._train(arm, seed)
                    self._trained_cells(arm, seed)

    def _missing(self, path: Path) -> bool:
        """Whether a file is still missing, as seen by the first process, which writes it."""
        processes.meet(device_of(self.recipe.device) == "cpu")
        return processes.as_first(not path.is_file())

    def _describe(self, arm: str, seed: int, about: JSON, training: JSON | None, records: list[JSON]) -> None:
        """The card beside an arm's model: its own numbers, and those of the arms of its seed before it."""
        if training is None:
            return
        settings = self.recipe.train.outcome()
        write_card(
            self._arm_folder(arm, seed) / "model",
            base=self.recipe.model,
            task=self.recipe.task.name,
            arm=arm,
            training={**training, "settings": settings},
            run=about,
            records=[record for record in records if record["seed"] == seed],
            name=f"{self.name} {arm}",
        )

    def _write(self, results: JSON) -> None:
        write_json(self.folder / "results.json", results)

    # -- training

    def _train(self, arm: str, seed: int) -> JSON | None:
        """The notes on an arm's training; the model is beside them on the disk."""
        if arm == UNTRAINED:
            return None
        folder = self._arm_folder(arm, seed)
        notes = folder / "training.json"
        if not self._missing(notes):
            if processes.leads():
                (folder / "state.pt").unlink(missing_ok=True)  # of a run that was killed before the last line below
            self.watcher.say(f"{arm}, seed {seed}: trained already ({shown_path(folder)})")
            return read_json(notes)
        settings = self.recipe.train
        self.watcher.stage(f"{arm}, seed {seed}: training", settings.steps)
        model = self.task.build(self.loaded, seed)
        done = train(
            model,
            self.task,
            settings,
            seed=seed,
            decay=self.recipe.arms[arm],
            state=folder / "state.pt",
            on_step=lambda step, loss: self.watcher.advance(step, f"loss {loss:.3f}"),
            on_checkpoint=lambda step: self._save(model, folder / "checkpoints" / f"{step:07}", arm),
        )
        if not processes.leads():
            return None
        self._save(model, folder / "model", arm)
        content = {**asdict(done), "arm": arm, "seed": seed, "decay": self._decay_key(arm)}
        write_json(notes, content)
        (folder / "state.pt").unlink(missing_ok=True)  # by now all its content is saved elsewhere
        skipped = f", {len(done.skipped)} skipped" if done.skipped else ""
        self.watcher.say(
            f"{arm}, seed {seed}: {done.steps} steps in {done.seconds:.0f} s{skipped}, last loss {done.losses[-1]:.3f}"
        )
        return read_json(notes)  # the same as in a resumed run: lists, not tuples

    def _save(self, model: nn.Module, folder: Path, arm: str) -> None:
        loaded = self.loaded
        notes = {"recipe": self.name, "arm": arm}
        save(model, folder, tokenizer=loaded.tokenizer, processor=loaded.processor, notes=notes)

    def _arm_folder(self, arm: str, seed: int) -> Path:
        return self.folder / "arms" / f"{arm}-{seed}-{self._arm_key(arm, seed)}"

    def _arm_key(self, arm: str, seed: int) -> str:
        """Everything a trained model depends on."""
        recipe = self.recipe
        task = recipe.task.model_dump(exclude={"data"})  # the content of the data counts, not its path
        content: JSON = {"model": self.loaded.fingerprint, "task": [self.task.fingerprint, task]}
        if arm != UNTRAINED:
            content |= {
                "train": recipe.train.outcome(),
                "seed": seed,
                "decay": self._decay_key(arm),
                "code": [self.code["training"], self.code["decay"] if recipe.arms[arm] is not None else ""],
            }
        return digest(content)

    def _decay_key(self, arm: str) -> JSON | None:
        decay = self.recipe.arms[arm]
        return None if decay is None else arm_settings(decay)

    @contextmanager
    def _model(self, arm: str, seed: int) -> Iterator[nn.Module]:
        """An arm's trained model from the disk; for the arm without training, the published model."""
        if arm == UNTRAINED:
            yield self.task.build(self.loaded, seed).eval()
        else:
            yield load(self._arm_folder(arm, seed) / "model", device=device_of(self.recipe.device)).model

    # -- evaluating

    def _cells(self, arm: str, seed: int) -> list[JSON]:
        """One record for each metric of each bit width, method and calibrator."""
        cells = self.recipe.quantize.cells()
        paths = [self._cell_path(arm, seed, cell) for cell in cells]
        if not all(path.is_file() for path in paths):
            self.watcher.stage(f"{arm}, seed {seed}: evaluating", len(cells))
            with self._model(arm, seed) as model:
                for number, (cell, path) in enumerate(zip(cells, paths, strict=True)):
                    self.watcher.advance(number, cell_name(cell))
                    if not path.is_file():
                        write_json(path, self._judge(model, cell, seed))
            self.watcher.advance(len(cells))
        records, shown = [], []
        for cell, path in zip(cells, paths, strict=True):
            found = records_of(
                self.recipe, self.task, arm, seed, cell.spec, cell.method or "none", cell.observer, read_json(path)
            )
            shown += [f"{cell_name(cell)} {r['value']:.2f}" for r in found if r["metric"] == self.task.primary]
            records += found
        self.watcher.say(f"{arm}, seed {seed}: {self.task.primary}: {', '.join(shown)}")
        self._compare(arm, records)
        return records

    def _compare(self, arm: str, records: list[JSON]) -> None:
        """Stop if the score is far from the known one: all later numbers would be meaningless."""
        known = self.recipe.reference
        if known is None or known.arm != arm:
            return
        score = next(r["value"] for r in records if r["spec"] == FULL and r["metric"] == self.task.primary)
        if not abs(score - known.score) <= known.within:  # also when it is not a number
            raise InputError(
                f"{self.recipe.model} (arm {arm}) has {self.task.primary} {score:.2f} in full precision, but "
                f"{known.score:g} is known of it: check the split, the order of the classes, the prompts and the "
                f"preprocessing (-o reference=null goes on regardless)"
            )

    def _judge(self, model: nn.Module, cell: Cell, seed: int) -> JSON:
        recipe = self.recipe
        with measured() as cost:
            if cell.method:
                model = quant.quantize(
                    model,
                    cell.spec,
                    calibration=calibration_inputs(
                        self.task, recipe.quantize.calibration.samples, recipe.quantize.calibration.batch_size, seed
                    ),
                    method=cell.method,
                    observer=cell.observer or None,
                    protocol=recipe.quantize.protocol,
                    seed=seed,
                )
            metrics = evaluate(model, self.task, split=recipe.split, batch_size=recipe.batch_size)
        return {"metrics": metrics, "seconds": cost.seconds, "peak_mb": cost.peak_mb}

    def _cell_path(self, arm: str, seed: int, cell: Cell) -> Path:
        quantize = self.recipe.quantize
        content: JSON = {"arm": self._arm_key(arm, seed), "split": self.recipe.split, "judge": self.code["judging"]}
        if cell.method:
            content |= {
                "spec": QuantSpec.parse(cell.spec).to_dict(),
                "observer": cell.observer,
                "method": cell.method,
                "protocol": quantize.protocol,
                "calibration": quantize.calibration.model_dump(),
                "seed": seed,
                "code": self.code["quantizing"],
            }
        stem = "-".join([arm, str(seed), *cell_name(cell).replace(":", "").split()])
        return self.folder / "cells" / f"{stem}-{digest(content)}.json"

    # -- quantization-aware training

    def _trained_cells(self, arm: str, seed: int) -> list[JSON]:
        """One record for each metric of each bit width that the arm's model is trained for."""
        qat, records = self.recipe.qat, []
        if qat is None:
            return records
        decay = self.recipe.arms[arm] if qat.decay else None
        key: JSON = {
            "arm": self._arm_key(arm, seed),
            "qat": qat.model_dump(exclude={"specs"}),
            "train": self.recipe.train.outcome(),
            "calibration": self.recipe.quantize.calibration.model_dump(),
            "split": self.recipe.split,
            "code": [self.code["qat"], self.code["judging"], self.code["decay"] if decay is not None else ""],
        }
        for spec in qat.specs:
            stem = f"{arm}-{seed}-{spec_name(spec)}-qat-{digest({**key, 'spec': QuantSpec.parse(spec).to_dict()})}"
            path, kept = self.folder / "cells" / f"{stem}.json", self.folder / "qat" / stem
            if self._missing(path):
                trained = self._train_quantized(arm, seed, spec, decay, path.with_suffix(".pt"), kept)
                if processes.leads():
                    write_json(path, trained)
            if not processes.leads():
                continue
            path.with_suffix(".pt").unlink(missing_ok=True)  # also the file of a run that was killed here
            found = records_of(self.recipe, self.task, arm, seed, spec, "qat", "", read_json(path))
            records += found
            score = f"{spec_name(spec)} trained: {found[0]['value']:.2f} ({shown_path(kept)})"
            self.watcher.say(f"{arm}, seed {seed}: {score}")
        return records

    def _train_quantized(
        self, arm: str, seed: int, spec: str | dict[str, Any], decay: dict[str, Any] | None, state: Path, kept: Path
    ) -> JSON:
        """Train, evaluate and save the model, for `s2d evaluate` and `s2d export`."""
        recipe, qat = self.recipe, self.recipe.qat
        assert qat is not None
        self.watcher.stage(f"{arm}, seed {seed}: training at {spec_name(spec)}", qat.steps)
        with self._model(arm, seed) as model, measured() as cost:
            trained, done = train_quantized(
                model,
                self.task,
                spec,
                qat.training(recipe.train),
                qat.settings,
                calibration=calibration_inputs(
                    self.task, recipe.quantize.calibration.samples, recipe.quantize.calibration.batch_size, seed
                ),
                seed=seed,
                decay=decay,
                state=state,
                on_step=lambda step, loss: self.watcher.advance(step, f"loss {loss:.3f}"),
            )
            if not processes.leads():
                return {}
            metrics = evaluate(trained, self.task, split=recipe.split, batch_size=recipe.batch_size)
            self._save(trained, kept, arm)
        return {
            "metrics": metrics,
            "seconds": cost.seconds,
            "peak_mb": cost.peak_mb,
            "losses": done.losses,
            "skipped": done.skipped,
        }

    # -- a file that keeps a promise

    def _keep_promise(self, arm: str, seed: int, verdicts: dict[str, Verdict]) -> None:
        """Search a file of an arm's model if the recipe has a promise; its folder is below ``auto/``."""
        promise = self.recipe.quantize.promise
        if promise is None:
            return
        folder = self.folder / "auto" / f"{arm}-{seed}-{self._arm_key(arm, seed)}"
        with self._model(arm, seed) as model:
            verdict = Search(self.loaded, model, self.task, promise, folder, seed, self.watcher).run()
        verdicts[f"{arm}-{seed}"] = verdict
        for line in verdict.lines:
            self.watcher.say(f"{arm}, seed {seed}: {line.strip()}")

    # -- looking

    def _audit(self, arm: str, seed: int) -> JSON:
        calibration = self.recipe.quantize.calibration
        key = digest([self._arm_key(arm, seed), calibration.model_dump(), seed, self.code["auditing"]])
        path = self.folder / "audits" / f"{arm}-{seed}-{key}.json"
        if not path.is_file():
            self.watcher.stage(f"{arm}, seed {seed}: auditing", 1)
            with self._model(arm, seed) as model:
                inputs = calibration_inputs(self.task, calibration.samples, calibration.batch_size, seed)
                write_json(path, audit(model, inputs, name=self.recipe.model).to_json())
            self.watcher.advance(1)
        return read_json(path)

    def _shown_settings(self) -> JSON:
        settings = self.recipe.model_dump(exclude={"about"})
        settings["arms"] = {arm: self._decay_key(arm) if arm != UNTRAINED else None for arm in self.recipe.arms}
        return settings
