"""Layer formats: checkpoints written layer by layer, read back by their own library, and compared.

Nothing is traced: the library builds its own model from the codes and scales in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export import compressed_tensors, float_layers, gate, gguf
from s2d.export.copies import shared_copy
from s2d.export.gate import Check, ExportReport
from s2d.export.parity import compare_modules
from s2d.io.files import in_place_of
from s2d.optional import require


class Format(Protocol):
    """The interface of a module that writes a checkpoint format."""

    NAME: str

    def check(self, model: nn.Module, embeddings: int) -> int:
        """Refuse a model that the format cannot hold; return the bits of the embedding tables, 0 to keep them."""
        ...

    def write(self, model: nn.Module, path: Path, /, *, embeddings: int, tokenizer: Any) -> None:
        """Write the file, or the folder."""

    def read(self, path: Path, /, like: nn.Module) -> nn.Module:
        """Read it with the library of the format."""
        ...


_BLOCKS = (
    "blocks: layers are compared with weights in bfloat16 and block scales of inputs by the reader's rule, as "
    "compressed-tensors computes them; kernels of servers have rules of their own"
)
FOLDER = ""  # the suffix of a folder's name
FORMATS: dict[str, Any] = {FOLDER: compressed_tensors, ".gguf": gguf}


def export_checkpoint(
    model: nn.Module,
    target: Path,
    report: ExportReport,
    example: Mapping[str, Tensor],
    tokenizer: Any,
    check: Check,
) -> None:
    """Write a model, read it back, compare it, and move it to the target.

    Args:
        model: Quantized; a transformers model, or one of s2d's on top of one, which is what the file will hold.
        target: A file, or a folder that does not exist or is empty.
        report: Filled in.
        example: A batch of keyword inputs.
        tokenizer: For formats that hold it.
        check: The comparisons and their consequences.

    Raises:
        InputError: The format cannot hold the model; the comparison failed.
    """
    format: Format = FORMATS[target.suffix]
    name, inner = transformers_part(model, format.NAME)
    report.embeddings = format.check(inner, report.embeddings)
    reference = shared_copy(model)
    written = shared_copy(model)
    shared = float_layers.share_scales(written, example)
    inner = written.get_submodule(name)
    as_read = shared_copy(written)
    compared = as_read.get_submodule(name)
    report.about = ["in memory and the multiply: up to what loads it; the file holds codes, not kernels"]
    if format is gguf:
        gguf.as_written(compared)
    elif float_layers.as_read(compared):
        report.about.append(_BLOCKS)
        if check.task is None:  # a metric is compared with the simulation; whole outputs are chaotic at 4 bits
            reference = as_read
    if shared:
        report.about.append(
            f"scales: {shared} layers take the tensor scale of others that read the same input, as servers need it"
        )
    with in_place_of(target) as made:
        check.notes("writing")
        format.write(inner, made, embeddings=report.embeddings, tokenizer=tokenizer)
        files = [made] if made.is_file() else [each for each in made.rglob("*") if each.is_file()]
        report.file_mb = sum(each.stat().st_size for each in files) / 1e6
        report.fp32_mb = sum(each.numel() for each in inner.parameters()) * 4 / 1e6
        check.notes("reading it back")
        found = format.read(made, inner)
        runner = found
        if name:
            runner = shared_copy(model)
            runner.set_submodule(name, found)
        with torch.no_grad():
            runner(**example)  # its first call unpacks weights; layers are compared after that
        check.notes("comparing every layer")
        gate.judge_layers(report, *compare_modules(compared, found, written, name and f"{name}.", example))
        gate.judge(report, reference, runner, example, check)
        report.refuse(target, check.force)


def transformers_part(model: nn.Module, format: str) -> tuple[str, nn.Module]:
    """The transformers model in a model, and its name there; the model itself has none.

    Raises:
        InputError: There is none.
    """
    PretrainedConfig = require("transformers", "hf").PretrainedConfig
    for name, module in model.named_modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig) and hasattr(module, "save_pretrained"):
            return name, module
    raise InputError(f"{format} holds transformers models; {type(model).__name__} is none: choose NAME.onnx")
