"""Scales move only where all readers of a norm are known: architectures that no family names keep their function."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import s2d

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
# Norms around the sublayers (Gemma), behind them (Olmo 2), on q and k (Qwen 3), LayerNorms that keep gain - 1
# (Nemotron), a projection that reads values beside a convolution's outputs (ConvBERT), and the plain kinds.
NAMES = ("Gemma2", "Gemma3Text", "Olmo2", "Qwen3", "Exaone4", "Cohere2", "Mistral", "Nemotron", "ConvBert")


def tiny(name: str) -> nn.Module:
    """A tiny random model whose norms have gains that differ, so that a wrong fold shows."""
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(kind(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("method", ["repq", "smoothquant", "awq"])
@pytest.mark.parametrize("name", NAMES)
def test_without_its_quantizers_the_model_computes_what_it_did(name: str, method: str) -> None:
    model, batch = tiny(name), {"input_ids": torch.arange(4, 28).reshape(2, 12)}
    with torch.no_grad():
        before = model(**batch).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = s2d.quantize(model, "w8a8", calibration=[batch], method=method)
    s2d.quant.remove(quantized)
    with torch.no_grad():
        after = quantized(**batch).last_hidden_state
    assert (after - before).norm() <= 1e-5 * before.norm()
