"""GGUF: Llama-type language models for llama.cpp and programs built on it.

    Q4_0   32 weights to a block: d (float16), 16 bytes of two codes each; value = d (code - 8)
    Q8_0   32 weights to a block: d (float16), 32 codes;                   value = d code

Weights of up to 4 bits fit the first and of up to 8 bits the second, exactly but for d, which is rounded to float16: a
scale for every channel, or for groups of a multiple of 32 inputs. Formats of llama.cpp keep activations in floating
point, so specs that round them are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export.plain_layers import PlainLayer, plain_layers
from s2d.models.quiet import quiet
from s2d.optional import require
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.numerics.quantizer import Quantizer

NAME = "GGUF"
BLOCK = 32
_KINDS = {"LlamaForCausalLM": "LLAMA"}  # transformers' class: the architecture in gguf's tables
# The regular expression that llama.cpp splits text with, by the steps of the tokenizer's own.
_SPLITTERS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def check(model: nn.Module, embeddings: int) -> int:
    """Refuse, before any work, a model that the format cannot hold.

    Returns:
        The bits of the embedding tables, 0 where they are not rounded.

    Raises:
        InputError: The format cannot hold a layer; the message gives the reason and the nearest spec.
    """
    require("gguf", "hf")
    if type(model).__name__ not in _KINDS:
        raise InputError(f"{NAME} is written for {', '.join(_KINDS)}, not {type(model).__name__}; choose NAME.onnx")
    if embeddings not in (0, 8):
        raise InputError(f"{NAME} holds tables of embeddings at 8 bits or in full; use embeddings 8 or 0")
    for layer in plain_layers(model, NAME):
        if layer.activation is not None:
            bits = 4 if layer.bits <= 4 else 8
            raise InputError(f"{layer.name} rounds its input, which {NAME} cannot hold; the nearest spec is w{bits}a16")
        if layer.run % BLOCK:
            raise InputError(
                f"{layer.name}: {NAME} has blocks of {BLOCK} inputs, and {layer.run} share a scale here; "
                f"the nearest spec is weight: {{bits: 4, granularity: group-{BLOCK}}}"
            )
    return embeddings


def as_written(model: nn.Module) -> None:
    """Round the weights' scales to float16, in a copy of the model: its weights are then those of the file."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.weight_quantizer is not None:
            quantizer = module.weight_quantizer
            values = quantizer(module.weight)
            scale = quantizer.scale
            quantizer.scale = scale.half().float()
            wide = _spread(quantizer.scale / scale, values.shape)
            module.weight = nn.Parameter(values * wide, requires_grad=False)


def write(model: nn.Module, path: Path, *, embeddings: int, tokenizer: Any) -> None:
    """Write a quantized language model.

    Args:
        model: Checked.
        path: The file.
        embeddings: 8 (Q8_0) or 0 (float32), for tables, and heads that share them.
        tokenizer: A fast tokenizer of byte-level BPE; without one the file holds no vocabulary.
    """
    gguf = require("gguf", "hf")
    config: Any = model.config
    architecture = getattr(gguf.MODEL_ARCH, _KINDS[type(model).__name__])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config)
    if tokenizer is not None:
        _add_vocabulary(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    layers = {layer.name: layer for layer in plain_layers(model, NAME)}
    tied = config.tie_word_embeddings
    hidden = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, Quantizer))
    kinds = gguf.GGMLQuantizationType
    for key, value in model.state_dict().items():
        if key.startswith(hidden) or (tied and key == "lm_head.weight"):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"{NAME} has no name for {key}")
        layer = layers.get(key.removesuffix(".weight"))
        if layer is not None:
            codes, scale = _turned(layer, config)
            kind = kinds.Q4_0 if layer.bits <= 4 else kinds.Q8_0
            writer.add_tensor(name, blocks(codes, scale, layer.bits), raw_dtype=kind)
        elif value.ndim == 2 and embeddings:
            writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), kinds.Q8_0), raw_dtype=kinds.Q8_0)
        else:
            writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path, like: nn.Module) -> nn.Module:
    """The file as transformers reads it: its values in floating point.

    Args:
        path: From `write`.
        like: The model that was written.
    """
    transformers = require("transformers", "hf")
    kind = getattr(transformers, type(like).__name__)
    with quiet(transformers):
        return kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def blocks(codes: Tensor, scale: Tensor, bits: int) -> np.ndarray:
    """Weights as the bytes of their blocks.

    Args:
        codes: int8 ``[out, in]``.
        scale: ``[]``, ``[out]`` or ``[out, groups]``.
        bits: Up to 4 for Q4_0, up to 8 for Q8_0.

    Returns:
        uint8 ``[out, in / 32 * 18]`` or ``[out, in / 32 * 34]``.
    """
    out, size = codes.shape
    grouped = codes.unflatten(1, (-1, BLOCK))
    d = _spread(scale, (out, size))[:, ::BLOCK].to(torch.float16).contiguous().view(torch.uint8).view(out, -1, 2)
    if bits <= 4:
        shifted = (grouped + 8).to(torch.uint8)
        stored = shifted[..., : BLOCK // 2] | (shifted[..., BLOCK // 2 :] << 4)
    else:
        stored = grouped.contiguous().view(torch.uint8)
    return torch.cat([d, stored], dim=-1).flatten(1).numpy()


def _spread(scale: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    if scale.ndim == 2:
        return scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
    return (scale.unsqueeze(1) if scale.ndim else scale).expand(shape)


def _turned(layer: PlainLayer, config: Any) -> tuple[Tensor, Tensor]:
    """Codes and scales with the rows in llama.cpp's order: it rotates neighbours where transformers rotates halves."""
    codes, scale = layer.weight.codes, layer.weight.scale
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.name.split(".")[-1])
    if heads is None:
        return codes, scale
    rows = torch.arange(len(codes)).view(heads, 2, -1).transpose(1, 2).flatten()
    return codes[rows], scale[rows] if scale.ndim else scale


def _describe(writer: Any, config: Any) -> None:
    """The hyper-parameters."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{NAME}: rope scaling {rope['rope_type']!r} is not written")
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """The tokens and merges of a byte-level BPE."""
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = form.get("pre_tokenizer") or {}
    kinds = tuple(step["type"] for step in steps.get("pretokenizers", [steps]) if "type" in step)
    if form["model"]["type"] != "BPE" or kinds not in _SPLITTERS:
        raise InputError(
            f"{NAME}: a tokenizer of {form['model']['type']} with {'+'.join(kinds) or 'no splitting'} is not written; "
            "export without it (tokenizer=None) and add the vocabulary with llama.cpp's own tools"
        )
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [_USER_DEFINED] * size
    for text, index in form["model"]["vocab"].items():
        tokens[index], types[index] = text, _NORMAL
    for added in form.get("added_tokens", []):
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in form["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_SPLITTERS[kinds])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for role in ("bos", "eos", "pad", "unk"):
        index = getattr(tokenizer, f"{role}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    if template := getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(template)
