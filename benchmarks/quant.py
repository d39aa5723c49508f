"""Every quantization method on fine-tuned models, with and without S2D in front: accuracy, time and memory of each.

    python benchmarks/quant.py --models runs/minilm-banking77 [--split validation] [--protocol own unified]

A cell is one model quantized by one method to one spec under one protocol. Each is a file in ``--out``, named after all
that it depends on but the code (model's weights, data, split, method, observer, spec, protocol, calibration, seed): a
call that is repeated or was interrupted computes what is missing. Cells remember the code that made them: where that
has changed since, a line says so, and deleting them has them made again.

``--models`` names folders of runs, or single arms of one; their names and seeds are in their own ``training.json``.
Without it the recipe's arms are trained first (minutes each). The recipe also gives task, calibration and batch size.

Under ``own`` each method has the ranges it was published with, and round-to-nearest is tried with several observers.
Under ``unified`` all have those of one observer on the full-precision model. Seconds and memory are those of quantizing
alone, on one thread unless OMP_NUM_THREADS says otherwise (CPU seconds are what to compare on a shared machine); memory
is what the process took at its peak beyond what it held before. Two calls may work on one folder, on other arms or
seeds. The table is Markdown, means over seeds; a gain is paired, model by model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

import s2d
from s2d.checkpoint import load
from s2d.distributed.processes import device_of
from s2d.errors import InputError
from s2d.experiments.recipe import FULL, Cell, QuantizeSection, Recipe, read_recipe
from s2d.experiments.records import records_of
from s2d.experiments.runner import Runner
from s2d.experiments.watcher import Silent, Watcher
from s2d.io.files import JSON, read_json, write_json
from s2d.io.provenance import code_digest, digest, measured, run_metadata
from s2d.models import Loaded, fingerprint
from s2d.quant import QuantSpec
from s2d.tasks import Task, create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import evaluate, model_for

METHODS = "rtn,gptq,gptaq,smoothquant,awq,repq,erq,ptq4vit,rotation,rotation+gptq,svdquant,adaround"
SPECS = "w8a8,w6a6,w4a8,w4a4,w3a4"
OBSERVERS = {"own": "minmax,percentile,mse", "unified": "mse"}
CODE = ("quant", "models")
BASELINE = "adamw"


@dataclass(frozen=True)
class Arm:
    """A fine-tuned model: how, from which seed, and where it is."""

    name: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class Job:
    """One cell to compute; the protocol is empty at full precision."""

    cell: Cell
    protocol: str


def arms_in(places: Sequence[Path], wanted: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """The saved models in some folders, by name and seed.

    Raises:
        InputError: A folder without any, or two different ones of the same name and seed.
    """
    found: dict[tuple[str, int], Arm] = {}
    for place in places:
        notes = [place / "training.json"] if (place / "training.json").is_file() else []
        notes = notes or sorted(place.glob("arms/*/training.json")) or sorted(place.glob("*/training.json"))
        if not notes:
            raise InputError(f"{place} holds no trained arms; name the folder of a run (its arms/ holds the models)")
        for path in notes:
            content = read_json(path)
            arm = Arm(str(content["arm"]), int(content["seed"]), path.parent)
            if (wanted and arm.name not in wanted) or (seeds and arm.seed not in seeds):
                continue
            other = found.setdefault((arm.name, arm.seed), arm)
            # A folder's name ends in the digest of all that its model depends on.
            if other.folder.name != arm.folder.name:
                raise InputError(
                    f"{other.folder} and {arm.folder} are both {arm.name}, seed {arm.seed}; name the folders of the "
                    "arms themselves"
                )
    if not found:
        raise InputError(f"no arm is called {' or '.join(wanted)} with these seeds; see the folders in arms/")
    first = {name: number for number, name in enumerate(dict.fromkeys((BASELINE, *(name for name, _ in found))))}
    return sorted(found.values(), key=lambda arm: (arm.seed, first[arm.name]))


class Aloud(Silent):
    """Says its lines on standard error: beside the table, which may go into a file."""

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr)


def trained(recipe_name: str, recipe: Recipe, out: Path, watch: Watcher) -> Path:
    """Train the arms of a recipe, those that are missing; the folder of the run."""
    folder = out / "models"
    plain = recipe.model_copy(update={"audit": False, "qat": None, "quantize": QuantizeSection(specs=[FULL])})
    Runner(recipe_name, plain, folder, watch).run()
    return folder


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """Full precision once, then every spec, method and observer of every protocol.

    Raises:
        InputError: Anything misspelt in the recipe or in what the command line asks for.
    """
    found = [Job(Cell(FULL), "")]
    for protocol in arguments.protocol:
        section = {
            "specs": arguments.specs,
            "methods": arguments.methods,
            "observers": arguments.observers or OBSERVERS[protocol],
        }
        overrides = [f"quantize.{key}=[{words}]" for key, words in section.items()]
        _, recipe = read_recipe(arguments.recipe, [*arguments.o, *overrides, f"quantize.protocol={protocol}"])
        found += [Job(cell, protocol) for cell in recipe.quantize.cells() if cell.spec != FULL]
    return found


def cell_path(out: Path, arm: Arm, model: str, task: Task, recipe: Recipe, job: Job) -> Path:
    """Where a cell is kept; the name holds a digest of everything but the code."""
    task_options = recipe.task.model_dump(exclude={"data"})  # what the data hold counts, not where they are
    content: JSON = {"model": model, "data": task.fingerprint, "task": task_options, "split": recipe.split}
    cell = job.cell
    if cell.method:
        content |= {
            "method": cell.method,
            "observer": cell.observer,
            "spec": QuantSpec.parse(cell.spec).to_dict(),
            "protocol": job.protocol,
            "calibration": recipe.quantize.calibration.model_dump(),
            "seed": arm.seed,
        }
    words = (arm.name, str(arm.seed), recipe.split, str(cell.spec), cell.method, cell.observer, job.protocol)
    stem = "-".join(word.replace(":", "").replace("+", "_") for word in words if word)
    return out / "cells" / f"{stem}-{digest(content)}.json"


def compute(loaded: Loaded, task: Task, recipe: Recipe, job: Job, seed: int) -> JSON:
    """Quantize a model one way and score it."""
    model = model_for(loaded, task)
    said: list[str] = []
    cost: JSON = {"seconds": 0.0, "cpu_seconds": 0.0, "added_mb": 0.0}
    if job.cell.method:
        inputs = calibration_inputs(
            task, recipe.quantize.calibration.samples, recipe.quantize.calibration.batch_size, seed
        )
        with measured() as idle:
            pass
        with warnings.catch_warnings(record=True) as caught, measured() as busy:
            warnings.simplefilter("always")
            started = time.process_time()
            model = s2d.quantize(
                model,
                job.cell.spec,
                calibration=inputs,
                method=job.cell.method,
                observer=job.cell.observer or None,
                protocol=job.protocol,
                seed=seed,
            )
            cpu = round(time.process_time() - started, 3)
        said = sorted({" ".join(str(warning.message).split()) for warning in caught})
        cost = {"seconds": busy.seconds, "cpu_seconds": cpu, "added_mb": round(busy.peak_mb - idle.peak_mb, 1)}
    with measured() as judging:
        metrics = evaluate(model, task, split=recipe.split, batch_size=recipe.batch_size)
    return {
        "metrics": metrics,
        **cost,
        "evaluation_seconds": judging.seconds,
        "warnings": said,
        "code": code_digest(*CODE),
        "threads": torch.get_num_threads(),
    }


def record_of(arm: Arm, task: Task, recipe: Recipe, job: Job, found: JSON) -> JSON:
    """A record as a run has it, of the task's own metric, with what is only measured here."""
    cell = {**found, "peak_mb": found["added_mb"]}
    record = records_of(
        recipe, task, arm.name, arm.seed, job.cell.spec, job.cell.method or "none", job.cell.observer, cell
    )[0]
    return {**record, "protocol": job.protocol, "cpu_seconds": found["cpu_seconds"], "code": found["code"]}


def markdown(records: Sequence[JSON]) -> Iterator[str]:
    """A table for each protocol and spec: a row a method, a column an arm; means over seeds."""
    arms = list(dict.fromkeys(record["conditioning"] for record in records))
    full = {arm: [r["value"] for r in records if r["conditioning"] == arm and r["spec"] == FULL] for arm in arms}
    seeds = len({record["seed"] for record in records})
    shown = ", ".join(f"{arm} {_mean(values)}" for arm, values in full.items())
    yield f"Full precision ({records[0]['split']}, {records[0]['metric']}, {seeds} seed(s)): {shown}."
    rival = next((arm for arm in arms if arm != BASELINE), None) if BASELINE in arms else None
    tables: dict[tuple[str, str], list[JSON]] = {}
    for record in records:
        if record["spec"] != FULL:
            tables.setdefault((record["protocol"], record["spec"]), []).append(record)
    for (protocol, spec), members in tables.items():
        columns = [*arms, *(["gain"] if rival else []), "seconds", "CPU s", "MB"]
        yield f"\n| {spec}, protocol {protocol} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
        gains = []
        for name in dict.fromkeys((record["method"], record["observer"]) for record in members):
            rows = [record for record in members if (record["method"], record["observer"]) == name]
            values = {arm: {r["seed"]: r["value"] for r in rows if r["conditioning"] == arm} for arm in arms}
            cells = [_mean(list(values[arm].values())) for arm in arms]
            if rival:
                both = values[BASELINE].keys() & values[rival].keys()
                sign = 1.0 if rows[0]["higher_is_better"] else -1.0
                paired = [sign * (values[rival][seed] - values[BASELINE][seed]) for seed in both]
                gains += [statistics.fmean(paired)] if paired else []
                cells.append(f"{gains[-1]:+.2f}" if paired else "–")
            cells += [f"{statistics.median(r[key] for r in rows):.1f}" for key in ("seconds", "cpu_seconds")]
            cells.append(f"{max(record['peak_mb'] for record in rows):.0f}")
            yield f"| {', '.join(part for part in name if part)} | {' | '.join(cells)} |"
        if gains:
            yield f"\nMean gain {statistics.fmean(gains):+.2f} over {len(gains)} rows, worst {min(gains):+.2f}."


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def run(arguments: argparse.Namespace) -> int:
    """Everything that is missing, then the results file and the table."""
    overrides = [f"split={arguments.split}", *arguments.o]
    name, recipe = read_recipe(arguments.recipe, overrides)
    everything = jobs(arguments)
    say = Aloud()
    places = arguments.models or [trained(name, recipe, arguments.out, say)]
    arms = arms_in(places, [word for word in arguments.arms.split(",") if word], arguments.seeds)
    task = create(recipe.task.name, **recipe.task.options)
    records: list[JSON] = []
    done = left = failed = 0
    now, old = code_digest(*CODE), 0
    for arm in arms:
        loaded = load(arm.folder / "model", device=device_of(recipe.device))
        key = fingerprint(loaded.model)
        for job in everything:
            path = cell_path(arguments.out, arm, key, task, recipe, job)
            if not path.is_file():
                if done >= arguments.limit:
                    left += 1
                    continue
                try:
                    found = compute(loaded, task, recipe, job, arm.seed)
                except InputError as error:  # a format that a method does not do, and the like
                    failed += 1
                    say.say(f"{path.stem}: {error}")
                    continue
                done += 1
                write_json(path, {**found, "arm": arm.name, "seed": arm.seed})
                value = found["metrics"][task.primary]
                say.say(f"{path.stem}: {value:.2f}, {found['cpu_seconds']:.1f} CPU s, {found['added_mb']:.0f} MB")
            found = read_json(path)
            old += bool(job.cell.method) and found["code"] != now
            records.append(record_of(arm, task, recipe, job, found))
    if old:
        say.say(f"note: {old} cells were made by an earlier state of the code; delete them to have them made again")
    if left:
        say.say(f"note: {left} cells are left by --limit; the same command goes on with them")
    if not records:
        return 1
    about = run_metadata(recipe=name, data_hash=task.fingerprint, settings=recipe.model_dump(exclude={"about", "arms"}))
    write_json(arguments.json or arguments.out / "results.json", {"run": about, "records": records})
    print("\n".join(markdown(records)))
    return 1 if failed else 0


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="folders of runs, or of single arms")
    parser.add_argument("--recipe", default="minilm-banking77", help="task, calibration, and what to train")
    parser.add_argument("-o", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe")
    parser.add_argument("--arms", default="", help="only these, by name, with commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="only these")
    parser.add_argument("--methods", default=METHODS, help="with commas; joined ones with +")
    parser.add_argument("--specs", default=SPECS, help="with commas")
    parser.add_argument("--observers", default="", help="of rtn (own) or of all (unified)")
    parser.add_argument("--protocol", nargs="+", choices=("own", "unified"), default=["own"], help="one or both")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="what is scored")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="compute at most so many missing cells")
    parser.add_argument("--out", type=Path, default=Path("runs/quant"), help="folder of the cells")
    parser.add_argument("--json", type=Path, help="the results; OUT/results.json unless given")
    try:
        return run(parser.parse_args())
    except InputError as error:
        print(f"quant.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
