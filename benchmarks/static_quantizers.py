"""What other people's static quantizers leave of a model: torch's own ONNX export against the folder that s2d writes.

    python benchmarks/static_quantizers.py --data banking77 adamw:0=FOLDER adamw:1=FOLDER s2d:0=FOLDER ...
        [--rows N] [--quantizers onnxruntime,nncf] [--out DIR] [--json FILE]

A model is NAME:SEED=FOLDER, a fine-tuned text classifier (`s2d condition`, an arm of `s2d run`), or NAME:SEED=FILE.pt,
a DINOv2-small that `benchmarks/vision.py` trained (then --data is the folder of CIFAR-10's tables). Each is exported by
torch.onnx.export at opset 20 (as it is, and mended by `s2d doctor --fix` with the first calibration batch) and by
``s2d export --for any --calibration-set``, and quantized by onnxruntime's
`quantize_static` (QDQ, min-max, one range a tensor) and by NNCF, both at their defaults, with the same 128 training
texts or 64 images. Scores are accuracies on the same test rows, by onnxruntime; --rows spreads so many over the file.
A score is a file in --out: a call that is repeated goes on. A quantizer that fails is a line with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.beds import TEXTS, Bed, image_bed, text_bed
from peers.by_nncf import by_nncf
from peers.by_onnxruntime import by_onnxruntime
from peers.contract import rows

from s2d.export import onnx_doctor
from s2d.export.conditioned import export_conditioned, find_compiler
from s2d.export.onnx import OnnxModel, write_onnx
from s2d.io.files import read_json, write_json
from s2d.io.provenance import run_metadata

OPSET, PADDED = 20, 16
FULL = "full precision"
FILES = {"torch's file": "torch", "torch's file mended": "mended", "s2d's file": "model"}

QUANTIZERS = {"onnxruntime": by_onnxruntime, "nncf": by_nncf}


def cells(options: argparse.Namespace, quantizers: list[str]) -> Iterator[dict[str, Any]]:
    """A record for each model, file and quantizer; those that a call before made are read."""
    for each in options.models:
        model, _, source = each.partition("=")
        name, _, seed = model.partition(":")
        wanted = [("", FULL), *((file, quantizer) for file in FILES for quantizer in quantizers)]
        paths = {
            (file, way): options.out / f"{model}-{file}-{way}-{options.rows}.json".replace(" ", "-").replace(":", "-")
            for file, way in wanted
        }
        if missing := [cell for cell, path in paths.items() if not path.exists()]:
            bed = (
                image_bed(source, options.data, options.rows)
                if source.endswith(".pt")
                else text_bed(source, options.data, options.rows, options.max_length, PADDED)
            )
            where = {"task": bed.task, "model": bed.name, "conditioning": name, "seed": int(seed or 0), "split": "test"}
            with tempfile.TemporaryDirectory() as scratch:
                for cell, found in scored(bed, Path(scratch) / "model", missing):
                    file, way = cell
                    spec = "w8a8" if file else "fp32"
                    record = {**where, "spec": spec, "file": file, "method": way, "metric": "accuracy", **found}
                    write_json(paths[cell], record)
                    print(model, file, way, found.get("failed") or f"{found['value']:.2f}", flush=True)
        yield from (read_json(path) for path in paths.values())


def scored(bed: Bed, folder: Path, missing: list[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Export once, then quantize and score what is missing: the accuracy, or the last line of the failure."""
    export_conditioned(bed.model, folder, compiler=find_compiler("any"), inputs=bed.calibration)
    write_onnx(bed.model, bed.calibration[0], folder / "torch.onnx", opset=OPSET)
    feed = {name: value.numpy() for name, value in bed.calibration[0].items()}
    onnx_doctor.fix(folder / "torch.onnx", folder / "mended.onnx", feed)
    with np.load(folder / "calibration.npz") as held:
        examples = {name: torch.from_numpy(held[name]) for name in held.files}
    for file, way in missing:
        if way == FULL:
            yield (file, way), {"value": bed.score(OnnxModel(folder / "model.onnx"))}
            continue
        target = folder / f"{FILES[file]}.{way}.onnx"
        try:
            QUANTIZERS[way](folder / f"{FILES[file]}.onnx", target, rows([examples], examples))
            yield (file, way), {"value": bed.score(OnnxModel(target))}
        except Exception as error:  # a quantizer's own
            yield (file, way), {"value": None, "failed": f"{type(error).__name__}: {str(error)[-200:]}"}


def main() -> None:
    """Export, quantize, score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME:SEED=FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=0, help="test rows, spread evenly; all without it")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--quantizers", default="onnxruntime,nncf")
    parser.add_argument("--out", type=Path, default=Path("build/static-quantizers"), help="folder of the scores")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quantizers = [each for each in options.quantizers.split(",") if importlib.util.find_spec(each)]
    records = list(cells(options, quantizers))
    if options.json:
        kept = read_json(options.json)["records"] if options.json.exists() else []
        kept = [each for each in kept if each["task"] not in {record["task"] for record in records}]
        write_json(options.json, {"run": run_metadata(rows=options.rows, texts=TEXTS), "records": kept + records})


if __name__ == "__main__":
    main()
