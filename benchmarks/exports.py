"""Every exporter by every spec and precision, on tiny models: exported and equal, or refused with a reason.

    python benchmarks/exports.py                             the whole table
    python benchmarks/exports.py --models bert --exporters .onnx,.xml --markdown docs/results/exports.md

A cell is ``ok`` when the file was written, ran at another batch and length (where the runtime takes them), and agrees
with the simulated model: relative difference of the outputs at most 2 %. Anything but ``ok`` or a refusal is a fault,
and the command then ends with 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import s2d
from s2d.errors import InputError
from s2d.export import open_exported
from s2d.optional import require

HEADS = {"granularity": "head"}
TOKENS = {"granularity": "token"}
SPECS: dict[str, Any] = {
    "w8a8": "w8a8",
    "w4a8": "w4a8",
    "w4a4": "w4a4",
    "w2a3": "w2a3",
    "w4a16": "w4a16",
    "w8a16": "w8a16",
    "w16a8": "w16a8",
    "w8a8kv8": "w8a8kv8",
    "w8a8, tokens": "w8a8-token",
    "w8a8, heads": {"base": "w8a8", "attention": HEADS},
    "w4a4, heads": {"base": "w4a4", "attention": HEADS},
    "w8a8, one scale a weight": {"base": "w8a8", "weight": {"granularity": "tensor"}},
    "w4a8, groups of 16": {"base": "w4a8", "weight": {"granularity": "group-16"}},
    "w4a16, groups of 32": {"base": "w4a16", "weight": {"granularity": "group-32"}},
    "w4a8 of Linears, tokens": {"weight": {"bits": 4}, "activation": {"bits": 8, **TOKENS}, "attention": False},
    "w8a8 of Linears": {"base": "w8a8", "attention": False},
    "signed activations": {"base": "w8a8", "activation": {"format": "int8"}},
    "ends too": {"base": "w8a8", "ends": "w8a8"},
    "fp8": {"weight": {"format": "fp8_e4m3"}, "activation": {"format": "fp8_e4m3"}},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HALVES = ("w8a8", "w4a16")  # precisions are tried with these
AGREES = 0.02


def bert() -> tuple[nn.Module, Callable[..., dict[str, Tensor]]]:
    """An encoder of texts."""
    library = require("transformers", "hf")
    config = library.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )
    return library.BertModel(config, add_pooling_layer=False), texts


def llama() -> tuple[nn.Module, Callable[..., dict[str, Tensor]]]:
    """A decoder whose heads share keys and values."""
    library = require("transformers", "hf")
    config = library.LlamaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return library.LlamaForCausalLM(config), texts


def vit() -> tuple[nn.Module, Callable[..., dict[str, Tensor]]]:
    """An encoder of images."""
    library = require("transformers", "hf")
    config = library.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    return library.ViTModel(config, add_pooling_layer=False), images


def texts(rows: int, length: int = 12) -> dict[str, Tensor]:
    """Ids and a mask."""
    return {
        "input_ids": torch.randint(5, 90, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }


def images(rows: int, length: int = 12) -> dict[str, Tensor]:
    """Normal pixels; an image has one size."""
    return {"pixel_values": torch.randn(rows, 3, 32, 32)}


MODELS = {"bert": bert, "llama": llama, "vit": vit}


def first(output: Any) -> Tensor:
    """The output that counts."""
    return output if isinstance(output, Tensor) else next(iter(output.values()))


@torch.no_grad()
def cell(name: str, spec: Any, dtype: torch.dtype, suffix: str) -> str:
    """What happens to one of them."""
    torch.manual_seed(0)
    model, make = MODELS[name]()
    model = model.eval().to(dtype)

    def batch(rows: int, length: int = 12) -> dict[str, Tensor]:
        return {key: each.to(dtype) if each.is_floating_point() else each for key, each in make(rows, length).items()}

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"model{suffix}"
        try:
            quantized = s2d.quantize(model, spec, calibration=[batch(4), batch(4)])
            report = s2d.export(quantized, target, example=batch(2), embeddings=0, time_it=False)
            if suffix not in (".onnx", ".xml"):
                return f"ok, cosine {report.parity['exported']:.4f}"
            runner, worst = open_exported(target), 0.0
            simulated = quantized.float()
            for rows, length in ((1, 7), (3, 20)):
                feed = {
                    key: each.float() if each.is_floating_point() else each for key, each in make(rows, length).items()
                }
                wanted, found = first(simulated(**feed)), first(runner(**feed))
                worst = max(worst, float((wanted - found).norm() / wanted.norm()))
            integer = sum(count for kernel, count in report.kernels.items() if "Integer" in kernel or kernel[0] == "Q")
            kinds = f"{integer} integer, {sum(report.kernels.values()) - integer} float products"
            return f"{'ok' if worst <= AGREES else 'DIFFERS'}, {worst:.0e}; {kinds}"
        except InputError as error:
            return f"refused: {error}"
        except Exception:  # what the table is there to find
            return f"CRASH: {traceback.format_exc().strip().splitlines()[-1]}"


def cells(models: list[str], exporters: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """Model, spec, precision, exporter and what happens, one after the other."""
    for name in models:
        for label, spec in SPECS.items():
            for precision, dtype in DTYPES.items():
                if precision != "float32" and label not in HALVES:
                    continue
                for suffix in exporters:
                    yield name, label, precision, suffix or "folder", cell(name, spec, dtype, suffix)


def main() -> int:
    """Print the table as it grows; 1 where a cell is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--exporters", default=",".join((".onnx", ".xml", ".pte", ".gguf", "folder")))
    parser.add_argument("--markdown", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    exporters = ["" if each == "folder" else each for each in chosen.exporters.split(",")]
    lines = ["| model | spec | precision | exporter | what happens |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for row in cells(chosen.models.split(","), exporters):
        lines.append("| " + " | ".join(each.replace("|", "/").replace("\n", " ") for each in row) + " |")
        print(lines[-1], flush=True)
    faults = sum(" | DIFFERS" in line or " | CRASH" in line for line in lines)
    print(f"{len(lines) - 2} cells, {faults} faults")
    if chosen.markdown is not None:
        words = " ".join(["python benchmarks/exports.py", *sys.argv[1:]])
        text = ["# Exports: what is written, what is refused", "", f"Made by `{words}`.", "", *lines, ""]
        chosen.markdown.write_text("\n".join(text), encoding="utf-8")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
