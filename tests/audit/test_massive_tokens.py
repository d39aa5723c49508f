"""Which tokens carry the outliers: told from a model in which one token was made to."""

from __future__ import annotations

import pytest
import torch

from s2d.audit import Audit, AuditRow, audit
from s2d.audit.massive_tokens import MassiveTokens, summary

IDS = torch.tensor([[7, 5, 6, 9], [8, 5, 9, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def watched(x: torch.Tensor, **batch: torch.Tensor) -> MassiveTokens:
    carriers = MassiveTokens()
    for _ in carriers.noting([batch]):
        carriers.add("w", x)
    return carriers


def test_positions_ids_and_what_remains_by_hand() -> None:
    x = torch.ones(7, 4)
    x[0, 1], x[4, 2], x[5, 0] = 50.0, -90.0, 3.0  # first tokens of both texts, and the second of the other
    record = watched(x, input_ids=IDS, attention_mask=MASK).record("w")
    assert record is not None
    assert [(t["value"], t["position"], t["token"]) for t in record["top"][:3]] == [(90, 0, 8), (50, 0, 7), (3, 1, 5)]
    rest = x[[1, 2, 3, 5, 6]]
    assert record["max_without_first"] == 3
    assert record["ratio_without_first"] == pytest.approx(3 / rest.square().mean().sqrt().item())


def test_rows_that_are_not_tokens_are_left_out() -> None:
    assert watched(torch.ones(3, 4), input_ids=IDS).record("w") is None
    assert watched(torch.ones(8, 4), pixel_values=IDS).record("w") is None
    assert watched(torch.ones(8, 4), input_ids=IDS).record("w") is not None


def test_the_audit_of_a_decoder_names_the_token_that_was_made_massive() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # token 3 alone excites hidden unit 5 of the first MLP, through direction 2 of the stream
        model.model.embed_tokens.weight[:, 2] = 0
        model.model.embed_tokens.weight[3] = 0
        model.model.embed_tokens.weight[3, 2] = 30
        model.model.layers[0].self_attn.o_proj.weight[2] = 0  # nor does attention write there
        model.model.layers[0].mlp.up_proj.weight[5, 2] = 20
        model.model.layers[0].mlp.gate_proj.weight[5, 2] = 20
    batches = [{"input_ids": torch.cat([torch.tensor([[3]]), torch.randint(4, 20, (1, 30))], 1)} for _ in range(4)]
    found = audit(model, batches, include="*mlp.down_proj*")
    first = found.row("model.layers.0.mlp.down_proj.weight")
    assert first.carriers is not None and first.input_ratio is not None
    assert all((t["position"], t["token"]) == (0, 3) for t in first.carriers["top"][:4])
    assert first.carriers["top"][4]["position"] > 0
    assert first.carriers["ratio_without_first"] < first.input_ratio / 2
    lines = summary(found.rows, {3: "<s>"}.get)  # type: ignore[arg-type]
    assert "model.layers.0.mlp.down_proj" in lines[0] and "0, 0, 0, 0" in lines[0] and "'<s>'" in lines[0]
    assert lines[-1].startswith("1 of 2 inputs are stretched by the first token") and "--prefix 1" in lines[-1]
    assert Audit.from_json(found.to_json()).row(first.weight).carriers == first.carriers


def test_without_tokens_there_is_nothing_to_say() -> None:
    row = AuditRow("w", "linear", [2, 2], 0, None, [1.0], 1.0, 1.0, input_ratio=3.0)
    assert summary([row]) == []
