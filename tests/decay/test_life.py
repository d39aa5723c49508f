"""The decay and what happens to a model around it: copies, freezing, schedules, half precision, transforms, order."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel

from s2d import SelectiveSpectralDecay
from s2d.errors import InputError

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).to(dtype)
    with torch.no_grad():
        made[0].weight[5] = 40.0  # type: ignore[operator]
    return made


def still(made: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    (made(x.to(next(made.parameters()).dtype)).float().sum() * 0).backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(made: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(made.parameters(), lr=lr)


def copies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(made: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda made: pickle.loads(pickle.dumps(made)),
        "torch.save": saved,
        "average": lambda made: AveragedModel(made).module,
    }


@pytest.mark.parametrize("metric", ["site", "data", "weight"])
@pytest.mark.parametrize("how", list(copies()))
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_copy_is_plain_and_the_original_goes_on(metric: Any, how: str, steps: int) -> None:
    made = model()
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, metric=metric, mode="decoupled", strength=0.05, outlier_ratio=2.0)
    for _ in range(steps):
        still(made, optimizer)
    other = copies()[how](made)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    kept = {name: value.clone() for name, value in other.state_dict().items()}
    other(X).sum().backward()
    before = made[0].weight[5].item()  # type: ignore[operator]
    still(made, optimizer)
    assert made[0].weight[5].item() == pytest.approx(before * math.exp(-0.05), rel=1e-5)  # type: ignore[operator]
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
    decay.remove()


def test_a_decay_itself_is_not_copied() -> None:
    made = model()
    with pytest.raises(InputError, match="state_dict"):
        copy.deepcopy(SelectiveSpectralDecay(made, sgd(made)))


def test_frozen_later_is_untouched_and_unfrozen_later_is_shrunk() -> None:
    made = model()
    optimizer = sgd(made)
    made[0].requires_grad_(False)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.05, outlier_ratio=2.0, refresh_every=2)
    for _ in range(4):
        still(made, optimizer)
    assert made[0].weight[5] == 40 and "frozen" in decay.skipped["0.weight"]  # type: ignore[operator]
    made[0].requires_grad_(True)
    for _ in range(4):
        still(made, optimizer)
    shrunk = made[0].weight[5].item()  # type: ignore[operator]
    assert shrunk < 37 and "0.weight" not in decay.skipped
    made[0].requires_grad_(False)
    for _ in range(4):
        still(made, optimizer)
    assert made[0].weight[5].item() == shrunk and "0.weight" in decay.skipped  # type: ignore[operator]
    decay.remove()


def test_a_parameter_put_in_later_is_followed_once_an_optimizer_holds_it() -> None:
    made = model()
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.05, outlier_ratio=2.0, refresh_every=2)
    still(made, optimizer)
    made[0].weight = nn.Parameter(made[0].weight.detach().clone())  # type: ignore[operator, union-attr]
    before = made[0].weight[5].item()  # type: ignore[operator]
    still(made, optimizer)
    still(made, optimizer)
    assert made[0].weight[5].item() == before and "no optimizer" in decay.skipped["0.weight"]  # type: ignore[operator]
    optimizer.add_param_group({"params": [made[0].weight]})
    for _ in range(4):
        still(made, optimizer)
    assert made[0].weight[5].item() < before - 1  # type: ignore[operator]
    decay.remove()


@pytest.mark.parametrize("metric", ["site", "data", "weight"])
def test_a_module_put_in_later_is_followed_once_an_optimizer_holds_it(metric: Any) -> None:
    made = model()
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, metric=metric, strength=0.05, outlier_ratio=2.0, refresh_every=2)
    still(made, optimizer)
    old = made[0]
    made[0] = copy.deepcopy(made[0])  # and a wider layer behind it
    made[1], made[3] = nn.Linear(64, 96), nn.Linear(96, 4)
    before = made[0].weight[5].item()  # type: ignore[operator]
    for _ in range(3):
        still(made, optimizer)
    assert made[0].weight[5].item() == before and "no optimizer" in decay.skipped["0.weight"]  # type: ignore[operator]
    optimizer.add_param_group({"params": list(made.parameters())})
    for _ in range(4):
        still(made, optimizer)
    assert made[0].weight[5].item() < before - 1 or metric != "site"  # type: ignore[operator]
    assert decay.targets and all(target.module in set(made.modules()) for target in decay.targets)
    last = old.weight[5].item()  # type: ignore[operator, union-attr]
    still(made, optimizer)
    assert old.weight[5].item() == last  # type: ignore[operator, union-attr]
    decay.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [0.0003, 0.001, 0.004])
def test_half_precision_shrinks_as_much_as_single(dtype: torch.dtype, strength: float) -> None:
    made = model(dtype)
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, strength=strength, outlier_ratio=2.0, refresh_every=50)
    steps = min(1000, round(1.0 / strength))
    for _ in range(steps):
        optimizer.step() if decay.selected and not decay._handles else still(made, optimizer)
    wanted = 40 * math.exp(-strength * steps)
    assert made[0].weight[5].item() == pytest.approx(wanted, rel=0.02)  # type: ignore[operator]
    decay.remove()


@pytest.mark.parametrize(("dtype", "strength"), [(torch.bfloat16, 3e-4), (torch.float16, 1e-4)])
def test_a_gain_in_half_precision_is_the_nearest_to_that_of_single(dtype: torch.dtype, strength: float) -> None:
    made = model(dtype)
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, strength=strength, outlier_ratio=2.0, refresh_every=100)
    for step in range(1, 200):
        still(made, optimizer)
        assert made[0].weight[5] == torch.tensor(40 * math.exp(-strength * step)).to(dtype), step  # type: ignore[operator]
    decay.remove()


def noam(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Vaswani et al., section 5.3, with 6 steps of warm-up; the optimizer's own rate is 1."""
    optimizer.param_groups[0]["lr"] = 1.0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 512**-0.5 * min((t + 1) ** -0.5, (t + 1) * 6**-1.5))


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD with a warm-up of five steps, as the paper has it: arXiv 2405.15682, equations 1 to 3."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0, "scheduled_lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        group["k"] += 1
        group["scheduled_lr"] = lr = group["lr"] * min(1.0, group["k"] / 5)
        for y in group["params"]:
            z = self.state[y].setdefault("z", y.clone())
            x = (y - 0.1 * z) / 0.9
            z -= lr * y.grad
            x.lerp_(z, 1 / group["k"])
            y.copy_(0.1 * z + 0.9 * x)

    @torch.no_grad()
    def eval(self) -> None:
        for y in self.param_groups[0]["params"]:
            y.copy_((y - 0.1 * self.state[y]["z"]) / 0.9)


def by_hand(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.1 * (step + 1) / 10


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 0.5, step_size_up=15, cycle_momentum=False), 0.5),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(5.0, (t + 1) / 2)), 0.5),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4), 0.1),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=10, cycle_momentum=False), 0.5),
        (noam, 512**-0.5 * 6**-0.5),
        (None, 0.1),
    ],
)
def test_the_strength_is_the_share_of_the_schedules_own_peak(schedule: Any, peak: float) -> None:
    made = model()
    optimizer = sgd(made)
    scheduler = None if schedule is None else schedule(optimizer)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.05, outlier_ratio=2.0)
    total = 0.0
    for step in range(8):
        if scheduler is None:
            by_hand(optimizer, step)
        total += optimizer.param_groups[0]["lr"] / peak
        still(made, optimizer)
        if scheduler is not None:
            scheduler.step()
    assert made[0].weight[5].item() == pytest.approx(40 * math.exp(-0.05 * total), rel=1e-5)  # type: ignore[operator]
    decay.remove()


def test_a_rate_that_rises_without_end_is_named() -> None:
    made = model()
    optimizer = sgd(made)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 4)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.05, outlier_ratio=2.0)
    with pytest.warns(UserWarning, match="still rises after 100,000 steps of its schedule"):
        still(made, optimizer)
    scheduler.step()
    still(made, optimizer)
    assert made[0].weight[5].item() == pytest.approx(40 * math.exp(-0.05 * 0.75), rel=1e-5)  # type: ignore[operator]
    decay.remove()


class Failing(torch.optim.SGD):
    """Calls its base class's step, which torch hooks as well once there is a plain SGD; its second step fails."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        found = super().step(closure)
        if self.calls == 2:
            raise RuntimeError("stop")
        return found


def test_a_step_within_a_step_counts_once_and_one_that_fails_ends() -> None:
    sgd(model())
    made = model()
    optimizer = Failing(made.parameters(), lr=0.1)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.05, outlier_ratio=2.0)
    for step in range(5):
        if step == 1:
            with pytest.raises(RuntimeError, match="stop") as kept:  # as a notebook keeps the last one
                still(made, optimizer)
        else:
            still(made, optimizer)
    assert decay.step_count == 4 and kept.tb is not None
    assert made[0].weight[5].item() == pytest.approx(40 * math.exp(-0.05 * 4), rel=1e-5)  # type: ignore[operator]
    decay.remove()


def test_a_schedule_free_optimizer_decays_all_its_sequences_in_its_own_warm_up() -> None:
    made = model()
    optimizer = ScheduleFree(made.parameters(), lr=0.1)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.05, outlier_ratio=2.0)
    for _ in range(8):
        still(made, optimizer)
    total = sum(min(1.0, step / 5) for step in range(1, 9))
    optimizer.eval()
    assert made[0].weight[5].item() == pytest.approx(40 * math.exp(-0.05 * total), rel=1e-5)  # type: ignore[operator]
    decay.remove()


class OffsetNorm(nn.Module):
    def __init__(self, width: int, offset: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.ones(width)) if bias else None
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize(("offset", "bias"), [(0.0, False), (1.0, True), (0.5, False), (-1.0, False)])
def test_what_a_norm_adds_to_its_gain_is_found(offset: float, bias: bool) -> None:
    made = nn.Sequential(OffsetNorm(16, offset, bias), nn.Linear(16, 16))
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.0)
    still(made, optimizer, X[:, :16])
    assert [target.offset for target in decay.targets if target.kind == "norm"] == [offset]
    decay.remove()


def test_a_norm_that_is_not_linear_in_its_weight_is_left_out_by_name() -> None:
    class Soft(OffsetNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight.exp()

    made = nn.Sequential(Soft(16, 0.0), nn.Linear(16, 16))
    made[0].__class__.__name__ = "SoftNorm"
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.1, outlier_ratio=1.0)
    still(made, optimizer, X[:, :16])
    assert "no linear function" in decay.skipped["0.weight"] and "0.weight" not in decay.selected
    decay.remove()


@pytest.mark.parametrize("gain", [-20.0, 20.0])
def test_the_gain_that_multiplies_shrinks(gain: float) -> None:
    made = nn.Sequential(OffsetNorm(64, 1.0), nn.Linear(64, 64))
    with torch.no_grad():
        made[0].weight[3] = gain - 1  # type: ignore[operator]
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.1, outlier_ratio=3.0)
    for _ in range(5):
        still(made, optimizer)
    assert 1 + made[0].weight[3].item() == pytest.approx(gain * math.exp(-0.5), rel=1e-4)  # type: ignore[operator]
    decay.remove()


@pytest.mark.parametrize("metric", ["site", "data", "weight"])
def test_transforms_of_functions_and_inference_mode_are_left_alone(metric: Any) -> None:
    made = model()
    decay = SelectiveSpectralDecay(made, sgd(made), metric=metric, mode="decoupled")
    weights = {name: value.detach() for name, value in made.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(made, weights, (x,)).square().sum()

    seen = vmap(grad(loss), (None, 0))(weights, X[:3])
    with torch.inference_mode():
        made(X)
    decay.remove()
    plain = vmap(grad(loss), (None, 0))(weights, X[:3])
    assert all(torch.equal(seen[name], plain[name]) for name in plain) and not decay._ran


def test_two_decays_on_compiled_models_bring_compilation_back() -> None:
    pairs = [(m := torch.compile(model(), backend="eager"), sgd(m)) for _ in range(2)]
    decays = [SelectiveSpectralDecay(m, o) for m, o in pairs]
    assert eval_frame._stance.stance == "force_eager"
    for made, optimizer in pairs:
        still(made, optimizer)
    assert eval_frame._stance.stance == "default"
    for decay in decays:
        decay.remove()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(model() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum((self.parts[index](x) for index in self.chosen), x.new_zeros(()))  # type: ignore[operator]

    chosen: tuple[int, ...] = (0,)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_what_runs_later_is_conditioned_then_and_listed_until(first: int) -> None:
    made = Experts()
    optimizer = sgd(made)
    decay = SelectiveSpectralDecay(made, optimizer, strength=0.05, outlier_ratio=4.0, refresh_every=2)
    made.chosen = (first,)
    still(made, optimizer)
    others = [index for index in range(3) if index != first]
    assert all("not called" in decay.skipped[f"parts.{index}.0.weight"] for index in others)
    made.chosen = (0, 1, 2)
    for _ in range(7):
        still(made, optimizer)
    assert not decay.skipped
    assert all(made.parts[index][0].weight[5] < 35 for index in range(3))  # type: ignore[operator, index]
    decay.remove()


def freeze(made: nn.Module, on: bool) -> None:
    made[0].requires_grad_(not on)  # type: ignore[operator]


def retied(made: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    made[3].weight = made[1].weight  # type: ignore[operator, union-attr]


def untied(made: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    made[3].weight = nn.Parameter(made[1].weight.detach().clone())  # type: ignore[operator, union-attr]
    optimizer.add_param_group({"params": [made[3].weight]})  # type: ignore[operator]


def transformed(made: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights = {name: value.detach() for name, value in made.named_parameters()}
    x = X[:3].to(weights["0.weight"].dtype)
    vmap(grad(lambda w, row: functional_call(made, w, (row,)).square().sum()), (None, 0))(weights, x)


def inferred(made: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.inference_mode():
        made(X.to(next(made.parameters()).dtype))


EVENTS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "step": still,
    "freeze": lambda made, _: freeze(made, True),
    "unfreeze": lambda made, _: freeze(made, False),
    "retie": retied,
    "untie": untied,
    "replace": lambda made, _: made.__setitem__(1, copy.deepcopy(made[1])),
    "evaluate": lambda made, _: made.eval()(X.to(next(made.parameters()).dtype)),
    "transform": transformed,
    "infer": inferred,
    "double": lambda made, _: made.double(),
    "half": lambda made, _: made.bfloat16(),
    **{name: lambda made, _, how=how: how(made.train()) for name, how in copies().items()},
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(list(EVENTS)), max_size=8), st.sampled_from(["site", "data", "weight"]))
def test_whatever_happens_to_a_model_it_and_its_copies_stay_plain(events: list[str], metric: Any) -> None:
    made = model()
    made[3] = nn.Linear(64, 64)
    optimizer, kept, names = sgd(made), [], list(made.state_dict())
    decay = SelectiveSpectralDecay(made, optimizer, metric=metric, strength=0.05, outlier_ratio=2.0, refresh_every=2)
    for event in events:
        found = EVENTS[event](made, optimizer)
        if event in copies():
            kept.append((found, {name: value.clone() for name, value in found.state_dict().items()}))
    decay.remove()
    steps = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    assert not steps and decay.step_count == events.count("step")
    for each in (made, *(other for other, _ in kept)):
        assert type(each) is nn.Sequential and list(each.state_dict()) == names
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in each.modules())
        assert bool(each(X.to(next(each.parameters()).dtype)).isfinite().all())
    assert all(torch.equal(value, before[name]) for other, before in kept for name, value in other.state_dict().items())
    if "freeze" in events and "step" not in events[: events.index("freeze")] and "unfreeze" not in events:
        assert made[0].weight[5] == 40  # type: ignore[operator]


def test_a_computed_weight_is_listed_and_what_it_is_computed_from_is_not_called_experts() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1), dim=2), nn.Linear(8, 8))
    decay = SelectiveSpectralDecay(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert decay.skipped == {
        "0.weight": "computed from other parameters (parametrized, weight norm, pruned); remove that first"
    }
