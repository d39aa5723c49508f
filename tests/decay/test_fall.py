"""A fall: after the run the selected value is divided by the wanted factor, whatever the length and the schedule."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tests.blocks import Two, equal, removed, spiked, weights
from torch import Tensor, nn

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError

PAPER: dict[str, Any] = {"preset": "paper", "threshold": 0.0, "max_rank": 1, "refresh_every": 5}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def run(
    optimizer: str, lr: float, steps: int, shape: str, loss_scale: float = 1.0, **settings: Any
) -> tuple[list[float], list[float], SelectiveSpectralDecay]:
    """Two layers with one large singular value, under a loss without direction: their largest before and after."""
    model = Two(nn.Linear(20, 24), nn.Linear(24, 8))
    with torch.no_grad():
        for layer, sigma in ((model.first, 6.0), (model.second, 3.0)):
            layer.weight.copy_(spiked(*layer.weight.shape, [sigma]))  # type: ignore[arg-type, operator, union-attr]
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=lr)
    lambdas = {"linear": lambda s: min((s + 1) / 5, (steps - s) / steps), "constant": lambda s: 1.0}
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambdas[shape]) if shape in lambdas else None
    before = largest(model)
    with removed(SelectiveSpectralDecay(model, made, total_steps=steps, **PAPER | settings)) as decay:
        for _ in range(steps):
            (loss_scale * (model(torch.randn(30, 20)) * torch.randn(8)).mean()).backward()
            made.step()
            made.zero_grad()
            if schedule is not None:
                schedule.step()
    return before, largest(model), decay


def largest(model: nn.Module) -> list[float]:
    return [float(torch.linalg.matrix_norm(w.detach(), 2)) for w in model.parameters() if w.ndim == 2]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("steps", "shape"), [(40, "linear"), (120, "linear"), (40, "constant"), (40, "none")])
def test_decoupled_the_law_is_solved_for_any_length_and_schedule(power: float, steps: int, shape: str) -> None:
    before, after, _ = run("SGD", 1e-30, steps, shape, mode="decoupled", power=power, fall=2.0)
    assert after == pytest.approx([value / 2 for value in before], rel=2e-3)


@pytest.mark.parametrize(("optimizer", "lr", "scale"), [("SGD", 0.05, 10.0), ("AdamW", 1e-2, 1e-2)])
def test_coupled_the_strength_is_steered_to_the_same_end(optimizer: str, lr: float, scale: float) -> None:
    """What a fixed strength does depends on the optimizer and on the size of the loss."""
    before, after, decay = run(optimizer, lr, 300, "linear", scale, fall=2.0)
    assert after == pytest.approx([value / 2 for value in before], rel=0.1)
    strengths = [row["strength"] for row in decay.history if row["weight"] == "first.weight"]
    assert len(set(strengths)) > 2
    fixed = run(optimizer, lr, 300, "linear", scale)[1]
    assert abs(2 * fixed[0] / before[0] - 1) > 0.15, "a fixed strength ends elsewhere"


def test_a_coupled_penalty_is_at_most_as_long_as_the_gradient_of_the_loss() -> None:
    """A factor that cannot be reached: the penalty's gradient grows to the loss's gradient and stays there."""
    model = nn.Linear(16, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    lengths = []
    settings: dict[str, Any] = PAPER | {"refresh_every": 1, "fall": 1e6}
    with removed(SelectiveSpectralDecay(model, optimizer, total_steps=400, **settings)):
        for _ in range(60):
            model(torch.randn(30, 16)).square().mean().backward()
            of_loss = weight_gradient(model).clone()
            optimizer.step()
            lengths.append(float((weight_gradient(model) - of_loss).norm() / of_loss.norm()))
            optimizer.zero_grad()
    assert max(lengths) == pytest.approx(1.0, abs=1e-3) and lengths[-1] > 0.99


def weight_gradient(model: nn.Linear) -> Tensor:
    assert model.weight.grad is not None
    return model.weight.grad


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_it_continues_bit_for_bit(mode: Any) -> None:
    def started() -> tuple[nn.Module, torch.optim.Optimizer, Any, SelectiveSpectralDecay]:
        torch.manual_seed(1)
        model = Two(nn.Linear(20, 24), nn.Linear(24, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)  # known from the present step on only
        settings = PAPER | {"mode": mode, "fall": 2.0, "total_steps": 24}
        return model, optimizer, schedule, SelectiveSpectralDecay(model, optimizer, **settings)

    def go(parts: Any, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            parts[0](torch.randn(30, 20)).square().mean().backward()
            parts[1].step()
            parts[1].zero_grad()
            parts[2].step()

    whole, part, rest = started(), started(), started()
    with removed(whole[3]), removed(part[3]), removed(rest[3]):
        go(whole, 0, 24)
        go(part, 0, 13)
        file = io.BytesIO()
        torch.save([each.state_dict() for each in part], file)
        file.seek(0)
        for each, state in zip(rest, torch.load(file, weights_only=True), strict=True):
            each.load_state_dict(state)
        go(rest, 13, 24)
        assert equal(weights(rest[0]), weights(whole[0]))
        assert list(rest[3].history) == list(whole[3].history)


def test_the_length_of_the_run_is_needed() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for steps in (None, 0, "many"):
        with pytest.raises(InputError, match="total_steps=N"):
            SelectiveSpectralDecay(model, optimizer, preset="paper", fall=2.0, total_steps=steps)  # type: ignore[arg-type]


def test_a_weight_in_the_place_of_another_begins_its_own_course() -> None:
    """A module is exchanged before the last refreshes: its value falls from its own, not from the old one's."""
    model = Two(nn.Linear(20, 24), nn.Linear(24, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    settings: dict[str, Any] = PAPER | {"mode": "decoupled", "power": 2.0, "fall": 2.0}
    with removed(SelectiveSpectralDecay(model, optimizer, total_steps=40, **settings)) as decay:

        def steps(count: int) -> None:
            for _ in range(count):
                model(torch.randn(30, 20)).sum().backward()
                optimizer.step()

        steps(10)
        model.first = nn.Linear(20, 24)
        with torch.no_grad():
            model.first.weight.copy_(spiked(24, 20, [9.0]))
        optimizer.add_param_group({"params": list(model.first.parameters())})
        before = largest(model)[0]
        steps(20)
        strength = next(row["strength"] for row in reversed(decay.history) if row["weight"] == "first.weight")
    assert strength == pytest.approx(1 / (before * 40), rel=1e-2), "lambda sigma N = 2 - 1 for n = 2"
