"""Vision transformers of timm: ViT, DeiT, SigLIP towers, EVA, Swin; ``timm:NAME`` loads one.

Attention keeps q, k and v in one Linear ``[3 D, D]``. SigLIP towers pool with a learned query (``attn_pool``: ``q``,
``kv``, ``proj`` and its own MLP). The image processor is the model's own data configuration (mean, deviation, size,
crop), as a dictionary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from s2d.errors import InputError, choices, first_line
from s2d.models.differences import apply, changes
from s2d.models.family import Family, register_family, register_loader, register_random
from s2d.models.hub import no_waiting
from s2d.models.saved import register_architecture
from s2d.optional import require

TIMM_ROLES: tuple[tuple[str, str], ...] = (
    (r"patch_embed\.(proj|backbone\.stem\.conv)$", "patch_embed"),
    (r"patch_embed\.norm$", "norm_embed"),
    (r"(^|\.)norm_pre$", "norm_embed"),
    (r"downsample\.reduction$", "patch_merge"),
    (r"attn\.qkv$", "qkv"),
    (r"(attn\.q_proj|attn_pool\.q)$", "q"),
    (r"attn\.k_proj$", "k"),
    (r"attn\.v_proj$", "v"),
    (r"attn_pool\.kv$", "kv"),
    (r"(attn|attn_pool)\.proj$", "proj"),
    (r"blocks\.\d+\.norm1$", "norm1"),
    (r"(blocks\.\d+\.norm2|attn_pool\.norm)$", "norm2"),  # the pool's norm feeds the pool's own MLP
    (r"(attn|attn_pool)\.(q_norm|k_norm|norm)$", "norm_inner"),
    (r"(mlp|downsample)\.norm$", "norm_inner"),
    (r"mlp\.(fc1_g|w1)$", "gate"),
    (r"mlp\.(fc1|fc1_x|w2)$", "fc1"),
    (r"mlp\.act$", "activation"),
    (r"mlp\.(fc2|w3)$", "fc2"),
    (r"(^|\.)(norm|fc_norm)$", "norm_final"),
    (r"(^|\.)(head|head_dist|head\.fc)$", "head"),
)

TIMM_VIT = register_family(
    Family(
        name="timm_vit",
        modality="vision",
        norm_position="pre",
        models=(r"timm\..*\.(VisionTransformer\w*|Eva|SwinTransformer)",),
        roles=TIMM_ROLES,
        block=r"(^|\.)blocks\.\d+$",
    )
)


@register_loader("timm")
def load_timm(name: str, options: dict[str, Any]) -> tuple[nn.Module, None, dict[str, Any]]:
    """A pretrained timm model with its head, and its data configuration."""
    return _create(name, pretrained=True)


@register_random("timm")
def random_timm(name: str) -> tuple[nn.Module, None, dict[str, Any]]:
    """The same with random weights."""
    return _create(name, pretrained=False)


def _create(name: str, pretrained: bool) -> tuple[nn.Module, None, dict[str, Any]]:
    timm = require("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        hint = choices(name.partition(".")[0], timm.list_models(), "timm.list_models() lists what there is")
        raise InputError(f"timm has no model {name!r}; {hint}")
    try:
        with no_waiting():
            model = timm.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError, ValueError) as error:
        kind = "with its weights" if pretrained else "with random weights"
        raise InputError(f"timm cannot make {name!r} {kind}: {first_line(error)}") from error
    return model, None, timm.data.resolve_model_data_config(model)


def _describe(model: nn.Module) -> dict[str, Any]:
    configuration: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    arguments: dict[str, Any] = {"num_classes": getattr(model, "num_classes", 0)}
    found = {"name": configuration["architecture"], "arguments": arguments, "image_size": _image_size(model)}
    with torch.device("meta"):
        built = _rebuild(found)
    return {**found, "changes": changes(model, built)}


def _image_size(model: nn.Module) -> list[int] | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return list(size) if size is not None else None


def _rebuild(description: dict[str, Any]) -> nn.Module:
    timm = require("timm", "timm")
    arguments = dict(description["arguments"])
    if description.get("image_size"):
        arguments["img_size"] = tuple(description["image_size"])
    model = timm.create_model(description["name"], pretrained=False, **arguments)
    return apply(model, description.get("changes") or {})


register_architecture(
    "timm",
    matches=lambda model: type(model).__module__.startswith("timm.") and bool(getattr(model, "pretrained_cfg", None)),
    describe=_describe,
    rebuild=_rebuild,
)
