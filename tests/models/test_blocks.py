"""The blocks of library models against lists written down by hand from their code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.builders import timm_model, transformers_model

from s2d.models.blocks import blocks_of
from s2d.models.tracing import trace

_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 64}  # fmt: skip
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8],
          "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2], "image_size": 64}  # fmt: skip
_STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 16, 16]}
_TWINS = {"img_size": 64, "embed_dims": (16, 32), "num_heads": (2, 4), "mlp_ratios": (2, 2)}

TEXT: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("Bert", _TEXT, {"encoder.layer": 2}),
    ("Albert", {**_TEXT, "embedding_size": 16}, {"encoder.albert_layer_groups": 1}),
    ("DistilBert", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
     {"transformer.layer": 2}),
    ("SqueezeBert", {**_TEXT, "embedding_size": 32}, {"encoder.layers": 2}),
    ("GPT2", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, {"h": 2}),
    ("Llama", _TEXT, {"layers": 2}),
    ("T5", _T5, {"encoder.block": 2, "decoder.block": 2}),
]  # fmt: skip
IMAGES: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    # An attention or an MLP with its sum is a block here, and the last two of a stage make its image smaller.
    ("Levit", {**_LEVIT, "depths": [1, 2, 1]},
     {"encoder.stages.0.layers": 4, "encoder.stages.1.layers": 6, "encoder.stages.2.layers": 2}),
    ("Levit", {**_LEVIT, "depths": [1, 1, 1]},
     {"encoder.stages.0.layers": 4, "encoder.stages.1.layers": 4, "encoder.stages.2.layers": 2}),
    *((name, _STAGES | more, {f"encoder.stages.{i}.layers": n for i, n in enumerate((1, 1, 2, 1))})
      for name, more in (("ResNet", {"embedding_size": 8}), ("ConvNextV2", {}),
                         ("RegNet", {"embedding_size": 8, "groups_width": 4}))),
]  # fmt: skip
TIMM: list[tuple[str, dict[str, Any], int, list[str]]] = [
    ("levit_128s", {"img_size": 64, "embed_dim": (32, 32, 32), "depth": (1, 1, 2), "key_dim": 8}, 64,
     ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1"]),
    ("twins_svt_small", {**_TWINS, "depths": (2, 2), "sr_ratios": (2, 1), "wss": (4, 4)}, 64,
     ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]),
    ("twins_pcpvt_small", {**_TWINS, "depths": (1, 2), "sr_ratios": (2, 1)}, 64,
     ["blocks.0.0", "blocks.1.0", "blocks.1.1"]),
    ("densenet121", {"block_config": (2, 3), "growth_rate": 8}, 32,
     [f"features.denseblock{i}.denselayer{j}" for i, j in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3))]),
    ("efficientnet_b0", {}, 32, [f"blocks.{i}.{j}" for i, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for j in range(n)]),
    ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}, 56,
     ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]),
    ("cait_xxs24_224", {"img_size": 32, "depth": 2, "depth_token_only": 1, "embed_dim": 32}, 32,
     ["blocks.0", "blocks.1", "blocks_token_only.0"]),
    ("poolformer_s12", {}, 64, [f"stages.{i}.blocks.{j}" for i, n in enumerate((2, 2, 6, 2)) for j in range(n)]),
    ("resnet18", {"channels": (16, 16, 32, 32)}, 64, [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]),
    ("regnety_002", {}, 32, [f"s{i}.b{j}" for i, n in enumerate((1, 1, 4, 7), 1) for j in range(1, n + 1)]),
]  # fmt: skip


def _found(model: torch.nn.Module, batch: Any) -> list[str]:
    graph = trace(model.eval(), batch)
    return list(dict.fromkeys(path for blocks in graph.blocks if not blocks.inside for path, _ in blocks.members))


@pytest.mark.parametrize(("name", "options", "lists"), [*TEXT, *IMAGES])
def test_blocks_of_transformers(name: str, options: dict[str, Any], lists: dict[str, int]) -> None:
    model = transformers_model(f"{name}Model", f"{name}Config", options)
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": torch.randn(2, 3, 64, 64)} if "hidden_sizes" in options else {"input_ids": ids}
    found = _found(model, {**batch, "decoder_input_ids": ids} if name == "T5" else batch)
    assert found == [f"{path}.{number}" for path, length in lists.items() for number in range(length)]


@pytest.mark.parametrize(("name", "options", "size", "names"), TIMM)
def test_blocks_of_timm(name: str, options: dict[str, Any], size: int, names: list[str]) -> None:
    assert _found(timm_model(name, options), torch.randn(2, 3, size, size)) == names


def test_hooks_see_the_blocks_that_a_walk_gets() -> None:
    """SqueezeBERT calls the forward of its blocks itself: the graph lists them, but nothing waits for them to run."""
    model = transformers_model("SqueezeBertModel", "SqueezeBertConfig", {**_TEXT, "embedding_size": 32}).eval()
    batch = {"input_ids": torch.arange(5, 12)[None].repeat(2, 1)}
    graph = trace(model, batch)
    ran: list[str] = []
    for path, _ in graph.blocks[0].members:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    model(**batch)
    assert ran == [] and blocks_of(model, graph) == {}
