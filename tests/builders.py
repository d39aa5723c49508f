"""Random models of the libraries that models come from; without the library, or the model in it, a test is skipped."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from s2d.errors import MissingExtra
from s2d.optional import require


def library(module: str, extra: str) -> Any:
    try:
        return require(module, extra)
    except MissingExtra as missing:
        pytest.skip(str(missing))


def transformers_model(model_class: str, config_class: str, config: dict[str, Any]) -> nn.Module:
    transformers = library("transformers", "hf")
    if not hasattr(transformers, model_class):
        pytest.skip(f"this transformers has no {model_class}")
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**config))


def timm_model(name: str, options: dict[str, Any]) -> nn.Module:
    timm = library("timm", "timm")
    return timm.create_model(name, pretrained=False, **options)


def open_clip_model() -> nn.Module:
    open_clip = library("open_clip", "openclip")
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
        text_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
    )
