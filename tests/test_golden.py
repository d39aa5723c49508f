"""One golden result for every command: what a fixed seed gives stays the same, bit for bit, while the code is moved.

All commands run one after the other in one process, on tiny models, and `golden.json` says what they gave. A number of
it changes only in a commit that names why; this writes the new ones:

    python tests/test_golden.py

Every x86 processor gives these bits: the process is held to the instructions that all of them have, and to one thread.
They are those of one set of libraries, named in the file; with others the comparison would be of those, and is skipped.
Times, places and version numbers are no results. Only the command line is used, so modules may move.
"""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)  # half a minute of work; more where many tests share a core

GOLDEN = Path(__file__).with_name("golden.json")
SOURCE = Path(__file__).parents[1] / "src"
COMPUTING = ("torch", "transformers", "numpy", "pillow", "onnx", "onnxscript", "onnxruntime", "compressed-tensors")

# One thread, and no instruction that some processors lack: in torch, MKL, oneDNN, numpy and the C library.
EVERY_PROCESSOR = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F",
}
SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CI": "1", "CUDA_VISIBLE_DEVICES": ""}

# Tiny random models have no outliers; the decay should have something to do all the same.
EAGER = "-o decay.refresh_every=2 -o decay.threshold=0.1 -o decay.outlier_ratio=1.5 --steps 4"
IMAGES = "--task image-classification --data run/data"
TEXTS = "--task language-modeling --data texts -o task.window=32"
COMMANDS = f"""
run vit-fashion-condition --smoke -o quantize.specs=[fp32,w4a4] --out run --json run.json
demo --vision --no-open --out demo -o model=new:vit-tiny -o task.data=run/data -o task.classes=[circle,line,square]\
 -o train.steps=2 -o quantize.specs=[fp32,w4a4] -o quantize.methods=[rtn] --json demo.json
audit new:vit-tiny --data run/data --json audit-images.json
audit new:llama-tiny --data texts/train.txt --json audit-texts.json
condition new:vit-tiny {IMAGES} -o train.batch_size=8 {EAGER} --out vit --json condition-images.json
condition new:llama-tiny --objective distill {TEXTS} -o decay.strength=0.005 -o train.batch_size=4 {EAGER} --out llama\
 --json condition-texts.json
quantize vit --observer mse {IMAGES} -o quantize.calibration.samples=16 --out vit-w4a4 --json quantize-images.json
quantize llama --spec w4a8 --method rotation+gptq --data texts/train.txt --out llama-w4a8 --json quantize-texts.json
quantize llama --spec w4a16 --data texts/train.txt --out llama-w4a16
evaluate vit-w4a4 {IMAGES} --json evaluate-images.json
evaluate llama-w4a8 {TEXTS} --json evaluate-texts.json
export vit-w4a4 {IMAGES} --no-time --out vit.onnx --json export-onnx.json
export llama-w4a16 {TEXTS} --no-time --out packed --json export-packed.json
bench llama vit.onnx --batch 1,2 --rounds 1 --json bench.json
report run/results.json --out report.html
recipes list --json recipes.json
recipes new mine.yaml --like vit-cifar10-small -o train.steps=7
doctor --json doctor.json
"""
RESULTS = (
    "run",
    "demo",
    "audit",
    "condition",
    "quantize",
    "evaluate",
    "export",
    "bench",
    "report",
    "recipes",
    "doctor",
)

# torch takes square roots from MKL, whose vector functions nothing holds to the same instructions. They begin with an
# estimate that processors make differently: every fifth root is one bit off. numpy takes exact ones.
PROGRAM = """
import sys, numpy, torch
from s2d.cli import main

def root(x):
    return torch.from_numpy(numpy.asarray(numpy.sqrt((x if x.dtype == torch.float64 else x.float()).numpy()))).to(
        x.dtype if x.is_floating_point() else torch.float32)

library = torch.library.Library("aten", "IMPL")
library.impl("sqrt", root, "CPU")
library.impl("sqrt_", lambda x: x.copy_(root(x)), "CPU")
library.impl("sqrt.out", lambda x, *, out: out.copy_(root(x)), "CPU")
for line in sys.stdin:
    if code := main([*line.split(), "--quiet"]):
        sys.exit(f"{code}: s2d {line}")
"""

_CHANGES_WITH_TIME = ("seconds", "peak_mb", "run")


def commands_run(folder: Path) -> None:
    """Run all commands in a folder; each must succeed."""
    words = [
        "the",
        "robin",
        "and",
        "a",
        "wren",
        "saw",
        "one",
        "old",
        "fig",
        "by",
        "its",
        "drill",
        "very",
        "few",
        "plum",
    ]
    (folder / "texts").mkdir()
    for number, split in enumerate(("train", "validation", "test")):
        lines = (f"{words[i % 15]} {words[7 * i % 15]} is {i * i % 101} of {words[i // 3 % 15]}\n" for i in range(200))
        (folder / "texts" / f"{split}.txt").write_text("".join(list(lines)[number:]))
    environment = {**os.environ, **EVERY_PROCESSOR, **SURROUNDINGS, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    given = COMMANDS.strip() + "\n"
    done = subprocess.run(
        command, input=given, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What the commands gave, by command: a few numbers to read, and digests of all others and of the tensors."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    found: dict[str, dict[str, Any]] = {}
    for command in ("run", "demo"):
        content = read(f"{command}.json")
        found[command] = {
            "scores": {f"{r['conditioning']} {r['spec']} {called(r)}": r["value"] for r in content["records"]},
            "history": digest(content["history"]),
            "audits": digest(content["audits"]),
        }
    for what in ("images", "texts"):
        audit, conditioned = read(f"audit-{what}.json")["records"], read(f"condition-{what}.json")
        found.setdefault("audit", {})[what] = {
            "sigma": [row["sigma"][0] for row in audit],
            "all": digest(audit),
        }
        found.setdefault("condition", {})[what] = {
            "losses": conditioned["training"]["losses"],
            "selected": [row["selected"] for row in conditioned["history"]],
            "history": digest(conditioned["history"]),
        }
        found.setdefault("quantize", {})[what] = {"plan": digest(read(f"quantize-{what}.json")["plan"])}
        scores = {record["metric"]: record["value"] for record in read(f"evaluate-{what}.json")["records"]}
        found.setdefault("evaluate", {})[what] = scores
    for command, models in (("condition", ("vit", "llama")), ("quantize", ("vit-w4a4", "llama-w4a8", "llama-w4a16"))):
        found[command]["tensors"] = {model: saved_tensors(folder / model) for model in models}
    exported = [read(f"export-{form}.json")["export"] for form in ("onnx", "packed")]
    found["export"] = {
        "onnx": graph_of(folder / "vit.onnx"),
        "packed": saved_tensors(folder / "packed"),
        "layers": [[layer["name"] for layer in report["layers"]] for report in exported],
        "failures": [report["failures"] for report in exported],
    }
    rows = [[row[key] for key in ("model", "runtime", "threads", "batch")] for row in read("bench.json")["bench"]]
    found["bench"] = {"rows": [row for row in rows if row[1] in ("torch", "onnxruntime")]}
    numbers = numbers_of((folder / "report.html").read_text(encoding="utf-8"))
    found["report"] = {"cells": len(numbers), "first": numbers[:6], "all": digest(numbers)}
    new = [line for line in (folder / "mine.yaml").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    found["recipes"] = {"list": sorted(read("recipes.json")["recipes"]), "new": new}
    found["doctor"] = {name: sorted(read("doctor.json")[name]) for name in ("tasks", "methods")}
    return found


def called(record: dict[str, Any]) -> str:
    return record["observer"] or record["method"]


def digest(content: Any) -> str:
    """Digest of all that does not change with time; floats as Python writes them, which is exact."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(each) for key, each in value.items() if key not in _CHANGES_WITH_TIME}
        return [kept(each) for each in value] if isinstance(value, list) else value

    return hashlib.sha256(json.dumps(kept(content), sort_keys=True).encode()).hexdigest()[:16]


def numbers_of(page: str) -> list[str]:
    """The numbers in the tables of a report, as written there; without the table that has times."""
    tables = [table for table in re.findall(r"<table.*?</table>", page, re.DOTALL) if "seconds" not in table]
    cells = [cell for table in tables for cell in re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)]
    texts = [html.unescape(re.sub(r"<[^>]+>|\s+", " ", cell)).strip() for cell in cells]
    return [text for text in texts if re.fullmatch(r"[+−-]?[\d.]+ ?[×%]?", text)]


def saved_tensors(folder: Path) -> str:
    """Digest of names, types, shapes and bytes of all tensors in a folder, whatever their files are called."""
    import torch
    from safetensors.torch import load_file

    total = hashlib.sha256()
    tensors = [item for file in folder.glob("*.safetensors") for item in load_file(file).items()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    assert tensors
    return total.hexdigest()[:16]


def graph_of(file: Path) -> dict[str, Any]:
    """How often an ONNX file has each operator, and a digest of its constants."""
    import onnx

    graph = onnx.load(file).graph
    constants = [
        f"{c.data_type} {list(c.dims)} {onnx.numpy_helper.to_array(c).tobytes().hex()}" for c in graph.initializer
    ]
    operators = Counter(node.op_type for node in graph.node)
    return {"operators": dict(sorted(operators.items())), "constants": digest(sorted(constants))}


def surroundings() -> dict[str, str]:
    """What the bits depend on beside s2d."""
    versions = {name: importlib.metadata.version(name) for name in COMPUTING}
    return {"machine": f"{platform.system()} {platform.machine()}", **versions}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    content = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for module in (*(name for name in COMPUTING if name != "pillow"), "PIL", "jinja2"):
        pytest.importorskip(module.replace("-", "_"))
    if (here := surroundings()) != content["made with"]:
        pytest.skip(f"golden.json holds the bits of {content['made with']}; here are {here}")
    return content["results"]


@pytest.fixture(scope="module")
def results(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("golden")
    commands_run(folder)
    return results_of(folder)


@pytest.mark.parametrize("command", RESULTS)
def test_a_command_gives_what_it_gave(command: str, golden: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    assert results[command] == golden[command]


def test_the_golden_runs_have_something_to_select(golden: dict[str, Any]) -> None:
    assert all(sum(golden["condition"][what]["selected"]) > 0 for what in ("images", "texts"))
    assert golden["export"]["failures"] == [[], []]


def write() -> None:
    with tempfile.TemporaryDirectory() as name:
        commands_run(Path(name))
        content = {"made with": surroundings(), "results": results_of(Path(name))}
    GOLDEN.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
