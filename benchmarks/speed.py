"""How fast exported files run, against their own full precision in the same runtime and against torch, in one run.

    python benchmarks/speed.py MODEL... [--vit-s] [--lengths 24,128] [--batches 1] [--threads 1] [--json FILE]

MODEL is a folder that `s2d quantize` wrote; --vit-s adds a ViT of ViT-S/16's shape at 224 x 224 with random weights at
W4A8 (its speed does not depend on them). Each model is written at full precision and as quantized. `s2d.export.timing`
times both files in every runtime that is installed, and the plain model in torch, in turns. A row gives ratios of
medians; sizes are those of the files, with tables of embeddings at 8 bits and at 4.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

import s2d
from s2d.checkpoint import load, save
from s2d.errors import InputError
from s2d.export.copies import shared_copy
from s2d.export.onnx import write_onnx
from s2d.export.timing import bench
from s2d.io.files import JSON, write_json
from s2d.io.provenance import run_metadata
from s2d.quant.modules.record import remove

TABLES = (8, 4)  # bits of the embeddings
VIT_S = "ViT-S/16, random, W4A8"


def vit_s() -> nn.Module:
    """A quantized transformers ViT of that shape."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    plain = ViTModel(config, add_pooling_layer=False).eval()
    return s2d.quantize(plain, "w4a8", calibration=[{"pixel_values": torch.randn(4, 3, 224, 224)}], observer="mse")


def example_for(model: nn.Module) -> dict[str, Tensor]:
    """A batch: images for the ViT, tokens for all others."""
    if type(model).__name__ == "ViTModel":
        return {"pixel_values": torch.randn(2, 3, 224, 224)}
    ids = torch.randint(1, 30, (8, 32))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def rows(name: str, model: nn.Module, arguments: argparse.Namespace) -> Iterator[JSON]:
    """A row for every length, number of threads and batch size; images have but one length."""
    example = example_for(model)
    tables = TABLES if "input_ids" in example else TABLES[:1]
    lengths = arguments.lengths if "input_ids" in example else arguments.lengths[:1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = remove(shared_copy(model))
        write_onnx(plain, example, folder / "fp32.onnx")
        save(plain, folder / "plain")
        reports = {
            bits: s2d.export(model, folder / f"{bits}.onnx", example=example, embeddings=bits, time_it=False)
            for bits in tables
        }
        sizes = {f"file_mb_{bits}": report.file_mb for bits, report in reports.items()}
        contestants = [folder / "plain", folder / "fp32.onnx", folder / f"{TABLES[0]}.onnx"]
        for length in lengths:
            found = bench(
                contestants,
                batches=arguments.batches,
                threads=arguments.threads,
                length=length,
                rounds=arguments.rounds,
            )
            for threads in arguments.threads:
                for batch in arguments.batches:
                    here = [row for row in found if (row.threads, row.batch) == (threads, batch)]
                    times = {f"{Path(row.model).stem} {row.runtime}": row.p50_ms for row in here}
                    yield {
                        "model": name,
                        "spec": reports[TABLES[0]].spec,
                        "length": length,
                        "threads": threads,
                        "batch": batch,
                        "plain_mb": reports[TABLES[0]].fp32_mb,
                        **sizes,
                        "p50_ms": times,
                    }


def records_of(row: JSON) -> Iterator[JSON]:
    """A number each, for the tables of the docs."""
    where = {key: row[key] for key in ("model", "spec", "length", "threads", "batch")}
    about = {"task": "speed", "conditioning": "exported", **where, "split": "none"}
    times = row["p50_ms"]
    for runtime in ("onnxruntime", "openvino"):
        if (ours := times.get(f"{TABLES[0]} {runtime}")) is not None:
            yield {**about, "metric": f"{runtime}, ms", "value": ours, "higher_is_better": False}
            for rival, name in ((f"fp32 {runtime}", "its fp32"), ("plain torch", "torch")):
                yield {**about, "metric": f"{runtime}, times {name}", "value": times[rival] / ours}
    for bits in TABLES:
        if (size := row.get(f"file_mb_{bits}")) is not None:
            yield {**about, "metric": f"MB, tables of {bits} bits", "value": size, "higher_is_better": False}
            yield {**about, "metric": f"times smaller, {bits} bits", "value": row["plain_mb"] / size}


def line(row: JSON) -> str:
    """A row of the Markdown table."""
    times = row["p50_ms"]
    cells = [row["model"], row["spec"], row["length"], row["threads"], row["batch"]]
    for runtime in ("onnxruntime", "openvino"):
        ours = times.get(f"{TABLES[0]} {runtime}")
        cells.append(
            ""
            if ours is None
            else f"{ours:.1f} ms, {times[f'fp32 {runtime}'] / ours:.2f}x / {times['plain torch'] / ours:.2f}x"
        )
    cells.append(
        ", ".join(f"{row[key]:.1f} MB ({row['plain_mb'] / row[key]:.1f}x)" for key in row if key.startswith("file_mb"))
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def numbers(text: str) -> list[int]:
    """``"1,8"`` as numbers."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="folders that s2d quantize wrote")
    parser.add_argument("--vit-s", action="store_true", help="also a random ViT of ViT-S/16's shape at W4A8")
    parser.add_argument("--lengths", type=numbers, default="24,128", help="tokens a row")
    parser.add_argument("--batches", type=numbers, default="1", help="rows at once")
    parser.add_argument("--threads", type=numbers, default="1", help="of a product")
    parser.add_argument("--rounds", type=int, default=30, help="calls of each")
    parser.add_argument("--json", type=Path, help="the results")
    arguments = parser.parse_args()
    found: list[JSON] = []
    runtimes = "onnxruntime: its fp32 / torch | OpenVINO: its fp32 / torch"
    print(f"| model | spec | tokens | threads | batch | {runtimes} | file, tables of 8, 4 bits |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        models = [(name, load(name).model) for name in arguments.models]
        for name, model in [*models, *([(VIT_S, vit_s())] if arguments.vit_s else [])]:
            for row in rows(name, model, arguments):
                found.append(row)
                print(line(row), flush=True)
    except InputError as error:
        print(f"speed.py: {error}", file=sys.stderr)
        return 2
    if arguments.json is not None:
        write_json(
            arguments.json, {"run": run_metadata(), "records": [each for row in found for each in records_of(row)]}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
