"""Every exporter by every spec and precision, on tiny models: exported and equal, or refused with a reason.

    python benchmarks/exports.py --json build/exports.json --markdown docs/results/exports.md
    python benchmarks/exports.py --json FILE --models bert --exporters .onnx,.xml      a part of it

Finished cells are kept in FILE, and the same command goes on with those that are missing (``--most SECONDS`` stops
early). A cell is ``ok`` when the file was written, ran at another batch and length (where the runtime takes them), and
agrees with the simulated model: relative difference of the outputs at most 2 %. Anything but ``ok`` or a refusal is a
fault, and the command then ends with 1; ``not here`` is a runtime that is not installed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import s2d
from s2d.errors import InputError, MissingExtra
from s2d.export import open_exported
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
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
EXPORTERS = ("folder", ".gguf", ".pte", ".onnx", ".xml")
AGREES = 0.02
LEGEND = (
    "- `1e-07, 8+0`: written, run at two other batch sizes and lengths; the largest relative difference of the outputs",
    "  from the simulated model (at most 2e-02), and how many products are in integers + in floating point.",
    "- `ok`: written and run by its runtime on the example; the cosine to the simulated model is 1.0000, or as given.",
    "- `no (2)`: refused in one line, for reason 2 below; no file is left. LAYER stands for a layer's name.",
)


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
        except MissingExtra as error:
            return f"not here: {error}"
        except InputError as error:
            return f"refused: {str(error).replace(folder, '.')}"
        except Exception:  # what the table is there to find
            return f"CRASH: {traceback.format_exc().strip().splitlines()[-1]}"


def cells(models: list[str], exporters: list[str], specs: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Model, spec, precision and exporter, one after the other."""
    for suffix in exporters:
        for name in models:
            for label in specs:
                for precision in DTYPES:
                    if precision == "float32" or label in HALVES:
                        yield name, label, precision, suffix


def _mark(text: str, notes: list[str]) -> str:
    """A finished cell in short; a reason gets a number, the same for the same reason."""
    for begin, short in (("ok, cosine 1.0000", "ok"), ("ok, cosine ", "ok, "), ("ok, ", "")):
        if text.startswith(begin):
            numbers = re.fullmatch(r"(.*); (\d+) integer, (\d+) float products", short + text.removeprefix(begin))
            return f"{numbers[1]}, {numbers[2]}+{numbers[3]}" if numbers else short + text.removeprefix(begin)
    kind, _, reason = text.partition(": ")
    if kind == "refused":  # the layer's name aside
        reason = re.sub(r"^[\w.]+\.[\w.]+(?=:? )", "LAYER", reason)
    if reason not in notes:
        notes.append(reason)
    return f"{'no' if kind == 'refused' else kind} ({notes.index(reason) + 1})"


def tables(found: dict[str, str]) -> list[str]:
    """The finished cells in Markdown: a table a model, and the reasons."""
    lines: list[str] = []
    notes: list[str] = []
    for name in MODELS:
        lines += [f"## {name}", "", "| spec | precision | " + " | ".join(EXPORTERS) + " |", "|---" * 7 + "|"]
        for label in SPECS:
            for precision in DTYPES:
                row = [found.get(" | ".join((name, label, precision, suffix))) for suffix in EXPORTERS]
                if any(row):
                    marks = ["" if text is None else _mark(text, notes) for text in row]
                    lines.append("| " + " | ".join((label, precision, *marks)) + " |")
        lines.append("")
    lines += ["## Reasons", ""]
    return [*lines, *(f"{number}. {reason}" for number, reason in enumerate(notes, 1))]


def main() -> int:
    """Fill the table as it grows; 1 where a cell is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--exporters", default=",".join(EXPORTERS))
    parser.add_argument("--specs", default=";".join(SPECS), help="their names, with a ; between them")
    parser.add_argument("--most", type=float, default=float("inf"), help="begin no cell after so many seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    chosen, start = parser.parse_args(), time.monotonic()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    if chosen.json is not None and chosen.json.is_file():
        found = json.loads(chosen.json.read_text(encoding="utf-8"))["cells"]
    wanted = cells(chosen.models.split(","), chosen.exporters.split(","), chosen.specs.split(";"))
    for name, label, precision, suffix in wanted:
        key = " | ".join((name, label, precision, suffix))
        if key in found or time.monotonic() - start > chosen.most:
            continue
        found[key] = cell(name, SPECS[label], DTYPES[precision], "" if suffix == "folder" else suffix)
        print(f"{key}: {found[key]}", flush=True)
        if chosen.json is not None:
            write_json(chosen.json, {"run": run_metadata(), "cells": dict(sorted(found.items()))})
    every = cells(list(MODELS), list(EXPORTERS), list(SPECS))
    missing = sum(" | ".join(each) not in found for each in every)
    faults = sum(text.startswith(("DIFFERS", "CRASH")) for text in found.values())
    print(f"{len(found)} cells, {missing} missing, {faults} faults")
    if chosen.markdown is not None:
        text = ["# Exports: what is written, what is refused", "", "No data file: the page holds every cell.", ""]
        text += ["Tiny models, every spec, every exporter. Made by", ""]
        text += ["    python benchmarks/exports.py --json build/exports.json --markdown docs/results/exports.md", ""]
        text += ["which goes on where it stopped.", ""]
        each = ", ".join(f"{suffix} {sum(key.endswith(f'| {suffix}') for key in found)}" for suffix in EXPORTERS)
        text += [f"{len(found)} cells were run ({each}), {missing} were not; {faults} faults.", "", *LEGEND, ""]
        text += [*tables(found), ""]
        chosen.markdown.write_text("\n".join(text), encoding="utf-8")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
