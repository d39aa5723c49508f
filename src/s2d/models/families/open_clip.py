"""CLIP models of open_clip; ``open_clip:ARCHITECTURE/TAG`` (or ``open_clip:hf-hub:...``) loads one.

Attention is `nn.MultiheadAttention` with a bare ``in_proj_weight``. Image towers may come from timm (SigLIP), so timm's
names are understood too.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from s2d.errors import InputError, choices, first_line
from s2d.models.differences import apply, changes
from s2d.models.families.timm_vit import TIMM_ROLES
from s2d.models.family import Family, register_family, register_loader, register_random
from s2d.models.hub import no_waiting
from s2d.models.quiet import quiet_log
from s2d.models.saved import register_architecture
from s2d.optional import require

OPEN_CLIP = register_family(
    Family(
        name="open_clip",
        modality="multimodal",
        norm_position="pre",
        models=(r"open_clip\..*\.(CLIP|CustomTextCLIP|CoCa|VisionTransformer|TextTransformer)",),
        roles=(
            (r"(^|\.)token_embedding$", "embedding"),
            (r"(^|visual\.)conv1$", "patch_embed"),
            (r"(^|visual\.)ln_pre$", "norm_embed"),
            (r"resblocks\.\d+\.ln_1$", "norm1"),
            (r"(resblocks\.\d+\.attn|attn_pool\.attn)$", "qkv"),
            (r"(resblocks\.\d+\.attn|attn_pool\.attn)\.out_proj$", "proj"),
            (r"resblocks\.\d+\.ln_2$", "norm2"),
            (r"mlp\.c_fc$", "fc1"),
            (r"mlp\.gelu$", "activation"),
            (r"mlp\.c_proj$", "fc2"),
            (r"(^|\.)(ln_post|ln_final)$", "norm_final"),
            (r"(^|\.)text_projection$", "head"),
            (r"visual\.head\.(proj|mlp\.fc[12])$", "head"),
        )
        + TIMM_ROLES,
        block=r"(^|\.)(resblocks|blocks)\.\d+$",
    )
)

_NAME = "_s2d_open_clip_name"  # open_clip models do not store their architecture's name


@register_loader("open_clip")
def load_open_clip(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    """A pretrained open_clip model, its tokenizer, and its evaluation transform."""
    open_clip = require("open_clip", "openclip")
    if name.startswith(("hf-hub:", "local-dir:")):
        return _create(open_clip, name, None)
    architecture, _, tag = name.partition("/")
    _check_name(open_clip, architecture)
    _check_tag(open_clip, architecture, tag)
    return _create(open_clip, architecture, tag)


@register_random("open_clip")
def random_open_clip(name: str) -> tuple[nn.Module, Any, Any]:
    """An architecture of open_clip with random weights."""
    open_clip = require("open_clip", "openclip")
    _check_name(open_clip, name)
    return _create(open_clip, name, None)


def _create(open_clip: Any, architecture: str, tag: str | None) -> tuple[nn.Module, Any, Any]:
    try:
        with no_waiting():
            model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=tag)
            tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"open_clip cannot make {architecture!r}: {first_line(error)}") from error
    setattr(model, _NAME, architecture)
    return model, tokenizer, transform


def _check_name(open_clip: Any, architecture: str) -> None:
    known = open_clip.list_models()
    if architecture not in known:
        hint = choices(architecture, known, "open_clip.list_models() lists what there is")
        raise InputError(f"open_clip has no architecture {architecture!r}; {hint}")


def _check_tag(open_clip: Any, architecture: str, tag: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        listed = ", ".join(tags[:6]) or "none"
        raise InputError(
            f"open_clip:{architecture} needs one of its weights' tags, as in open_clip:ViT-B-32/openai; it has {listed}"
        )


register_architecture(
    "open_clip",
    matches=lambda model: hasattr(model, _NAME),
    describe=lambda model: _describe(model),
    rebuild=lambda description: apply(_rebuild(description["name"]), description.get("changes") or {}),
    tokenizer=lambda model: require("open_clip", "openclip").get_tokenizer(getattr(model, _NAME)),
)


def _describe(model: nn.Module) -> dict[str, Any]:
    name = getattr(model, _NAME)
    with torch.device("meta"):
        return {"name": name, "changes": changes(model, _rebuild(name))}


def _rebuild(name: str) -> nn.Module:
    open_clip = require("open_clip", "openclip")
    with quiet_log("", logging.ERROR):  # it warns that the weights are random: ours come next
        # "meta" where only shapes are asked for
        model = open_clip.create_model(name, pretrained=None, device=torch.get_default_device())
    setattr(model, _NAME, name)
    return model
