"""The budget: how the loss changes by shrinking and by a step, against differences of the loss, and what follows."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from tests.blocks import Encoder, equal, fresh, removed, tokens, train, weights
from torch import Tensor, nn

from s2d.decay.budget import ENTRIES, Budget
from s2d.decay.closed_forms import shrink_rows, slope_rows
from s2d.decay.selection import Components
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_slope_is_the_derivative_of_the_loss_along_the_shrinking(power: float, offset: float) -> None:
    W = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(32, 4, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return torch.tanh(x @ (weight + offset).mT).square().sum()

    loss(W).backward()
    assert W.grad is not None
    components = Components(torch.tensor([1.5, 0.7], dtype=torch.float64), channels=torch.tensor([1, 4]))
    found = slope_rows(W.detach(), W.grad, components, power, offset)
    ends = []
    for amount in (1e-4, 0.0):
        shrunk = W.detach().clone()
        shrink_rows(shrunk, Components(components.S, channels=components.channels), amount, power, None, offset)
        ends.append(loss(shrunk).item())
    assert found.item() == pytest.approx((ends[0] - ends[1]) / 1e-4, rel=2e-3)


def test_the_pace_follows_the_change_of_the_loss_by_a_step() -> None:
    """A quadratic loss under SGD: how it changes along a step is known."""
    w = nn.Parameter(torch.tensor([4.0, -2.0]))
    optimizer = torch.optim.SGD([w], lr=0.1)
    budget = Budget(0.5, [optimizer], ())
    cost, kept = [1.0, 8.0, 0.25], []
    for due in cost:
        optimizer.zero_grad()
        w.square().sum().backward()
        budget.judge()
        budget.look()
        before = w.detach().clone()
        optimizer.step()
        budget.moved(optimizer, due)
        kept.append(abs(float((2 * w.detach() * (w.detach() - before)).sum())))
    optimizer.zero_grad()
    w.square().sum().backward()
    budget.judge()
    mean = [sum(0.8 ** (2 - n) * each for n, each in enumerate(row)) for row in (kept, cost)]
    assert budget.pace == pytest.approx(min(1.0, 0.5 * mean[0] / mean[1]), rel=1e-5) and budget.pace < 1


def test_large_weights_are_sampled_without_bias() -> None:
    w = nn.Parameter(torch.randn(300, 256) + torch.linspace(-1, 1, 256))  # columns differ
    assert w.numel() > 10 * ENTRIES
    optimizer = torch.optim.SGD([w], lr=1e-3)
    budget = Budget(1.0, [optimizer], ())
    w.square().sum().backward()
    budget.look()
    before = w.detach().clone()
    optimizer.step()
    budget.moved(optimizer, 1e9)
    exact = abs(float((w.grad * (w.detach() - before)).sum()))  # type: ignore[operator]
    budget.judge()
    assert budget.pace * 1e9 == pytest.approx(exact, rel=0.1)


def conditioned(lr: float, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, SelectiveSpectralDecay]:
    model = fresh(Encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return model, optimizer, SelectiveSpectralDecay(model, optimizer, outlier_ratio=2.0, refresh_every=2, **settings)


def test_small_rates_hold_the_decay_back_and_no_limit_does_not() -> None:
    paces, moved = {}, {}
    for name, lr, budget in (("usual", 1e-2, 0.1), ("small", 1e-6, 0.1), ("no limit", 1e-6, 0.0)):
        model, optimizer, decay = conditioned(lr, budget=budget)
        before = weights(model)
        with removed(decay):
            train(model, optimizer, 12)
            paces[name] = [row.get("pace", 1.0) for row in decay.history]
        after = weights(model)
        moved[name] = sum((after[key] - before[key]).square().sum().item() for key in before) ** 0.5
    assert paces["small"][0] == 1.0 and min(paces["small"]) < 0.01  # at first nothing is known
    assert min(paces["usual"]) > min(paces["small"])
    assert set(paces["no limit"]) == {1.0} and moved["small"] < moved["no limit"]


def test_the_budget_is_continued_bit_for_bit() -> None:
    """Between the step that is measured and the gradient that settles it, too."""
    straight = conditioned(1e-4, budget=0.05)
    with removed(straight[2]):
        train(straight[0], straight[1], 12)
        assert min(row["pace"] for row in straight[2].history) < 1
    for first in (5, 6):
        begun = conditioned(1e-4, budget=0.05)
        with removed(begun[2]):
            train(begun[0], begun[1], first)
            file = io.BytesIO()
            torch.save([each.state_dict() for each in begun], file)
        file.seek(0)
        rest = conditioned(1e-4, budget=0.05)
        for each, state in zip(rest, torch.load(file, weights_only=True), strict=True):
            each.load_state_dict(state)
        with removed(rest[2]):
            train(rest[0], rest[1], 12 - first, first=first)
            assert list(rest[2].history) == list(straight[2].history)
        assert equal(weights(rest[0]), weights(straight[0]))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_scaled_loss_changes_nothing(scale: float) -> None:
    """A scaler unscales before the optimizer's step; the decay must see the same."""
    plain, scaled = (conditioned(1e-4, budget=0.05) for _ in range(2))
    with removed(plain[2]), removed(scaled[2]):
        train(plain[0], plain[1], 8)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # type: ignore[attr-defined]
        for step in range(8):
            torch.manual_seed(step)
            scaled[1].zero_grad()
            labels = torch.randint(5, (4,), generator=torch.Generator().manual_seed(step))
            scaler.scale(nn.functional.cross_entropy(scaled[0](tokens(step)), labels)).backward()
            scaler.step(scaled[1])
            scaler.update()
        paces = [[row["pace"] for row in each[2].history] for each in (plain, scaled)]
        assert paces[0] == pytest.approx(paces[1], rel=1e-3)


def test_gradients_that_are_no_numbers_leave_the_pace() -> None:
    model, optimizer, decay = conditioned(1e-4, budget=0.05)
    with removed(decay):
        train(model, optimizer, 3)
        known = decay.pace
        model(tokens(0)).sum().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
        before = weights(model)
        optimizer.step()
        assert decay.pace == known
        model.load_state_dict(before)


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, "much", True])
def test_impossible_budgets_are_refused(wrong: Any) -> None:
    model = fresh(Encoder)
    with pytest.raises(InputError, match="budget="):
        SelectiveSpectralDecay(model, torch.optim.SGD(model.parameters(), lr=0.1), budget=wrong)
