"""Tiny random models of every kind of attention, and batches that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Case:
    """A model in evaluation mode, batches for it, and its output as one tensor."""

    model: nn.Module
    batches: list[dict[str, Any]]
    padding: Tensor | None = None

    def output(self, model: nn.Module | None = None, batch: dict[str, Any] | None = None) -> Tensor:
        result = (self.model if model is None else model)(**(self.batches[0] if batch is None else batch))
        for name in ("last_hidden_state", "logits"):
            if hasattr(result, name):
                result = getattr(result, name)
        # Torch's fused encoder gives zeros at padded places, its plain one does not.
        return result if self.padding is None else result.masked_fill(self.padding[..., None], 0.0)


class FunctionalAttention(nn.Module):
    """Attention as timm writes it: fused qkv and a direct call of the fused operator, or the three steps by hand."""

    def __init__(self, dim: int, heads: int, style: str):
        super().__init__()
        self.heads, self.style = heads, style
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        if self.style == "sdpa":
            heads = F.scaled_dot_product_attention(q, k, v)
        elif self.style == "matmul":
            heads = self.drop(((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        elif self.style == "module":
            heads = torch.matmul(self.softmax(torch.matmul(q, k.transpose(-2, -1)) * scale), v)
        elif self.style == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
            heads = torch.einsum("bhij,bhjd->bhid", F.softmax(scores, dim=-1), v)
        elif self.style == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            scores = torch.baddbmm(torch.zeros(1), q, k.transpose(1, 2), beta=0.0, alpha=scale)
            heads = torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, self.heads))
        elif self.style == "linear":  # no softmax between the products: not an attention that is known
            heads = (q @ k.transpose(-2, -1)) @ v
        else:
            heads = self.relative(q, k, v)
        return self.proj(heads.transpose(1, 2).flatten(2))

    def relative(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A second product before the softmax, as models with relative positions have."""
        scores = q @ k.transpose(-2, -1) + q @ k.roll(1, dims=2).transpose(-2, -1)
        return scores.softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, dim: int, style: str):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), FunctionalAttention(dim, 4, style)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainTransformer(nn.Module):
    """Two blocks and a head, of no family."""

    def __init__(self, style: str = "sdpa", dim: int = 16):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, style) for _ in range(2))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def plain(style: str) -> Case:
    return Case(PlainTransformer(style).eval(), [{"x": torch.randn(3, 7, 16)} for _ in range(3)])


def bert(implementation: str = "sdpa") -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.BertModel(config)
    model.set_attn_implementation(implementation)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:] = 0
    mask[2, 4:] = 0
    batches = [{"input_ids": torch.randint(50, (3, 9)), "attention_mask": mask} for _ in range(3)]
    return Case(model.eval(), batches)


def llama(implementation: str = "sdpa") -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation(implementation)
    return Case(model.eval(), [{"input_ids": torch.randint(50, (3, 9)), "use_cache": False} for _ in range(3)])


def vit(implementation: str = "sdpa") -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    model = transformers.ViTModel(config)
    model.set_attn_implementation(implementation)
    return Case(model.eval(), [{"pixel_values": torch.randn(3, 3, 16, 16)} for _ in range(3)])


def torch_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, num_layers=2)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    batches = [{"src": torch.randn(3, 7, 16), "src_key_padding_mask": padding} for _ in range(3)]
    return Case(model.eval(), batches, padding)


CASES: dict[str, Callable[[], Case]] = {
    "bert-sdpa": bert,
    "bert-eager": lambda: bert("eager"),
    "llama-sdpa": llama,
    "llama-eager": lambda: llama("eager"),
    "vit-sdpa": vit,
    "vit-eager": lambda: vit("eager"),
    "torch-encoder": torch_encoder,
    **{f"plain-{style}": (lambda style=style: plain(style)) for style in ("sdpa", "matmul", "module", "einsum", "bmm")},
}
