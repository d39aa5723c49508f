"""Exact moves between weights, on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.builders import transformers_model
from tests.quant.tiny_families import FAMILIES, POST_NORM, PRE_NORM, apart, build
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.tracing import trace
from s2d.quant.modules.folding import (
    NormFold,
    PairFold,
    apply_norm_fold,
    apply_value_fold,
    attention_parts,
    matrix,
    norm_folds,
    norm_kind,
    pair_folds,
    refuse_post_norm,
    scale_norm_output,
    streams,
)

GATED = {"llama": 2, "llama-tied": 2, "qwen2": 2, "qwen3": 2, "gemma": 2, "dinov2-swiglu": 2}
TOWERS = {"clip": 2, "siglip": 2, "timm-swin": 2, "open-clip": 2}


def graph_of(case: Any) -> Graph:
    return trace(case.model, case.batches[0])


def scales(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 4 + 0.25


@pytest.mark.parametrize("name", PRE_NORM)
def test_a_scale_moves_from_norms_to_readers(name: str) -> None:
    case = build(name)
    before, folds = case.output(), norm_folds(case.model, graph_of(case))
    moved = [fold for fold in folds if not fold.residual]
    assert len(moved) >= 2
    # Only a norm behind the last block may have another reader: it is the model's output, and a pooler reads it too.
    assert all("pooler" in reader or "head" in reader for fold in folds if fold.residual for reader in fold.readers)
    for fold in moved:
        apply_norm_fold(case.model, fold, scales(matrix(case.model, fold.readers[0])[0].shape[1]))
    assert apart(case.output(), before) < 1e-5


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "plain"])
def test_a_scale_moves_from_values_to_the_projection(name: str) -> None:
    case = build(name)
    before, folds = case.output(), pair_folds(case.model, graph_of(case))
    assert len(folds) >= 2 + GATED.get(name, 0)
    for fold in folds:
        apply_value_fold(case.model, fold, scales(fold.rows[1] - fold.rows[0]))
    assert apart(case.output(), before) < 1e-5


def test_folds_of_models_whose_parts_no_family_names() -> None:
    """T5: ten norms feed a sublayer each, the last of a tower is its output; six attentions have values."""
    config = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = transformers_model("T5Model", "T5Config", config).eval()
    ids = torch.arange(5, 17).view(2, 6)
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    graph = trace(model, batch)
    moved, pairs = [fold for fold in norm_folds(model, graph) if not fold.residual], pair_folds(model, graph)
    towers = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
    values = {f"{tower}.block.{i}.layer.{j}.{name}" for tower, names in towers.items()
              for i in (0, 1) for j, name in enumerate(names)}  # fmt: skip
    assert {(fold.writer, fold.reader) for fold in pairs} == {(f"{name}.v", f"{name}.o") for name in values}
    assert {fold.norm for fold in moved} == {
        f"{tower}.block.{i}.layer.{j}.layer_norm" for tower, n in (("encoder", 2), ("decoder", 3)) for i in (0, 1)
        for j in range(n)
    }  # fmt: skip
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        for fold in moved:
            apply_norm_fold(model, fold, scales(32))
        for pair in pairs:
            apply_value_fold(model, pair, scales(pair.rows[1] - pair.rows[0]))
        assert apart(model(**batch).last_hidden_state, before) < 1e-5


def test_no_scale_moves_where_tokens_are_mixed_or_a_reader_reads_more() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
            self.tokens, self.shared, self.own = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)  # as many tokens as channels
            x = x + self.shared(self.second(x)) + self.shared(x)
            return x + self.own(self.third(x))

    model = Both().eval()
    found = {fold.norm: fold.residual for fold in norm_folds(model, trace(model, torch.randn(2, 8, 8)))}
    assert found == {"second": True, "third": False}


@pytest.mark.parametrize("name", POST_NORM)
def test_post_norm_models_are_marked_and_refused_by_name(name: str) -> None:
    case = build(name)
    model, folds = case.model, norm_folds(case.model, graph_of(case))
    assert folds and all(fold.residual for fold in folds)
    with pytest.raises(InputError, match=f"somemethod folds .* {type(model).__name__} is post-norm"):
        refuse_post_norm(model, "somemethod")
    with pytest.raises(InputError, match="post-norm"):
        streams(model, "somemethod")


def test_what_feeds_a_post_norm_block_is_the_norm_before_it() -> None:
    case = build("bert")
    assert norm_folds(case.model, graph_of(case)) == [
        NormFold(norm, readers, residual=True)
        for norm, readers in [
            ("embeddings.LayerNorm", tuple(f"encoder.layer.0.attention.self.{x}" for x in ("query", "key", "value"))),
            ("encoder.layer.0.attention.output.LayerNorm", ("encoder.layer.0.intermediate.dense",)),
            (
                "encoder.layer.0.output.LayerNorm",
                tuple(f"encoder.layer.1.attention.self.{x}" for x in ("query", "key", "value")),
            ),
            ("encoder.layer.1.attention.output.LayerNorm", ("encoder.layer.1.intermediate.dense",)),
            ("encoder.layer.1.output.LayerNorm", ("pooler.dense",)),
        ]
    ]


@pytest.mark.parametrize("name", [name for name in PRE_NORM if name != "plain"])
def test_streams_cover_all_blocks(name: str) -> None:
    model = build(name).model
    found = streams(model, "test")
    assert len(found) == TOWERS.get(name, 1)
    assert all(len(stream.branches) == 2 * len(stream.blocks) for stream in found)
    has_scales = any("layer_scale" in key or ".ls1" in key for key, _ in model.named_parameters())
    assert all((branch.scale is not None) == has_scales for stream in found for branch in stream.branches)
    assert all(stream.centred == ("llama" not in name) for stream in found if name in ("vit", "llama", "clip"))


def test_an_unknown_part_of_a_block_is_named() -> None:
    case = build("vit")
    case.model.layers[1].extra = nn.Linear(48, 48)
    with pytest.raises(InputError, match=r"test does not know what layers\.1\.extra\.weight does"):
        streams(case.model, "test")


def test_shared_weights_are_left_alone() -> None:
    case = build("vit")
    case.model.layers[1].mlp.fc1.weight = case.model.layers[0].mlp.fc1.weight
    found = {fold.norm for fold in norm_folds(case.model, graph_of(case)) if not fold.residual}
    assert found == {"layers.0.layernorm_before", "layers.1.layernorm_before"}
    with pytest.raises(InputError, match=r"norm2, its readers and fc2 in layers\.0"):
        streams(case.model, "test")


def test_grouped_heads_share_their_values_scale() -> None:
    case = build("llama")
    fold = pair_folds(case.model, graph_of(case))[0]
    assert (fold.head_dim, fold.heads, fold.value_heads) == (12, 4, 2)
    per_value = torch.arange(24.0)
    spread = fold.to_reader(per_value)
    assert torch.equal(spread.view(4, 12)[0], per_value[:12]) and torch.equal(spread.view(4, 12)[1], per_value[:12])
    assert torch.equal(spread.view(4, 12)[3], per_value[12:])
    for how in ("max", "mean"):
        assert torch.equal(fold.to_value(spread, how), per_value)


def test_rows_of_fused_projections() -> None:
    case, normed = build("phi3"), build("qwen3")
    parts = attention_parts(case.model, graph_of(case))[0]  # 4 query heads and 2 key heads of 12 channels
    name = "model.layers.0.self_attn.qkv_proj"
    assert (parts.q, parts.k) == ((name, 0, 48), (name, 48, 72))
    assert parts.values == PairFold(name, (72, 96), "model.layers.0.self_attn.o_proj", 12, 4)
    assert [parts.normed for parts in attention_parts(normed.model, graph_of(normed))] == [True, True]


class OddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.weight


def test_no_scale_moves_from_values_that_are_joined_to_others() -> None:
    """ConvBERT joins the heads of its attention and those of a convolution: their widths look like grouped heads."""
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 48, "embedding_size": 32}  # fmt: skip
    model = transformers_model("ConvBertModel", "ConvBertConfig", config).eval()
    graph = trace(model, {"input_ids": torch.arange(5, 17).view(2, 6)})
    assert pair_folds(model, graph) == []


class CentredShiftedGain(nn.LayerNorm):
    """As in Nemotron."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1.0 + self.weight, self.bias, self.eps)


class ShiftedGain(nn.RMSNorm):
    """As in Gemma."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1.0 + self.weight, self.eps)


def test_norms_are_told_apart_by_what_they_compute() -> None:
    torch.manual_seed(0)
    norms = {"layer": nn.LayerNorm(8), "rms": nn.RMSNorm(8), "rms+1": ShiftedGain(8), "layer+1": CentredShiftedGain(8)}
    x = torch.randn(5, 8)
    for kind, norm in norms.items():
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        assert norm_kind(norm, "norm") == kind
        with torch.no_grad():
            before = norm(x)
            scale = scales(8)
            scale_norm_output(norm, scale)
            assert apart(norm(x) * scale, before) < 1e-5
    with pytest.raises(InputError, match=r"blocks\.0\.norm \(OddNorm\) is neither"):
        norm_kind(OddNorm(), "blocks.0.norm")
