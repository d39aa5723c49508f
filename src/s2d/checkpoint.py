"""`s2d.save` and `s2d.load` for every model: plain, conditioned or quantized.

A plain model is written by `s2d.models`. A quantized one is a folder with the codes and scales that `s2d.quant` writes,
the description of its architecture, and its tokenizer; it loads again, bit-identical, without the original.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from s2d import models, quant
from s2d.errors import InputError
from s2d.io.files import in_place_of, json_text, parse_json, read_json
from s2d.models import Loaded, describe, family_of, fingerprint, rebuild, save_model
from s2d.models.differences import match_types, tie, ties
from s2d.models.huggingface import load_parts
from s2d.models.running import outside_inference_mode
from s2d.models.saved import load_buffers, save_buffers, save_parts
from s2d.quant.modules.storage import CONFIG, saved_types, write_into

ARCHITECTURE = "s2d_architecture.json"
_TYPE, _VERSION = "s2d_quantized_model", 1


def refuse_in_the_way(folder: Path) -> None:
    """Refuse a place for a quantized model that something else has taken.

    Raises:
        InputError: A file, or a folder with something in it that is no quantized model of s2d.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_quantized_folder(folder)):
        raise InputError(f"{folder} exists and is not a quantized model of s2d; choose another folder or remove it")


def save(
    model: nn.Module | Loaded,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    processor: Any = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model to a folder, atomically; `load` reads it.

    Args:
        model: Plain or quantized, or what `load` gave (its tokenizer and processor are then kept).
        path: The folder. A checkpoint of s2d in its place is replaced, anything else is refused.
        tokenizer: Saved along, if it can be.
        processor: Saved along, if it can be.
        notes: JSON data to keep with it.

    Returns:
        The folder.

    Raises:
        InputError: The model cannot be described, something is in the way, or the disk refuses.
    """
    if isinstance(model, Loaded):
        tokenizer, processor, model = tokenizer or model.tokenizer, processor or model.processor, model.model
    if not quant.is_quantized(model):
        return save_model(model, path, tokenizer=tokenizer, processor=processor, notes=notes)
    folder = Path(path)
    refuse_in_the_way(folder)
    content = {"_type": _TYPE, "_version": _VERSION, "model": describe(model), "ties": ties(model)}
    content["notes"] = parse_json(json_text(dict(notes or {})))
    with in_place_of(folder) as new:
        new.mkdir()
        write_into(model, new)
        # A configuration may hold infinities (Mamba 2), which results files write as null.
        (new / ARCHITECTURE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_buffers(model, new)
        save_parts(new, tokenizer, processor)
    return folder


@outside_inference_mode()
def load(source: str | os.PathLike[str], *, device: str = "cpu", **options: Any) -> Loaded:
    """Load a model: pretrained, conditioned or quantized.

    Args:
        source: A folder that `save` wrote, or anything that `s2d.models.load` reads: a local folder or file, an
            installed package that carries a model, ``timm:NAME``, ``open_clip:NAME``, a name on the hub.
        device: Where the model goes.
        options: Further ones of `s2d.models.load`.

    Raises:
        InputError: Whatever stands in the way, as one line that names the source and the remedy.
    """
    folder = Path(source).expanduser()
    if not is_quantized_folder(folder):
        return models.load(source, device=device, **options)
    if not (folder / ARCHITECTURE).is_file():
        raise InputError(f"{folder} holds quantized weights but no {ARCHITECTURE}; save the model with s2d.save")
    content = read_json(folder / ARCHITECTURE)
    if content.get("_type") != _TYPE or not isinstance(content.get("model"), dict):
        raise InputError(f"{folder / ARCHITECTURE} does not describe a model; save the model again")
    if content.get("_version", 0) > _VERSION:
        raise InputError(f"{folder} was written by a newer s2d; upgrade s2d to read it")
    model = rebuild(content["model"])
    if "ties" in content:
        tie(model, content["ties"])
    match_types(model, saved_types(folder))
    model = quant.load(folder, model, inplace=True)
    load_buffers(model, folder)
    model = model.eval().to(device)
    notes = content.get("notes") or {}
    return Loaded(model, family_of(model), os.fspath(source), *load_parts(folder, model), fingerprint(model), notes)


def is_quantized_folder(folder: Path) -> bool:
    """Whether a folder holds a quantized model."""
    return (folder / CONFIG).is_file()
