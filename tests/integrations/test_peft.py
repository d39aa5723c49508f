"""LoRA: its factors are not the weights that run, so they are left alone by name; a merged model is conditioned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

from s2d.decay import SelectiveSpectralDecay  # noqa: E402
from s2d.errors import InputError  # noqa: E402


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    model[0].weight.data[3] = 40.0
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["1", "3"], init_lora_weights=False))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for step in range(number):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()


def test_adapters_alone_are_refused_with_the_way_out() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(InputError, match="frozen|LoRA"):
        SelectiveSpectralDecay(model, optimizer)


def test_a_merged_adapter_is_conditioned() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps(model, optimizer, 4)
    x = torch.randn(8, 64)
    before = model(x).detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-4)
    merged.requires_grad_(True)
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    decay = SelectiveSpectralDecay(merged, optimizer, strength=0.2, refresh_every=1)
    steps(merged, optimizer, 12)
    decay.remove()
    assert merged[0].weight.abs().max() < 20
