"""Tiny random models of every family, as transformers, timm and open_clip build them, with lively norms and biases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tests import builders
from tests.quant.tiny_models import Case, PlainTransformer
from torch import Tensor, nn

from s2d.models.tracing import trace
from s2d.quant.calibration.observe import Batches, Job
from s2d.quant.modules.sites import insert, plan
from s2d.quant.spec import QuantSpec

SIZE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER: dict[str, Any] = {**SIZE, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
IMAGES: dict[str, Any] = {**SIZE, "image_size": 16, "patch_size": 4}
TOWERS: dict[str, Any] = {"text_config": {**SIZE, "vocab_size": 64, "eos_token_id": 2}, "vision_config": IMAGES}


def liven(model: nn.Module) -> nn.Module:
    """Norms, biases and LayerScales as training leaves them, in place of ones and zeros; weights that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.7 + 0.2 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * 1.2)
            elif parameter.ndim > 2:
                parameter.copy_(0.4 * noise)
    return model.eval()


class Family(Case):
    """A model whose whole output is one vector."""

    def output(self, model: nn.Module | None = None, batch: dict[str, Any] | None = None) -> Tensor:
        with torch.no_grad():
            result = (self.model if model is None else model)(**(self.batches[0] if batch is None else batch))
        return torch.cat([tensor.flatten() for tensor in tensors(result)])


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (tuple, list)) else []


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16)}


def ids(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 64, (3, 9)), **more}


def transformers_model(model: str, config: str, options: dict[str, Any], batch: Callable[[], dict[str, Any]]) -> Family:
    return Family(liven(builders.transformers_model(model, config, options)), [batch() for _ in range(3)])


def timm_model(name: str, options: dict[str, Any], key: str = "x", size: int = 32) -> Family:
    model = builders.timm_model(name, {"num_classes": 5, **options})
    return Family(liven(model), [{key: torch.randn(2, 3, size, size)} for _ in range(3)])


def open_clip_model() -> Family:
    batches = [{"image": torch.randn(2, 3, 32, 32), "text": torch.randint(64, (2, 8))} for _ in range(3)]
    return Family(liven(builders.open_clip_model()), batches)


def encoder_layers(norm_first: bool) -> Family:
    layer = nn.TransformerEncoderLayer(48, 4, dim_feedforward=80, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    return Family(liven(model), [{"src": torch.randn(3, 7, 48)} for _ in range(3)])


def _bert() -> dict[str, Any]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = 0
    return ids(attention_mask=mask)


def _both() -> dict[str, Any]:
    return {**ids(), **pixels()}


VIT_S = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}

PRE_NORM: dict[str, Callable[[], Family]] = {
    "vit": lambda: transformers_model("ViTModel", "ViTConfig", IMAGES, pixels),
    "vit-classifier": lambda: transformers_model("ViTForImageClassification", "ViTConfig", IMAGES, pixels),
    "vit-no-bias": lambda: transformers_model("ViTModel", "ViTConfig", {**IMAGES, "qkv_bias": False}, pixels),
    "deit": lambda: transformers_model("DeiTModel", "DeiTConfig", IMAGES, pixels),
    "dinov2": lambda: transformers_model("Dinov2Model", "Dinov2Config", IMAGES, pixels),
    "dinov2-swiglu": lambda: transformers_model(
        "Dinov2Model", "Dinov2Config", {**IMAGES, "use_swiglu_ffn": True}, pixels
    ),
    "dinov2-registers": lambda: transformers_model(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", IMAGES, pixels
    ),
    "dinov3": lambda: transformers_model("DINOv3ViTModel", "DINOv3ViTConfig", IMAGES, pixels),
    "clip": lambda: transformers_model("CLIPModel", "CLIPConfig", TOWERS, _both),
    "clip-vision": lambda: transformers_model("CLIPVisionModel", "CLIPVisionConfig", IMAGES, pixels),
    "siglip": lambda: transformers_model("SiglipModel", "SiglipConfig", TOWERS, _both),
    "siglip-vision": lambda: transformers_model("SiglipVisionModel", "SiglipVisionConfig", IMAGES, pixels),
    "llama": lambda: transformers_model("LlamaForCausalLM", "LlamaConfig", DECODER, lambda: ids(use_cache=False)),
    "llama-tied": lambda: transformers_model(
        "LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}, lambda: ids(use_cache=False)
    ),
    "qwen2": lambda: transformers_model("Qwen2ForCausalLM", "Qwen2Config", DECODER, lambda: ids(use_cache=False)),
    "qwen3": lambda: transformers_model(
        "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 12}, lambda: ids(use_cache=False)
    ),
    "gemma": lambda: transformers_model(
        "GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 12}, lambda: ids(use_cache=False)
    ),
    "phi3": lambda: transformers_model("Phi3ForCausalLM", "Phi3Config", DECODER, lambda: ids(use_cache=False)),
    "torch-pre-norm": lambda: encoder_layers(True),
    "plain": lambda: Family(liven(PlainTransformer(dim=48)), [{"x": torch.randn(3, 7, 48)} for _ in range(3)]),
    "timm-vit": lambda: timm_model("vit_small_patch16_224", VIT_S),
    "timm-vit-layer-scale": lambda: timm_model("vit_small_patch16_224", {**VIT_S, "init_values": 0.1}),
    "timm-vit-qk-norm": lambda: timm_model("vit_small_patch16_224", {**VIT_S, "qk_norm": True}),
    "timm-deit": lambda: timm_model("deit_tiny_distilled_patch16_224", VIT_S),
    "timm-siglip": lambda: timm_model("vit_base_patch16_siglip_224", VIT_S),
    "timm-swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)},
    ),
    "open-clip": open_clip_model,
}
POST_NORM: dict[str, Callable[[], Family]] = {
    "bert": lambda: transformers_model("BertModel", "BertConfig", {**SIZE, "vocab_size": 64}, _bert),
    "roberta": lambda: transformers_model("RobertaModel", "RobertaConfig", {**SIZE, "vocab_size": 64}, _bert),
    "mpnet": lambda: transformers_model("MPNetModel", "MPNetConfig", {**SIZE, "vocab_size": 64}, _bert),
    "distilbert": lambda: transformers_model(
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
        _bert,
    ),
    "torch-post-norm": lambda: encoder_layers(False),
}
FAMILIES = {**PRE_NORM, **POST_NORM}


def build(name: str) -> Family:
    """The same model and data every time."""
    torch.manual_seed(0)
    return FAMILIES[name]()


def one_block(family: Family) -> Family:
    """The same with the first of its blocks alone, where each costs time and one shows it all."""
    for module in list(family.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1:
                setattr(module, name, child[:1])
    family.model.config.num_hidden_layers = 1  # type: ignore[union-attr]
    return family


def job(case: Case, spec: str | dict[str, Any] = "w4a4", seed: int = 0) -> Job:
    """What a method gets: a copy of the case's model with its quantizers in place and off."""
    model, batches, parsed = copy.deepcopy(case.model), Batches(case.batches), QuantSpec.parse(spec)
    sites = plan(model, parsed, trace(model, batches.first))
    return Job(model, parsed, sites, insert(model, sites), batches, seed, False, stage="transform")


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def outlying() -> Family:
    """A ViT with a few channels of norm outputs and MLP inputs fifty times as large as the others."""
    options = {**IMAGES, "hidden_size": 96, "intermediate_size": 192}
    case = transformers_model("ViTModel", "ViTConfig", options, pixels)
    with torch.no_grad():
        for layer in case.model.layers:
            for norm, readers in (
                (layer.layernorm_before, [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]),
                (layer.layernorm_after, [layer.mlp.fc1]),
            ):
                norm.weight[7] *= 50.0
                norm.weight[61] *= 30.0
                for reader in readers:
                    reader.weight[:, 7] /= 20.0
                    reader.weight[:, 61] /= 20.0
            layer.attention.v_proj.weight[11] *= 20.0
            layer.attention.o_proj.weight[:, 11] /= 20.0
            layer.mlp.fc1.weight[5] *= 20.0
            layer.mlp.fc2.weight[:, 5] /= 20.0
    return case
