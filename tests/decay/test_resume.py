"""Continuing an interrupted training, bit for bit, in every metric and mode."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tests.blocks import (
    WAY_NAMES,
    WAYS,
    Encoder,
    Two,
    X,
    deciding,
    equal,
    fresh,
    normed,
    removed,
    sgd,
    still_step,
    train,
    weights,
)
from torch import nn

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def started(way: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer, Any, SelectiveSpectralDecay]:
    model = fresh(lambda: Encoder(dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 3) * (1 - step / 12))
    decay = SelectiveSpectralDecay(model, optimizer, strength=0.05, threshold=0.1, refresh_every=3, **way)
    return model, optimizer, scheduler, decay


@pytest.mark.parametrize("first", [5, 6])
@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_an_interrupted_training_continues_bit_for_bit(way: dict[str, Any], first: int) -> None:
    model, optimizer, scheduler, decay = started(way)
    with removed(decay):
        train(model, optimizer, 12, scheduler=scheduler)
        assert decay.selected

    part = started(way)
    with removed(part[3]):
        train(part[0], part[1], first, scheduler=part[2])
        file = io.BytesIO()
        torch.save([each.state_dict() for each in part], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    rest = started(way)
    with removed(rest[3]):
        train(rest[0], rest[1], 2)  # whatever the fresh objects did before
        for each, state in zip(rest, states, strict=True):
            each.load_state_dict(state)
        train(rest[0], rest[1], 12 - first, first=first, scheduler=rest[2])
        assert equal(weights(rest[0]), weights(model))
        assert list(rest[3].history) == list(decay.history)
        assert rest[3].selected == decay.selected and rest[3].step_count == 12


def test_the_state_is_a_snapshot() -> None:
    model, optimizer, _, decay = started(WAYS[3])
    with removed(decay):
        train(model, optimizer, 4)
        state = decay.state_dict()
        file = io.BytesIO()
        torch.save(state, file)
        train(model, optimizer, 5, first=4)
    again = io.BytesIO()
    torch.save(state, again)
    assert file.getvalue() == again.getvalue()


def test_a_state_remembers_which_modules_never_ran() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Two(normed(), nn.Identity())
        model.spare = nn.Linear(3, 3)
        return model, sgd(model)

    model, optimizer = build()
    with deciding(model, optimizer, refresh_every=4) as decay:
        still_step(model, optimizer, X)
        state = decay.state_dict()
    model, optimizer = build()
    with deciding(model, optimizer, refresh_every=4) as decay:
        decay.load_state_dict(state)
        assert set(decay.skipped) == {"spare.weight"}


def test_states_that_do_not_fit_are_refused_in_one_line() -> None:
    model, optimizer, _, decay = started(WAYS[0])
    with removed(decay):
        train(model, optimizer, 2)
        good = decay.state_dict()
        missing = [target for target in good["targets"] if target[0] != "head.weight"]
        resized = [["head.weight", [7, 32]] if name == "head.weight" else [name, s] for name, s in good["targets"]]
        bad: list[tuple[Any, str]] = [
            ({**good, "version": 99}, "version 99"),
            ({}, "not a decay state"),
            (None, "not a decay state"),
            ({**good, "settings": {**good["settings"], "strength": 0.5}}, "strength: 0.5 saved, 0.05 here"),
            ({**good, "targets": missing}, "head.weight"),
            ({**good, "targets": [*good["targets"], ["other.weight", [3, 3]]]}, "other.weight"),
            ({**good, "targets": resized}, "head.weight"),
        ]
        for state, words in bad:
            before = decay.state_dict()
            with pytest.raises(InputError, match=words) as caught:
                decay.load_state_dict(state)
            assert "\n" not in str(caught.value)
            assert decay.state_dict()["step_count"] == before["step_count"]
        decay.load_state_dict(good)
