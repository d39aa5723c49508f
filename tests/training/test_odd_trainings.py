"""Trainings with next to nothing for the decay to do: each works, or is one line."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_text import equal
from torch import nn

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.tasks import Task
from s2d.training.loop import train
from s2d.training.train_settings import TrainSettings

pytest.importorskip("accelerate")
SETTINGS = TrainSettings(steps=8, batch_size=8, lr=1e-3, head_lr=1e-2)
EAGER = {"outlier_ratio": 1.5, "refresh_every": 2}


def test_behind_a_frozen_encoder_the_head_trains_and_nothing_is_shrunk(loaded: Loaded, task: Task) -> None:
    models = []
    for decay in (None, EAGER):
        models.append(task.build(loaded))
        before = {name: p.detach().clone() for name, p in models[-1].named_parameters()}
        for name, parameter in models[-1].named_parameters():
            parameter.requires_grad_(not name.startswith("encoder."))
        train(models[-1], task, SETTINGS, decay=decay)
        moved = {name for name, p in models[-1].named_parameters() if not torch.equal(p, before[name])}
        assert moved and not any(name.startswith("encoder.") for name in moved)
    assert equal(*models)


def test_an_optimizer_of_the_head_alone_leaves_the_encoder_to_the_reasons(loaded: Loaded, task: Task) -> None:
    model = task.build(loaded)
    head = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    decay = SelectiveSpectralDecay(model, torch.optim.AdamW(head))
    decay.remove()
    assert all(not target.name.startswith("encoder.") for target in decay.targets)
    assert {why for name, why in decay.skipped.items() if name.startswith("encoder.")} == {
        "no optimizer passed here holds it"
    }


def test_nothing_to_train_is_one_line(loaded: Loaded, task: Task) -> None:
    model = task.build(loaded).requires_grad_(False)
    with pytest.raises(InputError, match="has no trainable weights") as caught:
        train(model, task, SETTINGS, decay={})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", [120, 5000])
def test_an_epoch_of_one_batch(loaded: Loaded, task: Task, batch_size: int) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": batch_size, "group_by_length": False})
    done = train(task.build(loaded), task, settings, decay=EAGER)
    assert done.steps == len(done.losses) == 8 and any(row["selected"] for row in done.history)


def test_a_loss_that_is_no_number_is_skipped_and_then_one_line(loaded: Loaded, task: Task) -> None:
    model = task.build(loaded)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if not name.startswith("encoder.")).fill_(torch.nan)
    with pytest.warns(UserWarning, match="was skipped"), pytest.raises(InputError, match="training diverged"):
        train(model, task, SETTINGS, decay=EAGER)


def test_a_step_taken_in_spite_of_it_selects_nothing_new() -> None:
    """In somebody else's loop, without a guard."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    decay = SelectiveSpectralDecay(model, optimizer, refresh_every=1, outlier_ratio=2.0, budget=0.03)
    for x in (torch.randn(8, 16), torch.full((8, 16), torch.nan)):
        (model(x).sum() * 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert decay.step_count == 2 and decay.pace in (0.0, 1.0)
    decay.remove()


def test_a_model_without_outliers_is_left_alone_to_the_last_bit(loaded: Loaded, task: Task) -> None:
    models, told = [], []
    for decay in (None, {}):
        models.append(task.build(loaded))
        told = train(models[-1], task, SETTINGS, decay=decay).history
    assert equal(*models)
    assert told and {row["selected"] for row in told} == {0}
