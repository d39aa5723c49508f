"""Checkpoints on disk: plain tensors in safetensors and a versioned JSON file that says how to build the model.

A folder holds ``model.safetensors``, ``s2d_config.json`` and, when given, the tokenizer's files. A plain transformers
model also gets its ``config.json``, so transformers reads the same folder. Nothing on disk names code to run: the
configuration holds a registered architecture's name and plain data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file
from safetensors.torch import save_model as save_safetensors
from torch import Tensor, nn

from s2d.errors import InputError, first_line
from s2d.io.files import JSON, in_place_of, read_json
from s2d.models.differences import match_types, put_buffers, tie, ties, unsaved_buffers
from s2d.models.preprocessing import preprocessing_of
from s2d.registry import Registry
from s2d.targets.weights import clean_name

CONFIG_NAME = "s2d_config.json"
WEIGHTS_NAME = "model.safetensors"
BUFFERS_NAME = "buffers.safetensors"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TYPE, _VERSION = "s2d_model", 1


@dataclass(frozen=True)
class Architecture:
    """How one kind of model is described as plain data and built again from it (without its weights).

    Where a tokenizer cannot be saved because it belongs to the architecture, `tokenizer` makes it.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    describe: Callable[[Any], JSON]
    rebuild: Callable[[JSON], nn.Module]
    tokenizer: Callable[[Any], Any] | None = None


_ARCHITECTURES: Registry[Architecture] = Registry("architecture", "s2d.models")


def register_architecture(
    name: str,
    *,
    matches: Callable[[nn.Module], bool],
    describe: Callable[[Any], JSON],
    rebuild: Callable[[JSON], nn.Module],
    tokenizer: Callable[[Any], Any] | None = None,
) -> None:
    """Let `save_model` and `load_saved` handle a kind of model."""
    _ARCHITECTURES.add(name, Architecture(name, matches, describe, rebuild, tokenizer))


def own_tokenizer(model: nn.Module) -> Any:
    """The tokenizer that belongs to the architecture of a model, or of a part of it; mostly there is none."""
    for part in model.modules():
        for each in _ARCHITECTURES.all().values():
            if each.tokenizer is not None and each.matches(part):
                return each.tokenizer(part)
    return None


def describe(model: nn.Module) -> JSON:
    """A model's architecture as JSON data.

    Raises:
        InputError: No registered architecture knows how to build such a model again.
    """
    known = _ARCHITECTURES.all()
    for architecture in known.values():
        if architecture.matches(model):
            return {"architecture": architecture.name, **architecture.describe(model)}
    raise InputError(
        f"cannot save a {type(model).__name__}: its architecture is not known ({', '.join(known)}); "
        "register it with s2d.models.register_architecture, or save its state_dict yourself"
    )


def rebuild(description: JSON) -> nn.Module:
    """The inverse of `describe`; the weights are whatever the constructor leaves."""
    known, name = _ARCHITECTURES.all(), description.get("architecture")
    if name not in known:
        raise InputError(f"unknown architecture {name!r} in {CONFIG_NAME}; this s2d knows {', '.join(known)}")
    return known[name].rebuild(description)


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    processor: Any = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model to a folder, atomically.

    Everything is written next to the destination first and moved into place at the end; an existing s2d checkpoint is
    replaced, anything else in the way is left alone and refused.

    Args:
        model: A transformers, timm or open_clip model, or one of s2d's models on top of such an encoder.
        path: The folder to make.
        tokenizer: Saved along, if it can be.
        processor: Saved along, if it can be.
        notes: JSON data to keep with the checkpoint (settings, metrics); `read_notes` gives it back.

    Returns:
        The folder.

    Raises:
        InputError: The model cannot be built again from a description, the destination is in the way, or the disk
            refuses (full, read-only).
    """
    model = getattr(model, "_orig_mod", model)
    destination = Path(path)
    if destination.is_file() or (
        destination.is_dir() and any(destination.iterdir()) and not (destination / CONFIG_NAME).is_file()
    ):
        raise InputError(f"{destination} exists and is not an s2d checkpoint; choose another folder or remove it")
    description = describe(model)
    _refuse_foreign_state(model, description)
    shared = ties(model)
    config = {"_type": _TYPE, "_version": _VERSION, "model": description, "ties": shared, "notes": dict(notes or {})}
    with in_place_of(destination) as folder:
        folder.mkdir()
        save_safetensors(model, str(folder / WEIGHTS_NAME), metadata={"format": "pt"})
        save_buffers(model, folder)
        if description["architecture"] == "transformers":
            model.config.save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
        save_parts(folder, tokenizer, processor)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return destination


def save_parts(folder: Path, *parts: Any) -> None:
    """Save tokenizers and processors into a folder; those that are None, or cannot be saved, are left out.

    The image processors of timm and open_clip are saved as transformers' own, which `load` reads.
    """
    for part in parts:
        if isinstance(part, dict) or hasattr(part, "transforms"):
            part = preprocessing_of(part, "the model")
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)


def _refuse_foreign_state(model: nn.Module, description: JSON) -> None:
    """Check that the description builds exactly the model's tensors; otherwise the file could not be loaded again."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in rebuild(description).state_dict().items()}
    actual = {name: tensor.shape for name, tensor in model.state_dict().items()}
    odd = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    if odd:
        raise InputError(
            f"cannot save this {type(model).__name__} as a plain checkpoint: {len(odd)} tensors do not belong to its "
            f"architecture, e.g. {odd[0]}; take out what was put in (quantizers, adapters) first"
        )


def save_buffers(model: nn.Module, folder: Path) -> None:
    """Write the buffers that a state dict leaves out, if there are any."""
    if buffers := unsaved_buffers(model):
        save_file(buffers, folder / BUFFERS_NAME)


def load_buffers(model: nn.Module, folder: Path) -> None:
    """Read what `save_buffers` wrote."""
    if (path := folder / BUFFERS_NAME).is_file():
        check_safetensors(path)
        put_buffers(model, load_file(path))


def load_saved(folder: Path) -> nn.Module:
    """Build and fill the model of a folder that `save_model` wrote; the types of the weights are those of the file.

    Raises:
        InputError: The folder's files are damaged, of a newer version, or do not fit each other.
    """
    config = _read_config(folder)
    description = config["model"]
    weights = folder / WEIGHTS_NAME
    check_safetensors(weights)
    _check_sizes(description, weights, folder / CONFIG_NAME)
    try:
        model = rebuild(description)
    except InputError:
        raise
    except Exception as error:  # a library's constructor may raise any exception
        raise InputError(f"{folder / CONFIG_NAME} does not describe a model: {first_line(error)}") from error
    try:
        if "ties" in config:
            tie(model, config["ties"])
        match_types(model, types_of(weights))
        load_model(model, weights)
        load_buffers(model, folder)
    except RuntimeError as error:
        raise InputError(f"{weights} does not fit {folder / CONFIG_NAME}: {first_line(error)}") from error
    return model.eval()


def types_of(path: Path) -> dict[str, torch.dtype]:
    """The type of every floating-point tensor of a safetensors file, by its header."""
    with safe_open(path, framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 -- not a dictionary
    return {name: _FLOATS[kind] for name, kind in kinds.items() if kind in _FLOATS}


def _check_sizes(description: JSON, weights: Path, shown: Path) -> None:
    """Refuse a description of a model far larger than its weights, before all memory is asked for to build it."""
    with safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 -- not a dictionary
    most = {"layers|depth": max(64, len(shapes)), "size|vocab|width|dim": max(65536, sum(map(math.prod, shapes)))}
    pending: list[Any] = [description]
    while pending:
        value = pending.pop()
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (dict, list)):
                pending.append(item)
            for words, limit in most.items():
                if isinstance(item, int) and item > limit and re.search(words, str(key)):
                    raise InputError(
                        f"{shown}: {key} is {item}, more than the weights beside it can have; copy both again"
                    )


def read_notes(folder: str | os.PathLike[str]) -> JSON:
    """The notes that were saved with a checkpoint."""
    return _read_config(Path(folder))["notes"]


def _read_config(folder: Path) -> JSON:
    config = read_json(folder / CONFIG_NAME)
    if config.get("_type") != _TYPE or not isinstance(config.get("model"), dict):
        raise InputError(f"{folder / CONFIG_NAME} is not an s2d model's configuration")
    if config.get("_version", 0) > _VERSION:
        raise InputError(f"{folder} was written by a newer s2d (format {config['_version']}); upgrade s2d to read it")
    return config


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file that is damaged or quantized, by its header and length; the tensors are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118 -- not a dictionary
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            odd = [name for name, kind in kinds.items() if kind == "BOOL" or kind.startswith(("I", "U"))]
            if odd:
                raise InputError(
                    f"{path}: {odd[0]} is of type {kinds[odd[0]]}, no floating-point number; the checkpoint is "
                    "quantized or damaged, get the original"
                )
            return
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except (OSError, SafetensorError) as error:
        with open(path, "rb") as file:
            start = file.read(40)
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{path} is a git-lfs pointer, not the weights; run: git lfs pull") from error
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size} bytes) is truncated or damaged: {first_line(error)}; download or copy it again"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors or PyTorch file; a pickle may hold tensors only and never runs code.

    Raises:
        InputError: The file is damaged, would run code, or does not hold named tensors.
    """
    if path.suffix == ".safetensors":
        check_safetensors(path)
        return load_file(path)
    try:
        refuse_compressed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(explain_unpickling(path, error)) from error
    except Exception as error:  # unpickling untrusted bytes may raise any exception
        raise InputError(f"{path} is damaged or not a PyTorch file: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} does not hold a dictionary of named tensors (a state_dict)")
    return {clean_name(str(name)): value for name, value in content.items()}


def refuse_compressed(path: Path) -> None:
    """Refuse a compressed archive: PyTorch stores tensors uncompressed, and an archive may unpack to any size.

    Raises:
        InputError: It is such an archive.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(f"{path} is a compressed archive, which PyTorch does not write; it was not read")


def explain_unpickling(path: Path | str, error: pickle.UnpicklingError) -> str:
    """The line about a pickle that torch would not read: it holds more than tensors, or it is no pickle."""
    if re.search(r"unsupported (global|class)", str(error), flags=re.IGNORECASE):
        return (
            f"{path} is a pickle that would run code when read, and was not read; "
            "get a .safetensors version, or convert it where you trust it"
        )
    return f"{path} is damaged or not a PyTorch file; download or copy it again"


def refuse_foreign_code(config: Any, shown: str) -> None:
    """Refuse a transformers configuration that names attention code on the hub, which would be fetched and run.

    Raises:
        InputError: This one does.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        for key in ("_attn_implementation", "_experts_implementation"):
            named = getattr(part, key, None)
            texts = named.values() if isinstance(named, dict) else [named]
            if any(isinstance(text, str) and ("/" in text or ":" in text) for text in texts):
                raise InputError(
                    f"{shown} names code on the hub ({key.strip('_')}: {named!r}), which is not run; remove that"
                )


def check_finite(model: nn.Module, source: str) -> None:
    """Refuse weights with NaN or Inf, naming the first one.

    Raises:
        InputError: A floating-point parameter, or a buffer that checkpoints hold, has NaN or Inf.
    """
    for name, tensor in model.state_dict().items():  # buffers that no checkpoint holds may be masks of -Inf
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"{source}: weight {name} holds {bad} NaN or Inf values; the checkpoint is damaged")


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a SHA-256 over names, types, shapes and bytes of the state, whatever the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
