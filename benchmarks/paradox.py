"""The pretraining paradox: what longer training does to a model's spectrum, its outliers and its low-bit accuracy.

    python benchmarks/paradox.py NAME=RUN [NAME=RUN ...] --data PATH [--split validation] [--limit N]
        [--methods repq,ptq4vit,erq] [--last] [--option classes=airplane,automobile,...] [--out FOLDER]
    s2d report RUN/paradox.json     # the trend of one run, as a page

RUN is a run's arm with kept checkpoints (``adamw=runs/vit-cifar10-small/arms/adamw-0-...``, of a recipe with
train.checkpoints). One row for each checkpoint and for the finished model (for that alone with --last): accuracy at
full precision; by round-to-nearest at W8A8 and W6A6 (percentile) and at W4A4 (each of the three calibrations, on 128
training examples), and at W4A4 by each of --methods; the median and largest sigma_1 over median singular value, the
smallest stable rank (||W||_F^2 / sigma_1^2), the largest output over its RMS with its weight and that weight's PCDR_1
to PCDR_3, and how many weights the audit flags. Rows are kept in RUN/paradox.json one by one; one that is there is
not computed again. FOLDER receives paradox.md (the table) and paradox.svg (accuracy and outliers by step).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from s2d import quant
from s2d.audit import audit
from s2d.io.files import read_json, write_json
from s2d.io.provenance import run_metadata
from s2d.models import load
from s2d.targets.weights import find_targets
from s2d.tasks import Task, create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import evaluate

CELLS = (
    ("w8a8", "rtn", "percentile"),
    ("w6a6", "rtn", "percentile"),
    ("w4a4", "rtn", "minmax"),
    ("w4a4", "rtn", "percentile"),
    ("w4a4", "rtn", "mse"),
)
PANELS = (
    ("accuracy, full precision", "fp32"),
    ("accuracy, W4A4 min-max", "w4a4 minmax"),
    ("lost at W4A4, mean of 3 calibrations", "loss"),
    ("worst output over its RMS", "worst output/RMS"),
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def limit(task: Task, most: int | None) -> None:
    """Let unshuffled passes, which are evaluations, end after so many examples."""
    if most is None:
        return
    whole = task.batches

    def some(split: Any, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[dict[str, Any]]:
        left = most
        for batch in whole(split, batch_size=batch_size, seed=seed, shuffle=shuffle):
            if not shuffle and left <= 0:
                return
            yield batch if shuffle else {name: tensor[:left] for name, tensor in batch.items()}
            left -= len(next(iter(batch.values())))

    task.batches = some  # type: ignore[method-assign]


def row_of(folder: Path, task: Task, split: Any, methods: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything measured on one checkpoint, and its audit."""
    loaded = load(folder)
    task.prepare(loaded)
    inputs = calibration_inputs(task, 128, 32, 0)
    row: dict[str, Any] = {"fp32": evaluate(loaded.model, task, split=split, batch_size=256)[task.primary]}
    for spec, method, observer in [*CELLS, *(("w4a4", method, None) for method in methods)]:
        quantized = quant.quantize(loaded.model, spec, calibration=inputs, method=method, observer=observer)
        row[f"{spec} {observer or method}"] = evaluate(quantized, task, split=split, batch_size=256)[task.primary]
    found = audit(loaded.model, inputs, name=folder.name)
    ratios = [r.sigma_over_median for r in found.rows if r.sigma_over_median is not None]
    singular = [torch.linalg.svdvals(target.matrix().float()) for target in find_targets(loaded.model)]
    worst = found.worst(1)[0]
    row |= {
        "median sigma_1/median": statistics.median(ratios),
        "largest sigma_1/median": max(ratios),
        "smallest stable rank": min(float((s**2).sum() / s[0] ** 2) for s in singular),
        "worst output/RMS": worst.output_ratio,
        "of": worst.weight,
        "its PCDR": list(worst.pcdr or ()),
        "flagged": len(found.selected),
    }
    return row, found.to_json()


def records_of(label: str, row: dict[str, Any], task: Task, model: str, split: str) -> list[dict[str, Any]]:
    """A checkpoint's scores as records of a results file."""
    common = {"task": task.name, "model": model, "conditioning": label, "metric": task.primary, "split": split}
    records = [{**common, "spec": "fp32", "method": "none", "value": row["fp32"]}]
    for spec, method, observer in CELLS:
        value = row[f"{spec} {observer}"]
        records.append({**common, "spec": spec, "method": method, "observer": observer, "value": value})
    return records


def step_of(name: str, run: Path) -> int:
    return int(name) if name.isdecimal() else int(read_json(run / "training.json")["steps"])


def lost(row: dict[str, Any]) -> float:
    """Points that W4A4 by round-to-nearest costs, the mean of the calibrations."""
    return row["fp32"] - statistics.mean(row[f"{spec} {observer}"] for spec, _, observer in CELLS if spec == "w4a4")


def table(rows: dict[str, dict[int, dict[str, Any]]]) -> str:
    columns = [key for key in next(iter(next(iter(rows.values())).values())) if key not in ("of", "its PCDR")]
    lines = [
        "| arm, steps | " + " | ".join([*columns, "of", "its PCDR_1..3"]) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for arm, found in rows.items():
        for step, row in sorted(found.items()):
            cells = [f"{row[c]:.2f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
            shares = " ".join(f"{share:.2f}" for share in row["its PCDR"])
            lines.append(f"| {arm}, {step} | " + " | ".join([*cells, f"`{row['of']}`", shares]) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Four panels over the steps, one line an arm."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        print(f"no figure: pip install matplotlib, and run this again for {path}")
        return
    drawn = Figure(figsize=(8, 6), layout="constrained")
    for panel, (title, key) in zip(drawn.subplots(2, 2).flat, PANELS, strict=True):
        for colour, (arm, found) in zip(COLOURS, rows.items(), strict=False):
            steps = sorted(found)
            values = [lost(found[step]) if key == "loss" else found[step][key] for step in steps]
            panel.plot(steps, values, "o-", color=colour, label=arm)
        panel.set_xscale("log")
        panel.set_title(title)
        panel.set_xlabel("steps")
        panel.grid(alpha=0.3)
        panel.legend()
    drawn.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--task", default="image-classification")
    parser.add_argument("--data")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=A,B,...")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int, help="Evaluate on the first so many examples.")
    parser.add_argument("--methods", default="", help="More ways to quantize to W4A4, with commas between.")
    parser.add_argument("--last", action="store_true", help="The finished models only.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = {key: value.split(",") for key, _, value in (o.partition("=") for o in arguments.option)}
    data = {} if arguments.data is None else {"data": arguments.data}
    task = create(arguments.task, **data, **options)
    limit(task, arguments.limit)
    methods = [name for name in arguments.methods.split(",") if name]
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for given in arguments.runs:
        arm, _, place = given.partition("=")
        run = Path(place)
        name = run.parent.parent.name if run.parent.name == "arms" else run.name
        path = run / "paradox.json"
        content = read_json(path) if path.is_file() else {}
        known, audits = content.get("rows", {}), content.get("audits", {})
        kept = sorted((run / "checkpoints").iterdir()) if not arguments.last else []
        records: list[dict[str, Any]] = []
        for folder in [*kept, run / "model"]:
            key = f"{folder.name} {arguments.split} {arguments.limit} {arguments.methods}"
            step = step_of(folder.name, run)
            if key not in known or f"step {step}" not in audits:
                known[key], audits[f"step {step}"] = row_of(folder, task, arguments.split, methods)
            records += records_of(f"step {step}", known[key], task, name, arguments.split)
            about = run_metadata(data_hash=task.fingerprint, split=arguments.split, run=str(run.name))
            write_json(path, {"kind": "trend", "run": about, "records": records, "audits": audits, "rows": known})
            rows.setdefault(arm, {})[step] = known[key]
            print(arm, folder.name, known[key], flush=True)
    print(table(rows))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "paradox.md").write_text(table(rows), encoding="utf-8")
        figure(rows, arguments.out / "paradox.svg")


if __name__ == "__main__":
    main()
