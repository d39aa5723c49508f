"""What holds for every rival: it acts, it continues bit for bit, it leaves no trace, it refuses what cannot be."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.blocks import CLASSES, Encoder, equal, fresh, hooks_of, tokens, weights
from torch import nn

from s2d.baselines import attach, baselines, create, settings_of
from s2d.baselines.base import REGISTERED, Baseline
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError

# Strong enough to show within a few steps of a small random model, which has no outliers.
EAGER: dict[str, dict[str, Any]] = {
    "clip": {"limit": 1.2},
    "nuclear": {"every": 2},
    "random-directions": {"outlier_ratio": 1.5, "refresh_every": 2},
}
NAMES = sorted(baselines())


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


def made(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Baseline:
    return create(name, model, optimizer, seed=3, **EAGER.get(name, {}))


def steps(model: nn.Module, optimizer: Any, scheduler: Any, rival: Baseline | None, numbers: range) -> None:
    for number in numbers:
        labels = torch.randint(CLASSES, (4,), generator=torch.Generator().manual_seed(number))
        loss = F.cross_entropy(model(tokens(number)), labels)
        added = None if rival is None else rival.loss()
        optimizer.zero_grad()
        (loss if added is None else loss + added).backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", NAMES)
def test_it_acts_and_leaves_no_trace(name: str) -> None:
    model, plain = fresh(Encoder), fresh(Encoder)
    optimizer, scheduler = optimizer_of(model)
    before, keys = hooks_of(model, optimizer), list(model.state_dict())
    rival = made(name, model, optimizer)
    steps(model, optimizer, scheduler, rival, range(4))
    steps(plain, *optimizer_of(plain), None, range(4))
    assert not equal(weights(model), weights(plain)), "it made no difference"
    assert all(p.isfinite().all() for p in model.parameters())
    rival.remove()
    assert hooks_of(model, optimizer) == before
    assert list(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter for p in model.parameters())
    after = weights(model)
    model(tokens(9)).sum().backward()
    assert equal(weights(model), after)


@pytest.mark.parametrize("name", NAMES)
def test_a_continuation_is_bit_exact(name: str) -> None:
    whole = fresh(Encoder)
    optimizer, scheduler = optimizer_of(whole)
    steps(whole, optimizer, scheduler, made(name, whole, optimizer), range(6))

    first = fresh(Encoder)
    optimizer, scheduler = optimizer_of(first)
    rival = made(name, first, optimizer)
    steps(first, optimizer, scheduler, rival, range(3))
    saved = copy.deepcopy([each.state_dict() for each in (first, optimizer, scheduler, rival)])

    second = fresh(Encoder, seed=1)
    optimizer, scheduler = optimizer_of(second)
    rival = made(name, second, optimizer)
    for each, state in zip((second, optimizer, scheduler, rival), saved, strict=True):
        each.load_state_dict(state)
    steps(second, optimizer, scheduler, rival, range(3, 6))
    assert equal(weights(second), weights(whole))


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_between_two_steps_plays_no_part(name: str) -> None:
    models = [fresh(Encoder), fresh(Encoder)]
    for evaluated, model in enumerate(models):
        optimizer, scheduler = optimizer_of(model)
        rival = made(name, model, optimizer)
        for number in range(4):
            if evaluated:
                with torch.no_grad():
                    model.eval()(tokens(100))
                model.train()
            steps(model, optimizer, scheduler, rival, range(number, number + 1))
    assert equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("name", NAMES)
def test_each_number_has_bounds_and_each_name_close_ones(name: str) -> None:
    assert settings_of({"baseline": name})["baseline"] == name
    for field in fields(REGISTERED.all()[name].Settings):
        for wrong in (-1.0, math.nan, "many"):
            with pytest.raises(InputError, match=field.name):
                settings_of({"baseline": name, field.name: wrong})
        with pytest.raises(InputError, match=rf"{name} has no setting '{field.name}x'; did you mean {field.name}"):
            settings_of({"baseline": name, f"{field.name}x": 1.0})


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_act_on_is_one_clear_line(name: str) -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)).requires_grad_(False)
    with pytest.raises(InputError) as caught:
        create(name, model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert "\n" not in str(caught.value)


def test_an_unknown_one_lists_close_names() -> None:
    with pytest.raises(InputError, match=r"no baseline 'twoe'; did you mean tweo\?"):
        settings_of({"baseline": "twoe"})
    with pytest.raises(InputError, match="no baseline 3; choose from clip"):
        settings_of({"baseline": 3})


def test_an_arm_without_a_baseline_is_spectral_decay() -> None:
    model = fresh(Encoder)
    optimizer, _ = optimizer_of(model)
    decay = attach(model, optimizer, {"strength": 0.3})
    assert isinstance(decay, SelectiveSpectralDecay) and decay.settings.strength == 0.3
    decay.remove()
    assert isinstance(attach(model, optimizer, {"baseline": "l2", "strength": 0.3}), Baseline)


def test_each_says_what_it_is_in_one_line() -> None:
    for name, line in baselines().items():
        assert 20 < len(line) < 110 and line.endswith("."), name
