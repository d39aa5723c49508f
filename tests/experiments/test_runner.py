"""Running a recipe on a tiny model: fair arms, plain records, and nothing computed twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_text import make_data, make_model

from s2d.errors import InputError
from s2d.experiments import runner
from s2d.experiments.recipe import Recipe, make_recipe
from s2d.experiments.runner import Runner
from s2d.io.files import read_json
from s2d.tasks import create
from s2d.tasks.base import calibration_inputs

pytest.importorskip("accelerate")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("inputs")
    return {
        "model": str(make_model(place / "bert")),
        "task": {"name": "text-classification", "data": str(make_data(place / "words")), "max_length": 24},
        "train": {"steps": 6, "batch_size": 16, "lr": 1e-3, "head_lr": 1e-2},
        "arms": {"adamw": None, "s2d": {"refresh_every": 2, "outlier_ratio": 1.5}},
        "quantize": {"specs": ["fp32", "w4a4"], "observers": ["minmax", "mse"], "calibration": {"samples": 24}},
    }


def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each expensive function of the runner is called from now on."""
    calls: dict[str, int] = dict.fromkeys(("train", "evaluate", "audit"), 0)

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(runner, name, counting(name, getattr(runner, name)))
    return calls


def values(results: dict[str, Any]) -> list[Any]:
    return [
        (r["conditioning"], r["seed"], r["spec"], r["observer"], r["metric"], r["value"]) for r in results["records"]
    ]


@pytest.fixture(scope="module")
def done(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, dict[str, Any]]:
    recipe, folder = make_recipe(content), tmp_path_factory.mktemp("run") / "first"
    return recipe, folder, Runner("tiny", recipe, folder).run()


def test_records_say_everything(done: tuple[Recipe, Path, dict[str, Any]]) -> None:
    _, folder, results = done
    assert [(r["conditioning"], r["spec"], r["observer"]) for r in results["records"]] == [
        (arm, spec, observer)
        for arm in ("adamw", "s2d")
        for spec, observer in (("fp32", ""), ("w4a4", "minmax"), ("w4a4", "mse"))
    ]
    for record in results["records"]:
        assert record["task"] == "words" and record["metric"] == "accuracy" and record["higher_is_better"] is True
        assert record["method"] == ("none" if record["spec"] == "fp32" else "rtn")
        assert 0 <= record["value"] <= 100 and record["seconds"] > 0 and record["peak_mb"] > 0
        assert (record["seed"], record["split"]) == (0, "test")
    assert set(results["audits"]) == {"none", "adamw", "s2d"}
    assert all(audit["kind"] == "audit" and audit["records"] for audit in results["audits"].values())
    assert {"step", "weight", "sigma", "selected"} <= results["history"][0].keys()
    about = results["run"]
    assert {"versions", "machine", "command", "started", "data_hash", "model_fingerprint", "settings"} <= about.keys()
    assert about["settings"]["arms"]["s2d"]["strength"] > 0, "defaults are written out"
    assert json.loads((folder / "results.json").read_text())["records"] == results["records"]
    assert "<html" in (folder / "report.html").read_text()


def test_both_arms_start_alike_and_see_the_same_batches(done: tuple[Recipe, Path, dict[str, Any]]) -> None:
    _, folder, _ = done
    losses = [read_json(path)["losses"] for path in sorted(folder.glob("arms/*/training.json"))]
    assert len(losses) == 2 and losses[0][0] == losses[1][0]
    assert losses[0] != losses[1]
    assert not list(folder.glob("arms/*/state.pt"))


def test_nothing_is_computed_twice(done: tuple[Recipe, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folder, results = done
    cards = {path: path.read_text() for path in folder.glob("arms/*/model/README.md")}
    calls = count(monkeypatch)
    again = Runner("tiny", recipe, folder).run()
    assert calls == {"train": 0, "evaluate": 0, "audit": 0}
    assert again["records"] == results["records"] and again["audits"] == results["audits"]
    assert len(cards) == 2 and all(path.read_text() == text for path, text in cards.items())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("split=validation", {"train": 0, "evaluate": 6, "audit": 0}),
        ("quantize.observers=[minmax,percentile]", {"train": 0, "evaluate": 2, "audit": 0}),
        ("quantize.specs=[fp32,w8a8]", {"train": 0, "evaluate": 4, "audit": 0}),
        ("arms.s2d.strength=0.2", {"train": 1, "evaluate": 3, "audit": 1}),
        ("train.lr=2e-3", {"train": 2, "evaluate": 6, "audit": 2}),
        ("train.save_every=7", {"train": 0, "evaluate": 0, "audit": 0}),
    ],
)
def test_a_change_costs_what_depends_on_it(
    done: tuple[Recipe, Path, dict[str, Any]],
    content: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    expected: dict[str, int],
) -> None:
    calls = count(monkeypatch)
    Runner("tiny", make_recipe(content, [change]), done[1]).run()
    assert calls == expected


def test_an_interrupted_run_continues_where_it_was(
    done: tuple[Recipe, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, straight = done
    real = runner.evaluate
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second arm's second cell
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Runner("tiny", recipe, tmp_path).run()
    partial = read_json(tmp_path / "results.json")
    assert len(partial["records"]) == 3, "the finished arm can be read already"
    counted = count(monkeypatch)
    assert values(Runner("tiny", recipe, tmp_path).run()) == values(straight)
    assert counted == {"train": 0, "evaluate": 2, "audit": 1}


@pytest.mark.parametrize(
    ("start", "listed"),
    [("decay", runner._DECAY), ("training", (*runner._TRAINING, *runner._DECAY)), ("audit", runner._AUDITING)],
)
def test_no_room_that_a_stage_runs_through_is_forgotten(start: str, listed: tuple[str, ...]) -> None:
    package = Path(runner.__file__).parent.parent
    # What a stage finds does not depend on these: errors, optional packages, registers, files on the disk,
    # checkpoints (their fingerprint counts).
    elsewhere = {"errors", "optional", "registry", "io", "models"}
    seen, pending = set(), [start]
    while pending:
        room = pending.pop()
        seen.add(room)
        folder = package / room
        for file in folder.rglob("*.py") if folder.is_dir() else [package / f"{room}.py"]:
            found = set(re.findall(r"^\s*from s2d\.(\w+)[\w.]* import", file.read_text(), flags=re.MULTILINE))
            pending += found - seen - elsewhere - set(pending)
    assert seen <= {name.removesuffix(".py").partition("/")[0] for name in listed}


def test_the_untrained_arm_and_several_seeds(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(content, ["arms={adamw: null}", "seeds=[0,1]", "audit=false", "quantize.specs=[fp32]"])
    results = Runner("tiny", recipe, tmp_path).run()
    assert [record["seed"] for record in results["records"]] == [0, 1]
    with pytest.raises(InputError, match="has no trained head for task text-classification"):
        Runner("tiny", make_recipe(content, ["arms.none=null"]), tmp_path)


def test_a_run_far_from_the_known_score_stops(content: dict[str, Any], tmp_path: Path) -> None:
    shared = ["arms={adamw: null}", "audit=false", "train.steps=1", "quantize.specs=[fp32]"]
    near = [*shared, "reference={arm: adamw, score: 50, within: 50}"]  # whatever it is
    found = Runner("tiny", make_recipe(content, near), tmp_path).run()["records"][0]["value"]
    far = [*shared, f"reference={{arm: adamw, score: {found + 1}, within: 0.5}}"]
    with pytest.raises(InputError, match=rf"accuracy {found:.2f} in full precision, but .* is known of it"):
        Runner("tiny", make_recipe(content, far), tmp_path).run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("task.name=docstring", "unknown task 'docstring'; did you mean docstrings"),
        ("task.data=nowhere", "no folder or file 'nowhere'"),
        ("task.max_lenght=9", "has no option 'max_lenght'"),
        ("task.max_length=64", "max_length is 64, but .* has only 32 positions"),
        ("model=nothing-like-it.safetensors", "no folder or file"),
        ("arms.s2d.include=encoder.layer.9.*", "no weight of the model matches"),
        ("arms.s2d.max_rank=99", "max_rank=99 exceeds the rank"),
        ("quantize.specs=[{base: w4a4, overrides: {nothing: keep}}]", "override 'nothing' matches no site"),
        ("device=gpu", "device 'gpu' cannot be used"),
    ],
)
def test_what_does_not_fit_shows_before_any_work(
    content: dict[str, Any], tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Runner("tiny", make_recipe(content, [change]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_calibration_takes_as_many_examples_as_asked_for(content: dict[str, Any], done: Any) -> None:
    from s2d.models import load

    options = {name: value for name, value in content["task"].items() if name != "name"}
    task = create("text-classification", **options)
    task.prepare(load(content["model"]))
    inputs = calibration_inputs(task, 50, 16, seed=1)
    assert [len(call["input_ids"]) for call in inputs] == [16, 16, 16, 2]
    everything = calibration_inputs(task, 10_000, 64, seed=1)
    assert sum(len(call["input_ids"]) for call in everything) == task.sizes()["train"]
