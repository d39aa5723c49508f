"""A conditioned model is still the library's own: save_pretrained and from_pretrained give back the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import s2d

transformers = pytest.importorskip("transformers")


def conditioned() -> torch.nn.Module:
    """A tiny BERT after a few steps with decay that had something to do."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).train()
    model.encoder.layer[0].output.dense.weight.data[3] *= 30
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = s2d.SelectiveSpectralDecay(model, optimizer, refresh_every=1, outlier_ratio=1.5)
    for _ in range(3):
        model(input_ids=torch.randint(0, 60, (4, 8))).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(record["selected"] for record in decay.history)
    decay.remove()
    return model.eval()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(24).reshape(3, 8)).last_hidden_state


def test_save_pretrained_and_from_pretrained_round_trip(tmp_path: Path) -> None:
    model = conditioned()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(outputs(s2d.load(tmp_path).model), outputs(model))


def test_what_s2d_saves_is_read_by_automodel(tmp_path: Path) -> None:
    model = conditioned()
    s2d.save(model, tmp_path / "saved")
    assert torch.equal(outputs(transformers.AutoModel.from_pretrained(tmp_path / "saved")), outputs(model))
