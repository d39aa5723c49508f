"""The same promise by others: onnxruntime's static quantizer, and NNCF's accuracy control.

    python benchmarks/promise_rivals.py trained:vit-fashion --task image-classification --data DIR \
        --for onnxruntime openvino --within 1.0 [--json FILE]

onnxruntime's ``quantize_static`` takes no promise: its defaults (QDQ, min-max, one range a tensor), 128 training
examples. NNCF's ``quantize_with_accuracy_control`` gets the points as max_drop, the same 128 examples and the
validation split, which it searches on; it needs NNCF installed. Each file is run in its runtime on validation and test;
milliseconds are of one row on one thread, in turns with full precision.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from peers.by_nncf import SAMPLES, controlled
from peers.by_onnxruntime import by_onnxruntime as onnxruntime_static
from peers.contract import Row, inputs_of, rows
from promises import add_subject, task_of

from s2d.export import open_exported
from s2d.export.gate import take_turns
from s2d.export.onnx import write_onnx
from s2d.io.files import JSON, write_json
from s2d.io.provenance import run_metadata
from s2d.models import load
from s2d.tasks import Split, Task
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import evaluate, model_for


def by_onnxruntime(full: Path, target: Path, calibration: list[Row], task: Task, within: float) -> None:
    """Static quantization at its defaults."""
    onnxruntime_static(full, target, calibration)


def by_nncf(full: Path, target: Path, calibration: list[Row], task: Task, within: float) -> None:
    """Accuracy control on the validation split."""
    names, examples = inputs_of(full), []
    for batch in task.batches("validation", batch_size=1):
        (row,) = rows(task.inputs(batch), names)
        examples.append((row, int(batch["labels"][0])))
    controlled(full, target, calibration, examples, within)


def main() -> None:
    """Every rival in every runtime at every promise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_subject(parser)
    parser.add_argument("--for", dest="runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--within", nargs="+", type=float, default=[1.0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    task = task_of(arguments)
    plain = model_for(load(arguments.model), task)
    batches = calibration_inputs(task, SAMPLES, 16, 0)
    splits: tuple[Split, ...] = ("validation", "test")
    scores = {split: evaluate(plain, task, split=split)[task.primary] for split in splits}
    found: list[JSON] = []
    with tempfile.TemporaryDirectory() as scratch:
        full = Path(scratch) / "full.onnx"
        write_onnx(plain, batches[0], full)
        calibration = list(rows(batches, inputs_of(full)))
        one = {name: value[:1] for name, value in batches[0].items()}
        for runtime in arguments.runtimes:
            tries = [("onnxruntime quantize_static", by_onnxruntime, within) for within in arguments.within[:1]]
            tries = tries if runtime == "onnxruntime" else []
            if importlib.util.find_spec("nncf"):
                tries += [("NNCF accuracy control", by_nncf, within) for within in arguments.within]
            for name, run, within in tries:
                target = Path(scratch) / f"{len(found)}{'.xml' if runtime == 'openvino' else '.onnx'}"
                start = time.monotonic()
                try:
                    run(full, target, calibration, task, within)
                except Exception as error:  # a rival's own
                    print(f"{name}, {runtime}, {within:g}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
                    continue
                seconds = time.monotonic() - start
                made, before = (open_exported(file, runtime=runtime) for file in (target, full))
                ms, full_ms = (median(each) for each in take_turns([partial(made, **one), partial(before, **one)], 15))
                lost = {split: scores[split] - evaluate(made, task, split=split)[task.primary] for split in splits}
                size = target.stat().st_size
                size += target.with_suffix(".bin").stat().st_size if runtime == "openvino" else 0
                found.append(
                    {
                        "rival": name,
                        "runtime": runtime,
                        "within": within,
                        "bytes": size,
                        "speedup": full_ms / ms,
                        "seconds": seconds,
                        "lost_on_validation": lost["validation"],
                        "lost_on_test": lost["test"],
                    }
                )
                print(found[-1], flush=True)
                if arguments.json:
                    about = run_metadata(model=arguments.model, full=scores, sizes=task.sizes())
                    write_json(arguments.json, {"run": about, "rivals": found})


if __name__ == "__main__":
    main()
