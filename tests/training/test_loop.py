"""Fine-tuning: the schedule, the batches, and that stopping and continuing changes nothing at all."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_text import equal
from torch import nn

from s2d.errors import InputError
from s2d.models import Loaded
from s2d.tasks import Task
from s2d.training.batching import training_batches
from s2d.training.early_stopping import EarlyStopping
from s2d.training.loop import parameter_groups, schedule, train, without_dropout
from s2d.training.precision import faster
from s2d.training.state import read_state
from s2d.training.train_settings import TrainSettings

pytest.importorskip("accelerate")
SETTINGS = TrainSettings(steps=8, batch_size=8, lr=1e-3, head_lr=1e-2)
DECAYS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {"refresh_every": 3, "outlier_ratio": 1.5, "threshold": 0.1},
    "paper": {"preset": "paper", "refresh_every": 3, "threshold": 0.1},
    "data": {"metric": "data", "refresh_every": 3, "outlier_ratio": 1.5, "threshold": 0.1},
    "penalty": {"baseline": "tweo", "weight": 0.1},
    "control": {"baseline": "random-directions", "refresh_every": 3, "outlier_ratio": 1.5},
}


# -- schedule, groups, batches -----------------------------------------------------------------------------------------


def test_the_rate_rises_and_falls_linearly() -> None:
    rates = [schedule(step, 20, 0.25) for step in range(20)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    falls = [a - b for a, b in zip(rates[5:], rates[6:], strict=False)]
    assert falls == pytest.approx([1 / 15] * 14)
    assert rates[-1] == pytest.approx(1 / 15)
    assert schedule(20, 20, 0.25) == 0.0
    assert schedule(0, 5, 0.0) == 1.0


def test_new_parts_have_their_own_rate_and_vectors_no_weight_decay(loaded: Loaded, task: Task) -> None:
    model = task.build(loaded)
    groups = parameter_groups(model, TrainSettings(lr=1e-4, head_lr=1e-2, weight_decay=0.1))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate = 1e-4 if name.startswith("encoder.") else 1e-2
        assert found[id(parameter)] == (rate, 0.1 if parameter.ndim > 1 else 0.0), name


def test_an_epoch_holds_every_example_once_and_little_padding(task: Task) -> None:
    def epoch(settings: TrainSettings, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        stream = training_batches(task, settings, seed)
        whole, rest = divmod(task.sizes()["train"], settings.batch_size)
        return [next(stream) for _ in range(whole + bool(rest and settings.group_by_length))]

    grouped, plain = (epoch(SETTINGS.model_copy(update={"group_by_length": on})) for on in (True, False))
    whole = next(task.batches("train", batch_size=1000))
    rows = {
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(whole["input_ids"], whole["attention_mask"], strict=True)
    }
    total = task.sizes()["train"]
    for batches, count in ((grouped, total), (plain, total // 8 * 8)):
        seen = [
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert len(seen) == count and set(seen) <= rows
        assert len(set(seen)) >= 0.9 * len(seen)  # a few of the made-up sentences are equal
        assert all(int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1] for batch in batches)
    padding = [sum(int((1 - batch["attention_mask"]).sum()) for batch in batches) for batches in (grouped, plain)]
    assert padding[0] < 0.4 * padding[1]
    assert not all(torch.equal(a["labels"], b["labels"]) for a, b in zip(grouped, epoch(SETTINGS, seed=1), strict=True))


def test_dropout_is_off_within_and_back_afterwards(loaded: Loaded, task: Task) -> None:
    model = task.build(loaded)
    batch = next(task.batches("train", batch_size=4))
    with without_dropout(model):
        assert torch.equal(task.loss(model, batch), task.loss(model, batch))
    assert not torch.equal(task.loss(model, batch), task.loss(model, batch))


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_learns_and_leaves_nothing_behind(loaded: Loaded, task: Task) -> None:
    model = task.build(loaded)
    random_state = torch.get_rng_state()
    done = train(model, task, TrainSettings(steps=60, batch_size=16, lr=1e-2), decay=DECAYS["default"])
    assert task.evaluate(model)["accuracy"] >= 80 > task.evaluate(task.build(loaded).eval())["accuracy"]
    assert done.steps == len(done.losses) == 60 and done.losses[-1] < done.losses[0] and done.seconds > 0
    assert {"step", "weight", "selected"} <= done.history[0].keys()
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_minutes_end_a_training_and_its_schedule(loaded: Loaded, task: Task) -> None:
    settings = TrainSettings(steps=1_000_000, minutes=0.01, batch_size=4, warmup=0.5)
    done = train(task.build(loaded), task, settings)
    assert 0.6 <= done.seconds < 5 and 2 <= done.steps < 1000
    assert train(task.build(loaded), task, TrainSettings(steps=2, minutes=5.0, batch_size=4)).steps == 2


def test_a_seed_repeats_exactly_and_another_differs(loaded: Loaded, task: Task) -> None:
    def trained(seed: int) -> nn.Module:
        model = task.build(loaded, 0)
        train(model, task, SETTINGS.model_copy(update={"dropout": True}), seed=seed)
        return model

    first = trained(1)
    assert equal(first, trained(1)) and not equal(first, trained(2))


def test_the_decay_changes_the_weights_and_no_strength_does_not(loaded: Loaded, task: Task) -> None:
    models = []
    for decay in (None, {**(DECAYS["default"] or {}), "strength": 0.0}, DECAYS["default"]):
        models.append(task.build(loaded))
        train(models[-1], task, SETTINGS, decay=decay)
    assert equal(models[0], models[1]) and not equal(models[0], models[2])


class Crash(Exception):
    """The machine goes down."""


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
@pytest.mark.parametrize("stop", [3, 5])
def test_a_killed_run_continues_bit_identical(
    loaded: Loaded, task: Task, tmp_path: Path, decay: dict[str, Any] | None, stop: int
) -> None:
    settings = SETTINGS.model_copy(update={"dropout": True, "save_every": 0.0})
    straight = task.build(loaded)
    whole = train(straight, task, settings, seed=3, decay=decay)

    def crash(step: int, loss: float) -> None:
        if step == stop:  # the last state on the disk is of one step earlier
            raise Crash

    state = tmp_path / "state.pt"
    with pytest.raises(Crash):
        train(task.build(loaded), task, settings, seed=3, decay=decay, state=state, on_step=crash)
    assert read_state(state)["step"] == stop - 1
    torch.rand(7)  # the global random state plays no part
    steps: list[int] = []
    continued = task.build(loaded)
    rest = train(
        continued, task, settings, seed=3, decay=decay, state=state, on_step=lambda step, loss: steps.append(step)
    )
    assert steps == list(range(stop, 9))
    assert equal(straight, continued)
    assert rest.losses == whole.losses and rest.history == whole.history
    again = task.build(loaded)  # a finished state gives the finished model
    assert train(again, task, settings, seed=3, decay=decay, state=state).losses == whole.losses
    assert equal(straight, again)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_that_ran(loaded: Loaded, task: Task, tmp_path: Path, number: signal.Signals) -> None:
    straight, state = task.build(loaded), tmp_path / "deep" / "state.pt"
    train(straight, task, SETTINGS)
    before = signal.getsignal(number)

    def press(step: int, loss: float) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        train(task.build(loaded), task, SETTINGS, state=state, on_step=press)
    assert signal.getsignal(number) is before
    assert read_state(state)["step"] == 4
    assert [file.name for file in state.parent.iterdir()] == ["state.pt"]
    continued = task.build(loaded)
    train(continued, task, SETTINGS, state=state)
    assert equal(straight, continued)


def test_half_precision_leaves_the_weights_in_fp32(loaded: Loaded, task: Task) -> None:
    losses = []
    for precision in ("fp32", "bf16", "fp32"):
        model = task.build(loaded)
        losses.append(train(model, task, SETTINGS.model_copy(update={"precision": precision})).losses)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("supported", [True, False])
def test_emulated_bfloat16_is_told(
    loaded: Loaded, task: Task, supported: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("s2d.training.precision._multiplies_bfloat16", lambda: supported)
    for precision in ("fp32", "bf16"):
        train(task.build(loaded), task, SETTINGS.model_copy(update={"precision": precision, "steps": 1}))
        told = [str(each.message) for each in recwarn.list if "bfloat16" in str(each.message)]
        assert len(told) == (precision == "bf16" and not supported)


def test_auto_takes_one_precision_and_keeps_it_on_another_machine(
    loaded: Loaded, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = SETTINGS.model_copy(update={"precision": "auto", "save_every": 0.0})
    chosen = faster(torch.device("cpu"))
    straight, state = task.build(loaded), tmp_path / "state.pt"
    whole = train(straight, task, SETTINGS.model_copy(update={"precision": chosen}))

    def crash(step: int, loss: float) -> None:
        if step == 4:
            raise Crash

    with pytest.raises(Crash):
        train(task.build(loaded), task, auto, state=state, on_step=crash)
    monkeypatch.setattr("s2d.training.precision.speedup", lambda *_: 0.1 if chosen == "bf16" else 10.0)
    continued = task.build(loaded)
    rest = train(continued, task, auto, state=state)
    assert (rest.precision, rest.losses) == (chosen, whole.losses) and equal(straight, continued)
    assert train(task.build(loaded), task, auto).precision != chosen


def test_the_faster_precision_is_the_one_that_multiplies_faster() -> None:
    """Against products without a gradient, of another size; where the two are close nothing is claimed."""
    x, found = torch.ones(1024, 1024), []
    for half in (x, x.bfloat16()):
        half @ half
        started = time.perf_counter()
        half @ half
        found.append(time.perf_counter() - started)
    if not 0.5 < found[0] / found[1] < 2:
        assert faster(torch.device("cpu")) == ("bf16" if found[1] < found[0] else "fp32")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_state_of_other_settings_is_refused(loaded: Loaded, task: Task, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    train(task.build(loaded), task, SETTINGS, state=state)
    for change in ({"seed": 1}, {"decay": {}}, {"settings": SETTINGS.model_copy(update={"lr": 2e-3})}):
        with pytest.raises(InputError, match="other settings"):
            train(task.build(loaded), task, **{"settings": SETTINGS, "state": state, **change})


def test_damaged_and_dangerous_states_are_refused(loaded: Loaded, task: Task, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "attacked"),))

    state = tmp_path / "state.pt"
    train(task.build(loaded), task, SETTINGS, state=state)
    whole = state.read_bytes()
    for content in (whole[: len(whole) // 2], b"", pickle.dumps(Attack(), protocol=2)):
        state.write_bytes(content)
        with pytest.raises(InputError, match=r"state\.pt is damaged"):
            train(task.build(loaded), task, SETTINGS, state=state)
    torch.save({"attack": Attack()}, state)
    with pytest.raises(InputError, match=r"state\.pt is damaged"):
        read_state(state)
    assert not (tmp_path / "attacked").exists()


def spoil(monkeypatch: pytest.MonkeyPatch, task: Task, factors: dict[int, float], *, gradient: bool = False) -> None:
    """Multiply the losses (or only the gradients) of some steps, counted over all trainings from now on."""
    right, step = type(task).loss, 0

    def loss(self: Task, model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal step
        step += 1
        value, factor = right(self, model, batch), factors.get(step, 1.0)
        if not gradient:
            return value * factor
        value = value.clone()
        value.register_hook(lambda grad: grad * factor)
        return value

    monkeypatch.setattr(type(task), "loss", loss)


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.filterwarnings("ignore:step", "ignore:Detected call of .lr_scheduler")
def test_a_step_that_is_no_number_is_skipped_and_told(
    loaded: Loaded,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decay: dict[str, Any] | None,
    gradient: bool,
) -> None:
    nan = float("nan")
    settings = SETTINGS.model_copy(update={"save_every": 0.0})
    with monkeypatch.context() as patch:
        spoil(patch, task, {1: nan, 4: float("inf")}, gradient=gradient)  # 1 and 4 are steps that the decay looks at
        straight = task.build(loaded)
        whole = train(straight, task, settings, decay=decay)
    assert [skip["step"] for skip in whole.skipped] == [1, 4] and whole.steps == 8
    assert ("gradient's norm" if gradient else "the loss is nan") in whole.skipped[0]["reason"]
    assert all(torch.isfinite(tensor).all() for tensor in straight.state_dict().values())
    assert not equal(straight, task.build(loaded)), "the other steps were taken"

    def crash(step: int, loss: float) -> None:
        if step == 6:  # the state on the disk is of step 5; the decay's refresh waits for a step that counts
            raise Crash

    state, continued = tmp_path / "state.pt", task.build(loaded)
    with monkeypatch.context() as patch:
        spoil(patch, task, {1: nan, 4: float("inf")}, gradient=gradient)
        with pytest.raises(Crash):
            train(task.build(loaded), task, settings, decay=decay, state=state, on_step=crash)
    rest = train(continued, task, settings, decay=decay, state=state)
    assert equal(straight, continued)
    assert rest.skipped == whole.skipped and rest.history == whole.history


def test_a_spike_is_skipped_where_that_is_asked_for(
    loaded: Loaded, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"steps": 20, "spike": 50.0})
    spoil(monkeypatch, task, {18: 1e4, 38: 1e4}, gradient=True)
    with pytest.warns(UserWarning, match=r"step 18 was skipped: the gradient's norm is .* times the usual"):
        assert [skip["step"] for skip in train(task.build(loaded), task, settings).skipped] == [18]
    assert train(task.build(loaded), task, settings.model_copy(update={"spike": 0.0})).skipped == []


@pytest.mark.filterwarnings("ignore:step", "ignore:Detected call of .lr_scheduler")
def test_divergence_says_so(loaded: Loaded, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, task, dict.fromkeys(range(3, 99), float("nan")))
    with pytest.raises(
        InputError, match=r"loss is nan at step 8, and the 5 steps .* diverged; lower train\.lr \(0\.001\)"
    ):
        train(task.build(loaded), task, SETTINGS)
    with pytest.raises(InputError, match="training diverged"):
        train(task.build(loaded), task, SETTINGS.model_copy(update={"steps": 2}))


def test_a_full_disk_loses_nothing(loaded: Loaded, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state.pt"

    def crash(step: int, loss: float) -> None:
        if step == 3:
            raise Crash

    settings = SETTINGS.model_copy(update={"save_every": 0.0})
    with pytest.raises(Crash):
        train(task.build(loaded), task, settings, state=state, on_step=crash)
    before = state.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device; nothing was changed there"):
            train(task.build(loaded), task, settings, state=state)
    assert state.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    train(task.build(loaded), task, settings, state=state)


def test_a_model_without_trainable_weights_is_refused(loaded: Loaded, task: Task) -> None:
    with pytest.raises(InputError, match="no trainable weights"):
        train(task.build(loaded).requires_grad_(False), task, SETTINGS)


@torch.no_grad()
def features(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval().encoder(**inputs).last_hidden_state  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("decay", [None, DECAYS["default"]])
def test_distillation_keeps_the_features_near_the_original(
    loaded: Loaded, task: Task, decay: dict[str, Any] | None
) -> None:
    inputs = task.inputs(next(task.batches("train", batch_size=32)))[0]
    moved = []
    for weight in (0.0, 20.0):
        model = task.build(loaded)
        before = features(model, inputs)
        train(model, task, SETTINGS.model_copy(update={"distill": weight}), decay=decay)
        moved.append((features(model, inputs) - before).square().mean().item())
        assert not any(module._forward_hooks for module in model.modules())
    assert moved[1] < 0.7 * moved[0]


def test_the_model_is_kept_along_the_way_and_ends_the_same(loaded: Loaded, task: Task) -> None:
    plain, kept = task.build(loaded), task.build(loaded)
    train(plain, task, SETTINGS)
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def keep(step: int) -> None:
        assert not kept.training
        seen[step] = {name: tensor.clone() for name, tensor in kept.state_dict().items()}

    train(kept, task, SETTINGS.model_copy(update={"checkpoints": (1, SETTINGS.steps)}), on_checkpoint=keep)
    assert list(seen) == [1, SETTINGS.steps]
    last = plain.state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in seen[SETTINGS.steps].items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in seen[1].items())


def test_distillation_leaves_no_hooks_behind_when_the_decay_is_refused(loaded: Loaded, task: Task) -> None:
    model = task.build(loaded)
    with pytest.raises(InputError):
        train(model, task, SETTINGS.model_copy(update={"distill": 1.0}), decay={"strength": -1.0})
    assert not any(module._forward_hooks for module in model.modules())


# -- held-out checks ---------------------------------------------------------------------------------------------------


class Scripted:
    """A measure that was written down beforehand."""

    primary = "drift"
    higher_is_better = False

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def evaluate(self, model: nn.Module, split: str, batch_size: int) -> dict[str, float]:
        assert split == "validation"
        return {"drift": next(self.values)}


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([3, 2, 1, 2, 1.5], 5),  # two checks without a new best
        ([1, 2, 1, 9], 3),  # an equal one is none
        ([1, 2, 0.5, 2, 3], 5),
        ([5, float("nan"), float("inf"), 1], 3),
        ([3, 2.5, 2, 1.5, 1], None),
    ],
)
def test_patience_ends_with_the_second_check_that_is_no_better(values: list[float], ends: int | None) -> None:
    held_out = EarlyStopping(Scripted(values), every=4, patience=2, batch_size=1)  # pyright: ignore[reportArgumentType]
    model = nn.Linear(1, 1)
    for step in range(1, 4 * len(values) + 1):
        held_out.look(model, step)
        if held_out.spent:
            assert ends is not None and step == 4 * ends
            break
    else:
        assert ends is None
    assert [check["step"] for check in held_out.checks] == [4 * i for i in range(1, (ends or len(values)) + 1)]


def test_a_training_ends_early_and_continues_with_its_checks(loaded: Loaded, task: Task, tmp_path: Path) -> None:
    hopeless = SETTINGS.model_copy(update={"steps": 50, "lr": 1e-9, "head_lr": 1e-9, "check_every": 2, "patience": 2})
    done = train(task.build(loaded), task, hopeless)
    assert (done.stopped_early, done.steps, [check["step"] for check in done.checks]) == (True, 6, [2, 4, 6])
    path = tmp_path / "state.pt"

    def stop(step: int, loss: float) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(task.build(loaded), task, hopeless, state=path, on_step=stop)
    again = train(task.build(loaded), task, hopeless, state=path)
    assert (again.checks, again.losses) == (done.checks, done.losses)


def test_looking_at_held_out_data_changes_nothing(loaded: Loaded, task: Task) -> None:
    models = [task.build(loaded) for _ in range(2)]
    for model, every in zip(models, (0, 3), strict=True):
        train(model, task, SETTINGS.model_copy(update={"check_every": every}), decay=DECAYS["default"])
    assert equal(models[0], models[1])


def test_patience_without_checks_is_refused() -> None:
    with pytest.raises(ValueError, match="patience=3 counts checks, and there are none; set check_every too"):
        TrainSettings(patience=3)
