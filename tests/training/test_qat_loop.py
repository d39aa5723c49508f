"""Quantization-aware training of a task's model: alone, continued, with decay, and as a part of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_text import equal, make_data, make_model, make_texts
from torch import nn

from s2d import checkpoint, quant
from s2d.errors import InputError
from s2d.experiments import runner
from s2d.experiments.recipe import Recipe, make_recipe
from s2d.experiments.runner import Runner
from s2d.models import Loaded
from s2d.tasks import Task, create
from s2d.tasks.evaluation import evaluate
from s2d.training.loop import train
from s2d.training.qat_loop import QATSettings, train_quantized
from s2d.training.state import read_state
from s2d.training.train_settings import TrainSettings

pytest.importorskip("accelerate")
SETTINGS = TrainSettings(steps=8, batch_size=8, lr=1e-3, save_every=0.0)
EVERYTHING = QATSettings(step_lr=1e-2, warmup=0.25, freeze=0.25, oscillation=True)
DECAY: dict[str, Any] = {"refresh_every": 2, "outlier_ratio": 1.2, "strength": 0.1}


@pytest.fixture(scope="module")
def trained(loaded: Loaded, task: Task) -> nn.Module:
    model = task.build(loaded)
    train(model, task, TrainSettings(steps=60, batch_size=16, lr=1e-2))
    return model


def calibration(task: Task) -> list[dict[str, torch.Tensor]]:
    return task.inputs(next(task.batches("train", batch_size=32)))


def test_it_beats_rounding_at_few_bits(trained: nn.Module, task: Task, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    rounded = quant.quantize(trained, "w2a2", calibration=calibration(task), observer="mse")
    settings = TrainSettings(steps=60, batch_size=16, lr=5e-3)
    model, done = train_quantized(trained, task, "w2a2", settings, calibration=calibration(task))
    batch = next(task.batches("train", batch_size=120))
    with torch.no_grad():
        assert task.loss(model, batch) < 0.5 * task.loss(rounded, batch)
    assert done.steps == 60 and done.losses[-1] < done.losses[0] and not model.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert not any(module._forward_hooks for part in (trained, model) for module in part.modules())
    quant.save(model, tmp_path)
    restored = quant.load(tmp_path, trained)
    assert task.evaluate(restored) == task.evaluate(model)


class Crash(Exception):
    pass


@pytest.mark.parametrize("decay", [None, DECAY], ids=["alone", "with decay"])
def test_continuing_changes_nothing_at_all(
    trained: nn.Module, task: Task, tmp_path: Path, decay: dict[str, Any] | None
) -> None:
    def go(**more: Any) -> nn.Module:
        data = calibration(task)
        return train_quantized(trained, task, "w4a4", SETTINGS, EVERYTHING, calibration=data, decay=decay, **more)[0]

    straight = go()
    for stop in (2, 5, 7):  # during the warm-up; with everything quantized; with the ranges held
        state = tmp_path / f"{stop}.pt"

        def crash(step: int, loss: float, stop: int = stop) -> None:
            if step == stop:
                raise Crash

        with pytest.raises(Crash):
            go(state=state, on_step=crash)
        assert read_state(state)["step"] == stop - 1
        assert equal(go(state=state), straight)


def test_decay_acts_on_the_quantized_model(trained: nn.Module, task: Task) -> None:
    runs = [
        train_quantized(trained, task, "w4a4", SETTINGS, calibration=calibration(task), decay=decay)
        for decay in (None, DECAY)
    ]
    assert not runs[0][1].history and runs[1][1].history
    assert not equal(runs[0][0], runs[1][0])


def test_a_state_of_other_settings_is_refused(trained: nn.Module, task: Task, tmp_path: Path) -> None:
    state, data = tmp_path / "state.pt", calibration(task)
    train_quantized(trained, task, "w4a4", SETTINGS, calibration=data, state=state)
    for spec, qat in (("w4a4", QATSettings(freeze=0.5)), ("w3a3", QATSettings())):
        with pytest.raises(InputError, match="other settings"):
            train_quantized(trained, task, spec, SETTINGS, qat, calibration=data, state=state)


@pytest.mark.parametrize("method", ["rotation+gptq", "smoothquant"])
def test_it_starts_where_a_method_ends(trained: nn.Module, task: Task, tmp_path: Path, method: str) -> None:
    data = calibration(task)
    rounded = quant.quantize(trained, "w3a3", calibration=data, method=method)
    settings = TrainSettings(steps=40, batch_size=16, lr=2e-3)
    model, _ = train_quantized(trained, task, "w3a3", settings, QATSettings(method=method), calibration=data)
    batch = next(task.batches("train", batch_size=120))
    with torch.no_grad():
        assert task.loss(model, batch) < 0.8 * task.loss(rounded, batch)
    assert {type(module) for module in model.modules()} == {type(module) for module in rounded.modules()}
    quant.save(model, tmp_path)
    assert task.evaluate(quant.load(tmp_path, trained)) == task.evaluate(model)


# -- in a recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("inputs")
    return make_recipe(
        {
            "model": str(make_model(place / "bert")),
            "task": {"name": "text-classification", "data": str(make_data(place / "words")), "max_length": 24},
            "train": {"steps": 4, "batch_size": 16, "lr": 1e-3},
            "arms": {"adamw": None, "s2d": {"refresh_every": 2, "outlier_ratio": 1.5}},
            "quantize": {"specs": ["w4a4"], "observers": ["minmax"], "calibration": {"samples": 24}},
            "qat": {"specs": ["w4a4", "w3a3"], "steps": 3, "lr": 1e-4, "decay": True},
            "audit": False,
        }
    )


def test_every_arm_and_width_is_a_record_and_computed_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Runner("tiny", recipe, tmp_path).run()
    records = [record for record in results["records"] if record["method"] == "qat"]
    assert [(r["conditioning"], r["spec"], r["metric"]) for r in records] == [
        (arm, spec, "accuracy") for arm in ("adamw", "s2d") for spec in ("w4a4", "w3a3")
    ]
    assert all(0 <= r["value"] <= 100 and r["seconds"] > 0 for r in records)
    assert not list(tmp_path.rglob("*.pt"))
    task = create(recipe.task.name, **recipe.task.options)
    for record in records:  # the trained models are kept: what s2d evaluate and s2d export read
        (folder,) = (tmp_path / "qat").glob(f"{record['conditioning']}-0-{record['spec']}-qat-*")
        kept = checkpoint.load(folder)
        task.prepare(kept)
        found = evaluate(kept.model, task, split=recipe.split, batch_size=recipe.batch_size)
        assert found["accuracy"] == record["value"]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(runner, "train_quantized", refuse)
    again = Runner("tiny", recipe, tmp_path).run()
    assert again["records"] == results["records"]
    wider = make_recipe(recipe.model_dump(), ["qat.steps=4"])
    with pytest.raises(AssertionError, match="computed again"):
        Runner("tiny", wider, tmp_path).run()


def test_the_published_model_is_trained_too(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "model": str(make_model(tmp_path / "bert")),
            "task": {"name": "unlabelled-text", "data": str(make_texts(tmp_path / "texts.txt", 256)), "max_length": 16},
            "train": {"batch_size": 16},
            "arms": {"none": None},
            "quantize": {"specs": ["fp32"], "calibration": {"samples": 24}},
            "qat": {"specs": ["w4a4"], "steps": 2, "method": "rotation", "distill": 0},
            "audit": False,
        }
    )
    records = Runner("tiny", recipe, tmp_path / "run").run()["records"]
    assert {(r["conditioning"], r["spec"], r["method"]) for r in records} == {
        ("none", "fp32", "none"),
        ("none", "w4a4", "qat"),
    }
    assert all(0 <= r["value"] <= 100.01 for r in records if r["metric"] == "cosine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("qat.specs=[w9a4]", "9 bits is not possible"),
        ("qat.specs=[]", "qat.specs"),
        ("qat.stepps=3", r"unknown key qat\.stepps; did you mean steps"),
        ("qat.freeze=2", r"qat\.freeze=2"),
        ("qat.step_lr=0", r"qat\.step_lr=0"),
        ("qat.method=rotatoin", "unknown quantization method 'rotatoin'; choose from"),
    ],
)
def test_what_cannot_be_is_refused(recipe: Recipe, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe(recipe.model_dump(), [override])
