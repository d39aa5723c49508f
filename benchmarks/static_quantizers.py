"""What other people's static quantizers leave of a model: torch's own ONNX export against the folder that s2d writes.

    python benchmarks/static_quantizers.py --data banking77 adamw=FOLDER s2d=FOLDER [--thin 4] [--json FILE]

A folder is a fine-tuned text classifier (`s2d condition`). Each is exported twice, by torch.onnx.export and by
``s2d export --for any --calibration-set`` (128 training texts), and quantized by onnxruntime's `quantize_static` at its
defaults (QDQ, min-max, one range a tensor), and by NNCF at its defaults where that is installed. Scores are accuracies
on every --thin-th test row, by onnxruntime. --data is a folder with train.csv and test.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from s2d.checkpoint import load
from s2d.export.conditioned import export_conditioned, find_compiler
from s2d.export.onnx import OnnxModel, write_onnx
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.tasks import create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import model_for

TEXTS = 128


def thinned(data: Path, every: int, into: Path) -> Path:
    """The same tables with every n-th test row."""
    into.mkdir()
    (into / "train.csv").write_bytes((data / "train.csv").read_bytes())
    with (data / "test.csv").open(newline="", encoding="utf-8") as source:
        head, *rows = csv.reader(source)
    with (into / "test.csv").open("w", newline="", encoding="utf-8") as target:
        csv.writer(target).writerows([head, *rows[::every]])
    return into


def feeds(rows: Any) -> Iterator[dict[str, np.ndarray]]:
    """One example after another."""
    held = {name: rows[name] for name in rows.files}
    return ({name: value[i : i + 1] for name, value in held.items()} for i in range(len(held["input_ids"])))


def by_onnxruntime(source: Path, target: Path, rows: Any) -> None:
    """Onnxruntime's static quantizer at its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = feeds(rows)

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(source, target, Rows())


def by_nncf(source: Path, target: Path, rows: Any) -> None:
    """NNCF's post-training quantizer at its defaults."""
    import nncf  # pyright: ignore[reportMissingImports]
    import onnx

    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(list(feeds(rows))), subset_size=TEXTS), target)


def main() -> None:
    """Export, quantize, score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--thin", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quantizers = {"onnxruntime": by_onnxruntime}
    if importlib.util.find_spec("nncf"):
        quantizers["nncf"] = by_nncf
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = thinned(options.data, options.thin, folder / "data")
        task = create("text-classification", data=str(data), max_length=options.max_length)

        def score(conditioning: str, file: str, method: str, path: Path) -> None:
            value = task.evaluate(OnnxModel(path))["accuracy"]
            where = {"task": options.data.name, "model": "MiniLM", "conditioning": conditioning, "split": "test"}
            spec = "w8a8" if file else "fp32"
            records.append(
                {**where, "spec": spec, "file": file, "method": method, "metric": "accuracy", "value": value}
            )
            print(conditioning, file, method, f"{value:.2f}", flush=True)

        for name, _, source in (each.partition("=") for each in options.models):
            loaded = load(source)
            model = model_for(loaded, task)
            inputs = calibration_inputs(task, TEXTS, 16, 0)
            written = folder / name
            export_conditioned(model, written, compiler=find_compiler("any"), inputs=inputs)
            write_onnx(model, inputs[0], written / "torch.onnx")
            rows = np.load(written / "calibration.npz")
            score(name, "", "full precision", written / "model.onnx")
            for file, kind in (("torch's file", "torch"), ("s2d's file", "model")):
                for quantizer, run in quantizers.items():
                    target = written / f"{kind}.{quantizer}.onnx"
                    try:
                        run(written / f"{kind}.onnx", target, rows)
                        score(name, file, quantizer, target)
                    except Exception as error:  # a quantizer's own
                        failed.append(f"{name}, {file}, {quantizer}: {type(error).__name__}: {str(error)[:150]}")
                        print(failed[-1], flush=True)
            if options.json:
                run_of = run_metadata(thin=options.thin, texts=TEXTS, failed=failed)
                write_json(options.json, {"run": run_of, "records": records})


if __name__ == "__main__":
    main()
