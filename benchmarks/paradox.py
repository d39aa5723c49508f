"""The pretraining paradox: what longer training does to a model's spectrum, its outliers and its low-bit accuracy.

    python benchmarks/paradox.py RUN --task image-classification --data ../shared/data/cifar10 [--split validation]
        [--option classes=airplane,automobile,...] [--json FILE]
    python benchmarks/paradox.py runs/demo/arms/s2d-0-... --task docstrings
    s2d report RUN/paradox.json

RUN is a run's arm with kept checkpoints (``runs/vit-cifar10/arms/adamw-0-...``, of a recipe with train.checkpoints).
One row for each checkpoint and for the finished model: accuracy at full precision, and by round-to-nearest at W8A8,
W6A6 and W4A4 (each the three usual calibrations on 128 training examples), the median and largest sigma_1 over median
singular value, the largest output over its RMS with the weight it belongs to and that weight's PCDR_1, and how many
weights the audit flags. Results are kept in RUN/paradox.json row by row; a row that is there is not computed again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from s2d import quant
from s2d.audit import audit
from s2d.evaluation import evaluate
from s2d.models import load
from s2d.recipe import Calibration
from s2d.results import read_json, run_metadata, write_json
from s2d.runner import calibration_inputs
from s2d.tasks import Task, create

SPECS = ("w8a8", "w6a6", "w4a4")
CALIBRATORS = ("minmax", "percentile", "mse")


def row_of(folder: Path, task: Task, split: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything measured on one checkpoint, and its audit."""
    loaded = load(folder)
    task.prepare(loaded)
    inputs = calibration_inputs(task, Calibration(), 0)
    row: dict[str, Any] = {"fp32": evaluate(loaded.model, task, split=split)[task.primary]}
    for spec in SPECS:
        for observer in CALIBRATORS:
            quantized = quant.quantize(loaded.model, spec, calibration=inputs, observer=observer)
            row[f"{spec} {observer}"] = evaluate(quantized, task, split=split)[task.primary]
    found = audit(loaded.model, inputs, name=folder.name)
    ratios = [r.sigma_over_median for r in found.rows if r.sigma_over_median is not None]
    worst = found.worst(1)[0]
    row |= {
        "median sigma_1/median": statistics.median(ratios),
        "largest sigma_1/median": max(ratios),
        "worst output/RMS": worst.output_ratio,
        "of": worst.weight,
        "its PCDR_1": worst.pcdr[0] if worst.pcdr else None,
        "flagged": len(found.selected),
    }
    return row, found.to_json()


def records_of(label: str, row: dict[str, Any], task: Task, model: str, split: str) -> list[dict[str, Any]]:
    """A checkpoint's scores as records of a results file."""
    common = {"task": task.name, "model": model, "conditioning": label, "metric": task.primary, "split": split}
    records = [{**common, "spec": "fp32", "method": "none", "value": row["fp32"]}]
    for spec in SPECS:
        records += [
            {**common, "spec": spec, "method": "rtn", "observer": o, "value": row[f"{spec} {o}"]} for o in CALIBRATORS
        ]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--task", default="image-classification")
    parser.add_argument("--data")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=A,B,...")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = {key: value.split(",") for key, _, value in (o.partition("=") for o in arguments.option)}
    data = {} if arguments.data is None else {"data": arguments.data}
    task = create(arguments.task, **data, **options)
    path = arguments.json or arguments.run / "paradox.json"
    content = read_json(path) if path.is_file() else {}
    known, audits = content.get("rows", {}), content.get("audits", {})
    steps = sorted((arguments.run / "checkpoints").iterdir())
    last = read_json(arguments.run / "training.json")["steps"]
    records: list[dict[str, Any]] = []
    for folder in [*steps, arguments.run / "model"]:
        label = f"step {last if folder.name == 'model' else int(folder.name)}"
        if folder.name not in known or label not in audits:
            known[folder.name], audits[label] = row_of(folder, task, arguments.split)
        records += records_of(label, known[folder.name], task, arguments.run.name, arguments.split)
        about = run_metadata(data_hash=task.fingerprint, split=arguments.split, run=str(arguments.run.name))
        write_json(path, {"kind": "trend", "run": about, "records": records, "audits": audits, "rows": known})
        print(
            folder.name,
            *(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in known[folder.name].items()),
            sep="\n  ",
        )


if __name__ == "__main__":
    main()
