"""Every weight of every family's models has a role; blocks and attentions are found."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests import builders
from torch import nn

from s2d.models import ROLES, TextClassifier, families, family_of
from s2d.targets.weights import find_targets

_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_DECODER: dict[str, Any] = {**_SMALL, "num_key_value_heads": 1, "vocab_size": 64, "pad_token_id": 0}
_TOWER: dict[str, Any] = {**_SMALL, "projection_dim": 16}
_IMAGES: dict[str, Any] = {**_TOWER, "image_size": 32, "patch_size": 16}
_TWO_TOWERS: dict[str, Any] = {"text_config": _TOWER, "vision_config": _IMAGES}
_BY_PATCHES: dict[str, Any] = {"text_config": _TOWER, "vision_config": {**_TOWER, "num_patches": 16, "patch_size": 16}}

# class, configuration class, configuration, family, blocks, attentions
TRANSFORMERS = [
    ("BertModel", "BertConfig", _SMALL, "bert", 2, 2),
    ("BertForSequenceClassification", "BertConfig", _SMALL, "bert", 2, 2),
    ("BertForMaskedLM", "BertConfig", _SMALL, "bert", 2, 2),
    ("RobertaForSequenceClassification", "RobertaConfig", _SMALL, "bert", 2, 2),
    ("XLMRobertaModel", "XLMRobertaConfig", _SMALL, "bert", 2, 2),
    ("MPNetModel", "MPNetConfig", _SMALL, "bert", 2, 2),
    ("ElectraForSequenceClassification", "ElectraConfig", _SMALL, "bert", 2, 2),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
        "bert",
        2,
        2,
    ),
    ("LlamaForCausalLM", "LlamaConfig", _DECODER, "llama", 2, 2),
    ("MistralForCausalLM", "MistralConfig", _DECODER, "llama", 2, 2),
    ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, "llama", 2, 2),
    ("Qwen3ForCausalLM", "Qwen3Config", _DECODER, "llama", 2, 2),
    ("SmolLM3ForCausalLM", "SmolLM3Config", _DECODER, "llama", 2, 2),
    ("Phi3ForCausalLM", "Phi3Config", _DECODER, "llama", 2, 2),
    ("ViTModel", "ViTConfig", _SMALL, "vit", 2, 2),
    ("ViTForImageClassification", "ViTConfig", _SMALL, "vit", 2, 2),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", _SMALL, "vit", 2, 2),
    ("Dinov2ForImageClassification", "Dinov2Config", _SMALL, "vit", 2, 2),
    ("Dinov2Model", "Dinov2Config", {**_SMALL, "use_swiglu_ffn": True}, "vit", 2, 2),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _SMALL, "vit", 2, 2),
    ("DINOv3ViTModel", "DINOv3ViTConfig", _SMALL, "vit", 2, 2),
    ("YolosForObjectDetection", "YolosConfig", {**_SMALL, "image_size": [32, 32]}, "vit", 2, 2),
    ("CLIPModel", "CLIPConfig", _TWO_TOWERS, "clip", 4, 4),
    ("CLIPVisionModel", "CLIPVisionConfig", _IMAGES, "clip", 2, 2),
    ("SiglipModel", "SiglipConfig", _TWO_TOWERS, "siglip", 4, 5),
    ("SiglipForImageClassification", "SiglipConfig", _TWO_TOWERS, "siglip", 2, 3),
    ("Siglip2Model", "Siglip2Config", _BY_PATCHES, "siglip", 4, 5),
]

TIMM = [
    ("vit_tiny_patch16_224", {"depth": 1}, 1, 1),
    ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}, 1, 2),
    ("vit_base_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 24, "num_heads": 2}, 1, 1),
    ("deit_tiny_distilled_patch16_224", {"depth": 1}, 1, 1),
    ("eva02_base_patch14_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}, 1, 1),
    (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 1, 1)},
        4,
        4,
    ),
]


def check(model: nn.Module, family: str, blocks: int, attentions: int) -> Counter[str]:
    """Roles of all weights, after checking that none is missing and that the structure is found."""
    found = family_of(model)
    assert found.name == family and found.matches(model)
    assert len(found.blocks(model)) == blocks and len(found.attentions(model)) == attentions
    targets = find_targets(model, kinds=("linear", "conv", "embedding", "norm"))
    roles = {target.module_name: found.role(target.module_name) for target in targets}
    assert not [name for name, role in roles.items() if role is None]
    counts = Counter(role for role in roles.values() if role is not None)
    assert set(counts) <= set(ROLES)
    if counts["qkv"] == 0:
        assert counts["q"] == counts["k"] == counts["v"]
    assert counts["fc1"] == counts["fc2"]
    return counts


@pytest.mark.parametrize(
    ("model_class", "config_class", "config", "family", "blocks", "attentions"),
    TRANSFORMERS,
    ids=[f"{row[0]}-{row[3]}" for row in TRANSFORMERS],
)
def test_every_weight_of_transformers_models_has_a_role(
    model_class: str, config_class: str, config: dict[str, Any], family: str, blocks: int, attentions: int
) -> None:
    counts = check(builders.transformers_model(model_class, config_class, config), family, blocks, attentions)
    assert counts["q"] + counts["qkv"] == attentions
    assert counts["proj"] == attentions and counts["fc2"] >= blocks


@pytest.mark.parametrize(("name", "options", "blocks", "attentions"), TIMM, ids=[row[0] for row in TIMM])
def test_every_weight_of_timm_models_has_a_role(
    name: str, options: dict[str, Any], blocks: int, attentions: int
) -> None:
    check(builders.timm_model(name, options), "timm_vit", blocks, attentions)


def test_every_weight_of_open_clip_models_has_a_role() -> None:
    assert check(builders.open_clip_model(), "open_clip", 4, 4)["qkv"] == 4


def test_a_model_on_top_of_a_known_one_is_of_its_family() -> None:
    transformers = pytest.importorskip("transformers")
    classifier = TextClassifier(transformers.BertModel(transformers.BertConfig(**_SMALL)), ["a", "b"])
    family = family_of(classifier)
    assert family.name == "bert" and family.role("head") == "head"
    assert family.role("encoder.encoder.layer.0.output.dense") == "fc2"
    assert family.role("encoder.encoder.layer.0.attention.output.dense") == "proj"


def test_unknown_models_are_generic_and_keep_unknown_parts_without_a_role() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    family = family_of(model)
    assert family.name == "generic"
    roles = [family.role(target.module_name) for target in find_targets(model)]
    assert roles == ["qkv", "qkv", "qkv", "proj", "fc1", "fc2"] * 2
    assert family.role("some.odd_layer") is None


def test_roles_do_not_depend_on_compilation() -> None:
    assert families()["bert"].role("_orig_mod.encoder.layer.0.intermediate.dense") == "fc1"


def test_families_differ_in_what_they_state() -> None:
    known = families()
    assert {"bert", "llama", "vit", "clip", "siglip", "timm_vit", "open_clip", "generic"} <= set(known)
    assert [name for name, family in known.items() if family.norm_position == "post"] == ["bert"]
