"""Trained models that come with s2d: ``trained:NAME``. They are small and have outliers that hurt 4-bit quantization.

Each is a folder beside this file, saved by s2d with half-precision weights; its README.md says how it was trained.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from torch import nn

from s2d.errors import InputError, choices
from s2d.models import huggingface
from s2d.models.family import register_loader
from s2d.models.saved import load_saved


def trained_models() -> list[str]:
    """Names of the models that come with s2d."""
    return sorted(folder.name for folder in _shelf().iterdir() if folder.is_dir() and not folder.name.startswith("_"))


@register_loader("trained")
def load_trained(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    """A model, and its tokenizer and preprocessing where it has them."""
    known = trained_models()
    if name not in known:
        raise InputError(f"trained:{name} does not come with s2d; {choices(name, known)}")
    model = load_saved(_shelf() / name)
    return model, *huggingface.load_parts(_shelf() / name, model)


def _shelf() -> Path:
    return Path(str(importlib.resources.files("s2d"))) / "models" / "trained"
