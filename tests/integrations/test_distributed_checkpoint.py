"""torch.distributed.checkpoint: saved on two ranks of FSDP2, continued on one, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from tests.ranks import COMMON, WAYS, batch, fsdp, gathered, model, spawn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.integrations.distributed_checkpoint import DecayState

WAY = WAYS["weight-decoupled"]


class Run:
    """A model, its optimizer and the decay, on as many ranks as there are."""

    def __init__(self) -> None:
        self.place = "fsdp" if dist.is_initialized() else "alone"
        self.whole = model()
        self.model: nn.Module = fsdp(self.whole) if self.place == "fsdp" else self.whole
        # Not Adam, which turns the rounding errors of a gradient that is zero into steps.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.decay = SelectiveSpectralDecay(self.model, self.optimizer, **COMMON, **WAY)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            ids, labels = batch(step, self.place)
            F.cross_entropy(self.model(ids), labels).backward()
            self.optimizer.step()

    def save(self, folder: str) -> None:
        weights, moments = get_state_dict(self.model, self.optimizer)
        content = {"model": weights, "optimizer": moments, "decay": DecayState(self.decay)}
        dcp.save(content, checkpoint_id=folder, no_dist=not dist.is_initialized())

    def load(self, folder: str) -> None:
        weights, moments = get_state_dict(self.model, self.optimizer)
        content: dict[str, Any] = {"model": weights, "optimizer": moments, "decay": DecayState(self.decay)}
        dcp.load(content, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)


def on_two(folder: str) -> None:
    started = Run()
    started.steps(0, 3)
    started.save(f"{folder}/of-two")
    started.decay.remove()

    continued = Run()
    continued.load(f"{folder}/of-one")
    assert continued.decay.step_count == 3
    continued.steps(3, 5)
    _write(gathered(continued.whole), f"{folder}/one-then-two")
    continued.decay.remove()


def _write(weights: dict[str, Tensor], path: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(weights, path)


@pytest.mark.timeout(300)
def test_saved_on_so_many_ranks_and_continued_on_others(tmp_path: Path) -> None:
    through = Run()
    through.steps(0, 3)
    through.save(str(tmp_path / "of-one"))
    through.steps(3, 5)
    through.decay.remove()
    spawn(2, tmp_path, on_two, str(tmp_path))
    continued = Run()
    continued.load(str(tmp_path / "of-two"))
    assert continued.decay.selected
    continued.steps(3, 5)
    continued.decay.remove()
    expected = gathered(through.whole)
    for found in (torch.load(tmp_path / "one-then-two"), gathered(continued.whole)):
        for name, weight in expected.items():
            torch.testing.assert_close(
                found[name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )
