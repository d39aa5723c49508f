"""accelerate needs no adapter: a prepared optimizer, accumulation and checkpoints work with the decay as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")

from s2d.decay.spectral_decay import SelectiveSpectralDecay  # noqa: E402


def parts(folder: Path) -> tuple:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, project_dir=str(folder))
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 4))
    model[0].weight.data[3] = 40.0
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    decay = SelectiveSpectralDecay(model, optimizer, strength=0.2, refresh_every=3)
    accelerator.register_for_checkpointing(decay)
    return accelerator, model, optimizer, decay


def run(accelerator, model, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(x), x[:, :4])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def test_accumulated_steps_count_once_and_a_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = parts(tmp_path)
    run(*whole[:3], 0, 8)
    whole[0].save_state(str(tmp_path / "state"), safe_serialization=False)
    run(*whole[:3], 8, 16)
    assert whole[3].step_count == 8 and whole[1][0].weight.abs().max() < 20

    rest = parts(tmp_path)
    rest[0].load_state(str(tmp_path / "state"))
    assert rest[3].step_count == 4
    run(*rest[:3], 8, 16)
    for mine, theirs in zip(rest[1].parameters(), whole[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
