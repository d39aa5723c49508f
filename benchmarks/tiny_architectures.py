# ruff: noqa: E501
"""Tiny random models of many architectures of transformers and timm, each with a batch of two rows; offline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from s2d.optional import require

_COMMON = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GQA = {**_COMMON, "num_key_value_heads": 2}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SEEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "image_size": 32, "patch_size": 8}  # fmt: skip
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_SPEECH = {
    **_COMMON, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "conv_dim": (32, 32),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
}  # fmt: skip

# kind of input, class of the model, class of the configuration, configuration
TRANSFORMERS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("text", "BertModel", "BertConfig", _COMMON),
    ("text", "RobertaModel", "RobertaConfig", {**_COMMON, "max_position_embeddings": 66}),
    ("text", "DistilBertModel", "DistilBertConfig",
     {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    ("text", "AlbertModel", "AlbertConfig", {**_COMMON, "embedding_size": 16}),
    ("text", "ElectraModel", "ElectraConfig", {**_COMMON, "embedding_size": 16}),
    ("text", "DebertaV2Model", "DebertaV2Config", {**_COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("text", "MPNetModel", "MPNetConfig", _COMMON),
    ("text", "ModernBertModel", "ModernBertConfig", {**_COMMON, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
    ("text", "FNetModel", "FNetConfig", _COMMON),
    ("text", "EsmModel", "EsmConfig", {**_COMMON, "mask_token_id": 4, "position_embedding_type": "rotary"}),
    ("text", "GPT2LMHeadModel", "GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    ("text", "OPTForCausalLM", "OPTConfig", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("text", "GPTNeoXForCausalLM", "GPTNeoXConfig", _COMMON),
    ("text", "BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    ("text", "FalconForCausalLM", "FalconConfig", _COMMON),
    ("text", "LlamaForCausalLM", "LlamaConfig", _GQA),
    ("text", "MistralForCausalLM", "MistralConfig", _GQA),
    ("text", "GemmaForCausalLM", "GemmaConfig", {**_GQA, "head_dim": 8}),
    ("text", "Gemma2ForCausalLM", "Gemma2Config", {**_GQA, "head_dim": 8}),
    ("text", "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GQA, "head_dim": 8}),
    ("text", "Qwen2ForCausalLM", "Qwen2Config", _GQA),
    ("text", "Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 8}),
    ("text", "Olmo2ForCausalLM", "Olmo2Config", _GQA),
    ("text", "Phi3ForCausalLM", "Phi3Config", _GQA),
    ("text", "PhiForCausalLM", "PhiConfig", _COMMON),
    ("text", "CohereForCausalLM", "CohereConfig", _GQA),
    ("text", "StableLmForCausalLM", "StableLmConfig", _GQA),
    ("text", "MixtralForCausalLM", "MixtralConfig", {**_GQA, **_MOE}),
    ("text", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GQA, **_MOE, "head_dim": 8}),
    ("text", "OlmoeForCausalLM", "OlmoeConfig", {**_GQA, **_MOE}),
    ("text", "GptOssForCausalLM", "GptOssConfig", {**_GQA, **_MOE, "head_dim": 8}),
    ("text", "MambaForCausalLM", "MambaConfig", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    ("text", "XLMModel", "XLMConfig", {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 99}),
    ("seq2seq", "T5Model", "T5Config", _T5),
    ("seq2seq", "MT5Model", "MT5Config", _T5),
    ("seq2seq", "BartModel", "BartConfig", _BART),
    ("speech", "Wav2Vec2Model", "Wav2Vec2Config", _SPEECH),
    ("speech", "HubertModel", "HubertConfig", _SPEECH),
    ("mel", "WhisperModel", "WhisperConfig", {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}),
    ("image", "ViTModel", "ViTConfig", _SEEN),
    ("image", "DeiTModel", "DeiTConfig", _SEEN),
    ("image", "BeitModel", "BeitConfig", {**_SEEN, "use_relative_position_bias": True}),
    ("image", "Dinov2Model", "Dinov2Config", {**_SEEN, "use_swiglu_ffn": True}),
    ("image", "SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    ("image", "Swinv2Model", "Swinv2Config", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    ("image", "HieraModel", "HieraConfig", {"image_size": [32, 32], "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 4], "patch_stride": [2, 2], "patch_size": [3, 3], "patch_padding": [1, 1], "masked_unit_size": [4, 4], "num_query_pool": 2}),
    ("image", "ConvNextModel", "ConvNextConfig", {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}),
    ("dual", "CLIPModel", "CLIPConfig", {"text_config": {**_COMMON, "projection_dim": 16}, "vision_config": {**_SEEN, "projection_dim": 16}, "projection_dim": 16}),
    ("dual", "SiglipModel", "SiglipConfig", {"text_config": _COMMON, "vision_config": _SEEN}),
]  # fmt: skip
# name, options, blocks by the paper of the architecture
TIMM: list[tuple[str, dict[str, Any], int]] = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}, 2),
    ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}, 2),
    ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4}, 2),
    ("beitv2_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}, 2),
    ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}, 4),
    ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}, 4),
    ("cait_xxs24_224", {"img_size": 32, "depth": 2, "depth_token_only": 1, "embed_dim": 32}, 3),
    ("xcit_nano_12_p16_224", {"img_size": 32, "depth": 2}, 4),
    ("mixer_s32_224", {"img_size": 64}, 8),
    ("resmlp_12_224", {"img_size": 32}, 12),
    ("poolformer_s12", {}, 12),
    ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 32)}, 5),
    ("levit_128s", {"img_size": 64, "embed_dim": (32, 32, 32), "depth": (1, 1, 2), "key_dim": 8}, 4),
    ("mobilevit_xxs", {}, 13),
    ("efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32)}, 5),
    ("resnet18", {"channels": (16, 16, 32, 32)}, 8),
]


def rows() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    """Name, how to make the model, a batch of two rows."""
    require("transformers", "hf")
    require("timm", "timm")
    import timm
    import transformers

    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batches: dict[str, Any] = {
        "text": {"input_ids": ids, "attention_mask": mask},
        "seq2seq": {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]},
        "speech": {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(2))},
        "mel": {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids[:, :7]},
        "image": {"pixel_values": pixels},
        "dual": {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels},
    }
    for kind, model_class, config_class, options in TRANSFORMERS:
        yield (
            model_class,
            lambda m=model_class, c=config_class, o=options: getattr(transformers, m)(
                getattr(transformers, c)(**copy.deepcopy(o))
            ),
            batches[kind],
        )
    for name, options, _ in TIMM:
        size = options.get("img_size", 64 if "efficientformer" not in name else 224)
        yield (
            f"timm {name}",
            lambda n=name, o=options: timm.create_model(n, pretrained=False, num_classes=7, **o),
            torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)),
        )


def blocks_in(name: str, model: nn.Module) -> int:
    """How many blocks an architecture has, by its configuration or its paper."""
    told = {f"timm {each}": blocks for each, _, blocks in TIMM}
    return told[name] if name in told else _layers(model.config)


def _layers(config: Any) -> int:
    parts = [getattr(config, part) for part in ("text_config", "vision_config") if hasattr(config, part)]
    if parts:
        return sum(_layers(part) for part in parts)
    if hasattr(config, "depths"):
        return sum(config.depths)
    for pair in (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers")):
        if config.is_encoder_decoder and hasattr(config, pair[0]):
            return sum(getattr(config, part) for part in pair)
    return config.num_hidden_layers
