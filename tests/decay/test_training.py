"""The decay in real training loops: accumulation, scalers, precision, schedules, several optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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
    gain,
    normed,
    removed,
    sgd,
    still_step,
    tokens,
    weights,
)
from torch import Tensor, nn

from s2d.decay.spectral_decay import SelectiveSpectralDecay


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# -- passes per step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_all_passes_of_an_accumulated_step_are_looked_at(way: dict[str, Any]) -> None:
    """The outlier is in one of three micro-batches."""
    way = {**way, "outlier_ratio": 5.0, "kinds": ("linear", "norm")}
    for loud in range(3):
        model = normed({})
        optimizer = sgd(model)
        with removed(SelectiveSpectralDecay(model, optimizer, strength=0.01, threshold=0.05, **way)) as decay:
            for micro in range(3):
                x = X.clone()
                x[0, 5] = 1000 if micro == loud else 0
                (model(x) * 0).sum().backward()
            optimizer.step()
            assert decay.selected.get("first.weight") == 1 and decay.step_count == 1


def test_accumulated_passes_add_up_to_the_whole_batch() -> None:
    ratios = []
    for parts in (1, 4):
        model = normed()
        optimizer = sgd(model)
        with deciding(model, optimizer) as decay:
            for x in X.chunk(parts):
                (model(x) * 0).sum().backward()
            optimizer.step()
            ratios.append(decay.history[0]["outlier_ratio"])
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)


def test_evaluations_between_two_steps_are_not_looked_at() -> None:
    model = normed({})
    optimizer = sgd(model)
    loud = X.clone()
    loud[0, 5] = 1000
    with deciding(model, optimizer) as decay:
        model(X).sum().backward()
        model.eval()
        with torch.no_grad():
            model(loud)
        with torch.inference_mode():
            model(loud)
        model.train()
        optimizer.step()
        assert decay.selected == {} and decay.history[0]["outlier_ratio"] < 5


def test_a_model_may_train_in_evaluation_mode() -> None:
    model = normed().eval()
    optimizer = sgd(model)
    with deciding(model, optimizer) as decay:
        still_step(model, optimizer, X)
        assert decay.selected == {"first.weight": 1}
    half = Two(normed().eval(), nn.Linear(6, 6)).train()
    half.first.eval()  # no dropout in the encoder, as some recipes have it; the head in training mode
    optimizer = sgd(half)
    with deciding(half, optimizer) as decay:
        still_step(half, optimizer, X)
        assert "first.first.weight" in decay.selected


def test_a_copy_of_the_model_reports_to_nobody() -> None:
    model = normed({})
    optimizer = sgd(model)
    with deciding(model, optimizer) as decay:
        average = copy.deepcopy(model)
        loud = X.clone()
        loud[0, 5] = 1000
        average(loud)
        still_step(model, optimizer, X)
        assert decay.selected == {}


# -- scalers and precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("metric", ["site", "weight"])
def test_a_step_that_the_scaler_skips_is_no_step(fused: bool, metric: Any) -> None:
    model = normed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with deciding(model, optimizer, metric=metric, kinds=("linear", "norm"), refresh_every=2) as decay:

        def step(gradient: float, x: Tensor = X) -> None:
            optimizer.zero_grad()
            scaler.scale((model(x) * 0).sum()).backward()
            assert model.second.weight.grad is not None
            model.second.weight.grad[0, 0] = gradient  # type: ignore[index, operator]
            scaler.step(optimizer)
            scaler.update()

        for count in range(4):
            before, old = weights(model), gain(model)
            step(math.inf)
            assert equal(weights(model), before) and decay.step_count == count
            overflowed = X.clone()
            overflowed[3] = math.inf
            step(math.nan, overflowed)
            assert equal(weights(model), before) and decay.step_count == count
            step(0.0)
            assert decay.step_count == count + 1
            assert gain(model) == pytest.approx(old * math.exp(-0.05), rel=1e-5)
        assert [r["step"] for r in decay.history if r["weight"] == "first.weight"] == [0, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_is_not_scaled_with_the_loss(fused: bool) -> None:
    """Adam's first step is blind to scale; SGD is not."""
    after = []
    for scale in (None, 1024.0):
        model = normed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
        with deciding(model, optimizer, metric="weight", mode="coupled", power=2.0, kinds=("norm",)):
            loss = (model(X) * 0).sum()
            if scale is None:
                loss.backward()
                optimizer.step()
            else:
                scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
        after.append(gain(model))
    assert after == pytest.approx([40 - 0.01 * 0.05 * 1600] * 2, rel=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_autocast_changes_nothing_of_what_is_selected(way: dict[str, Any]) -> None:
    chosen = []
    for half in (False, True):
        model = fresh(Encoder)
        with torch.no_grad():
            model.get_submodule("blocks.0.mlp.fc1").weight[7] *= 60  # type: ignore[index, operator]
        optimizer = sgd(model)
        way = {**way, "outlier_ratio": 7.0, "kinds": ("linear", "norm")}
        with removed(SelectiveSpectralDecay(model, optimizer, threshold=0.3, strength=1e-3, **way)) as decay:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                still_step(model, optimizer, tokens(0, 8, 16))  # the step as well, as some loops do
            chosen.append((decay.selected, [r["sigma"] for r in decay.history]))
            assert all(c.U is None or c.U.dtype == torch.float32 for c in decay._metric.selected.values())
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(model).values())
    assert chosen[0][0] == chosen[1][0] and chosen[0][0]
    for full, low in zip(chosen[0][1], chosen[1][1], strict=True):
        assert low == pytest.approx(full, rel=0.05)


def test_half_precision_weights_are_conditioned() -> None:
    model = normed().bfloat16()
    optimizer = sgd(model)
    with deciding(model, optimizer, strength=0.5):
        still_step(model, optimizer, X.bfloat16())
    assert gain(model) == pytest.approx(40 * math.exp(-0.5), rel=0.01)


# -- schedules and groups ----------------------------------------------------------------------------------------------


def test_every_group_has_its_own_schedule() -> None:
    model = nn.ModuleList([normed(), normed()])
    optimizer = torch.optim.SGD([{"params": part.parameters(), "lr": 10.0**-i} for i, part in enumerate(model)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda step: 1 / (1 + step)])
    with deciding(model, optimizer) as decay:
        for _ in range(3):
            optimizer.zero_grad()
            sum((part(X) * 0).sum() for part in model).backward()  # type: ignore[union-attr]
            optimizer.step()
            scheduler.step()
        assert decay.step_count == 3
    assert gain(model[0]) == pytest.approx(40 * math.exp(-0.05 * 3), rel=1e-5)
    assert gain(model[1]) == pytest.approx(40 * math.exp(-0.05 * (1 + 1 / 2 + 1 / 3)), rel=1e-5)


def one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4) * (1 - step / 10))


@pytest.mark.parametrize(("build", "peak"), [(one_cycle, 0.1), (warm_up, 0.07)])  # 0.1 is never reached by the second
def test_the_decay_is_the_share_of_the_peak_learning_rate(
    build: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], peak: float
) -> None:
    model = normed()
    optimizer = sgd(model)
    scheduler = build(optimizer)
    total = 0.0
    with deciding(model, optimizer):
        for _ in range(8):
            total += optimizer.param_groups[0]["lr"] / peak
            still_step(model, optimizer, X)
            scheduler.step()
    assert gain(model) == pytest.approx(40 * math.exp(-0.05 * total), rel=1e-5)


def test_the_peak_is_known_although_nothing_was_selected_at_it() -> None:
    """A hand-written schedule; the outlier appears when the rate has fallen."""
    model = normed({})
    optimizer = sgd(model)
    with deciding(model, optimizer):
        for rate in (0.1, 0.025):
            optimizer.param_groups[0]["lr"] = rate
            still_step(model, optimizer, X)
            if rate == 0.1:
                with torch.no_grad():
                    model.first.weight[5] = 40  # type: ignore[index, operator]
    assert gain(model) == pytest.approx(40 * math.exp(-0.05 * 0.25), rel=1e-5)


def test_a_learning_rate_of_zero_stops_the_decay() -> None:
    model = normed()
    with deciding(model, optimizer := sgd(model, lr=0.0)):
        still_step(model, optimizer, X)
    assert gain(model) == 40


def test_several_optimizers_step_once_together() -> None:
    model = nn.ModuleList([normed(), normed()])
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[1].parameters(), lr=0.1)]
    with deciding(model, optimizers, refresh_every=2) as decay:
        for count in range(3):
            for each in optimizers:
                each.zero_grad()
            sum((part(X) * 0).sum() for part in model).backward()  # type: ignore[union-attr]
            optimizers[0].step()
            assert decay.step_count == count
            assert gain(model[0]) == pytest.approx(40 * math.exp(-0.05 * (count + 1)), rel=1e-5)
            optimizers[1].step()
            assert decay.step_count == count + 1
        assert decay.selected == {"0.first.weight": 1, "1.first.weight": 1}
    assert gain(model[1]) == pytest.approx(40 * (math.exp(-0.05) * (1 - 0.1 * 0.01)) ** 3, rel=1e-4)


def test_an_optimizer_that_calls_back_is_followed() -> None:
    """L-BFGS does, and Lightning passes a closure to every optimizer: forward and backward run inside the step."""
    for as_keyword in (False, True):
        for coupled in (False, True):
            model = normed()
            optimizer = sgd(model, lr=0.01)
            settings: dict[str, Any] = {"metric": "weight", "mode": "coupled", "power": 2.0} if coupled else {}
            with deciding(model, optimizer, kinds=("linear", "norm"), **settings) as decay:

                def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = (model(X) * 0).sum()
                    loss.backward()
                    return loss

                result = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
                assert isinstance(result, Tensor) and result.item() == 0
                assert "first.weight" in decay.selected and decay.step_count == 1
            expected = 40 - 0.01 * 0.05 * 1600 if coupled else 40 * math.exp(-0.05)
            assert gain(model) == pytest.approx(expected, rel=1e-5)
    model = normed()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)
    with deciding(model, lbfgs) as decay:
        lbfgs.step(lambda: (lbfgs.zero_grad(), loss := model(X).square().mean(), loss.backward(), loss)[-1])  # type: ignore[arg-type]
        assert decay.selected == {"first.weight": 1}


def test_the_optimizer_of_accelerate_is_looked_into() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = normed()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    with deciding(model, optimizer) as decay:
        accelerator.backward((prepared(X) * 0).sum())
        optimizer.step()
        assert decay.step_count == 1
    assert gain(model) == pytest.approx(40 * math.exp(-0.05), rel=1e-5)
