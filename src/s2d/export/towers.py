"""CLIP and SigLIP as two files: one embeds images, the other embeds texts.

An application embeds its texts once and its images all the time, so each tower has its own file. The outputs are unit
vectors. A score is their product times the scale plus the bias; the JSON beside the files holds both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export import export, gate, open_exported
from s2d.export.copies import in_float32, shared_copy
from s2d.export.gate import Check, ExportReport
from s2d.export.lowering import round_embeddings
from s2d.export.operators import Form
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.models.dual_encoder import DualEncoder
from s2d.quant.modules.record import check_unchanged, holder, note, peek
from s2d.tasks import Split, Task

TOWERS = ("image", "text")


class Tower(nn.Module):
    """One tower of a `DualEncoder`, without the modules of the other."""

    def __init__(self, model: DualEncoder, kind: str, example: Mapping[str, Tensor]) -> None:
        """Copy the model and remove the modules that the tower's forward does not use."""
        super().__init__()
        self.kind = kind
        self.model = shared_copy(model)
        entered: set[str] = set()
        names = {module: name for name, module in self.model.named_modules()}
        handles = [
            module.register_forward_pre_hook(lambda module, _: entered.add(names[module]))
            for module in names
            if names[module]
        ]
        with torch.no_grad():
            self(**example)
        for handle in handles:
            handle.remove()
        self._drop(self.model, "", entered)
        part = holder(self.model)
        if (kept := peek(part)) is not None:
            note(part, kept)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Unit vectors ``[batch, width]``."""
        return getattr(self.model, self.kind)(**inputs)

    def _drop(self, module: nn.Module, prefix: str, entered: set[str]) -> None:
        for name, child in list(module.named_children()):
            place = f"{prefix}{name}"
            if not any(each == place or each.startswith(f"{place}.") for each in entered):
                setattr(module, name, nn.Identity())
            else:
                self._drop(child, f"{place}.", entered)


class ExportedTowers(DualEncoder):
    """The two files with the interface of a `DualEncoder`, without scores: those need scale and bias.

    Args:
        image: The file of the image tower, opened.
        text: That of the text tower.
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        nn.Module.__init__(self)  # there is no encoder to look into
        self.encoder = nn.ModuleDict({"image": image, "text": text})

    def image(self, pixel_values: Tensor) -> Tensor:
        """``[images, 3, height, width]`` to unit vectors ``[images, width]``."""
        return _only(self.encoder["image"](pixel_values=pixel_values))

    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[texts, tokens]`` to unit vectors ``[texts, width]``."""
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        return _only(self.encoder["text"](input_ids=input_ids, **masked))


def paths_of(path: str | os.PathLike[str]) -> dict[str, Path]:
    """``NAME.onnx`` to ``NAME.image.onnx`` and ``NAME.text.onnx``."""
    target = Path(path)
    return {kind: target.with_name(f"{target.stem}.{kind}{target.suffix}") for kind in TOWERS}


def export_towers(
    model: DualEncoder,
    path: str | os.PathLike[str],
    *,
    example: Mapping[str, Tensor],
    embeddings: int | None = None,
    form: Form = "qdq",
    shape: Mapping[str, int] | None = None,
    task: Task | None = None,
    split: Split = "validation",
    batch_size: int = 16,
    time_it: bool = True,
    force: bool = False,
    provider: str | None = None,
    fallback: bool = True,
    notes: Callable[[str], None] = lambda text: None,
) -> dict[str, ExportReport]:
    """Write a quantized CLIP or SigLIP as two files, each checked as `s2d.export` checks one.

    Args:
        model: Quantized, as a task of images and texts builds it.
        path: ``NAME.onnx`` or ``NAME.xml``; the files are ``NAME.image.onnx`` and ``NAME.text.onnx``, and ``NAME.json``
            holds both reports, scale and bias.
        example: A batch: ``pixel_values`` of two or more images, and the keywords of two or more texts.
        embeddings: Bits of embedding tables, as for `s2d.export`.
        form: As for `s2d.export`.
        shape: As for `s2d.export`; the image tower takes its batch alone.
        task: Zero-shot or retrieval: its metric is compared too, with both files together.
        split: Data of the comparison.
        batch_size: Examples at once.
        time_it: Measure latency against fp32.
        force: Keep files that do not compute the same.
        provider: As for `s2d.export`.
        fallback: As for `s2d.export`.
        notes: Receives progress messages.

    Returns:
        ``"image"`` and ``"text"``; the task's comparison is in both reports.

    Raises:
        InputError: As `s2d.export`; no file is left.
    """
    texts = {name: value for name, value in example.items() if name != "pixel_values"}
    if "pixel_values" not in example or not texts:
        raise InputError("two towers need an example of images and texts: pixel_values and input_ids")
    check_unchanged(model)
    made, example = in_float32(model, example, notes)
    assert isinstance(made, DualEncoder)
    model, texts = made, {name: value for name, value in example.items() if name != "pixel_values"}
    targets, inputs = paths_of(path), {"image": {"pixel_values": example["pixel_values"]}, "text": texts}
    reports: dict[str, ExportReport] = {}
    check = Check(task, split, batch_size, time_it, force=force, notes=notes)
    try:
        for kind in TOWERS:
            tower = Tower(model, kind, inputs[kind])
            reports[kind] = export(
                tower,
                targets[kind],
                example=inputs[kind],
                embeddings=embeddings,
                form=form,
                shape={k: v for k, v in (shape or {}).items() if kind == "text" or k == "batch"},
                provider=provider,
                fallback=fallback,
                time_it=time_it,
                force=force,
                notes=lambda text, kind=kind: notes(f"{kind}: {text}"),
            )
        if task is not None:
            reference = shared_copy(model)
            if reports["text"].embeddings:  # the image tower has no tables
                round_embeddings(reference, reports["text"].embeddings)
            opened = ExportedTowers(*(open_exported(targets[kind]) for kind in TOWERS))
            gate.judge_task(reports["image"], reference, opened, task, check)
            reports["text"].parity = reports["image"].parity
            if reports["image"].failures and not force:
                raise InputError(f"{path} was not written: {'; '.join(reports['image'].failures)}; --force keeps it")
    except BaseException:
        for each in targets.values():
            for left in (
                each,
                each.with_suffix(".json"),
                each.with_suffix(".bin"),
                each.with_name(f"{each.name}.data"),
            ):
                left.unlink(missing_ok=True)
        raise
    encoder: Any = model.encoder
    score = {
        "scale": float(encoder.logit_scale.detach().exp()),
        "bias": float(encoder.logit_bias.detach()) if model.sigmoid else 0.0,
    }
    content = {kind: report.to_dict() for kind, report in reports.items()}
    write_json(Path(path).with_suffix(".json"), {"run": run_metadata(), "export": content, "score": score})
    for each in targets.values():
        each.with_suffix(".json").unlink(missing_ok=True)
    return reports


def _only(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else next(iter(found.values()))
