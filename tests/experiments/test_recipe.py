"""Recipes: read, overridden, refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2d.decay.settings import PRESETS
from s2d.errors import InputError
from s2d.experiments.recipe import arm_settings, decay_settings, make_recipe, read_recipe
from s2d.experiments.recipe_files import packaged, read_text

SMALL = {"model": "some-model", "task": {"name": "docstrings"}}


@pytest.mark.parametrize("name", [name for name in packaged() if name.startswith("minilm")])
def test_packaged_recipes_are_whole_and_compare_fairly(name: str) -> None:
    found, recipe = read_recipe(name)
    assert found == name and recipe.about == packaged()[name]
    assert recipe.arms["adamw"] is None
    # With the default limit min-max ranges lose in the demo's short training (docs/results/minilm.md).
    own = {"outlier_ratio": 8} if name == "minilm-demo" else {}
    assert recipe.arms["s2d"] == own, "the library's defaults, no numbers of its own"
    widths = ["fp32", "w4a4"] if name == "minilm-demo" else ["fp32", "w8a8", "w6a6", "w4a4"]  # five minutes are short
    assert recipe.quantize.specs == widths
    assert recipe.quantize.observers == ["minmax", "percentile", "mse"]
    assert recipe.split == "test"


def test_the_demonstration_and_the_intents_are_there() -> None:
    assert {"minilm-demo", "minilm-docstrings", "minilm-banking77", "minilm-sst2"} <= packaged().keys()
    assert read_recipe("minilm-demo")[1].task.options["test"] >= 500
    intents = read_recipe("minilm-banking77")[1]
    assert (intents.seeds, intents.train.steps, intents.train.batch_size) == ([0, 1, 2], 280, 64)
    assert (intents.train.lr, intents.train.head_lr) == (2e-4, 2e-3)
    assert intents.task.options["data"] == "../shared/data/banking77" and intents.task.label == "banking77"


def test_overrides_reach_every_depth_and_leave_the_rest() -> None:
    overrides = [
        "train.steps=7",
        "train.lr=1e-4",
        "seeds=[3,4]",
        "arms.s2d.strength=2e-2",
        "arms.other={preset: paper}",
    ]
    recipe = read_recipe("minilm-docstrings", [*overrides, "quantize.calibration.samples=16", "task.test=50"])[1]
    plain = read_recipe("minilm-docstrings")[1]
    assert (recipe.train.steps, recipe.train.lr) == (7, 1e-4)
    assert recipe.train.batch_size == plain.train.batch_size and recipe.model == plain.model
    assert recipe.seeds == [3, 4] and recipe.quantize.calibration.samples == 16
    assert recipe.arms == {"adamw": None, "s2d": {"strength": 0.02}, "other": {"preset": "paper"}}
    assert recipe.task.options == {**plain.task.options, "test": 50}
    assert plain.arms["s2d"] == {}


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(read_text("minilm-sst2")[1].replace("steps: 280", "steps: 5"))
    name, recipe = read_recipe(str(file))
    assert name == "mine" and recipe.train.steps == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", r"unknown key train\.step; did you mean steps\?"),
        ("trian.steps=5", r"unknown key trian; did you mean train\?"),
        ("quantize.calibration.sample=5", r"unknown key quantize\.calibration\.sample; did you mean samples\?"),
        ("train.steps=0", r"train\.steps=0: input should be greater than or equal to 1"),
        ("train.steps=many", r"train\.steps='many': input should be a valid integer"),
        ("train.lr=.nan", r"train\.lr=nan: input should be a finite number"),
        ("train.warmup=1", r"train\.warmup=1"),
        ("train.precision=int8", r"train\.precision='int8'"),
        ("split=tset", r"split='tset': input should be 'train', 'validation' or 'test'"),
        ("seeds=[0,0]", r"seeds: seeds must be different whole numbers"),
        ("seeds=[]", r"seeds=\[\]"),
        ("quantize.specs=[w4a4,w1a4]", r"quantize\.specs: spec 'w1a4': 1 bits is not possible"),
        ("quantize.observers=[max]", r"quantize\.observers: unknown observer 'max'"),
        ("quantize.methods=[gptx]", r"quantize\.methods: unknown quantization method 'gptx'"),
        ("arms.s2d.treshold=0.5", r"arms: the decay has no setting 'treshold'; did you mean threshold\?"),
        ("arms.s2d.threshold=1.5", r"arms: threshold=1\.5 is out of range; it must be between 0 and 1"),
        ("arms.s2d.strength=-1", r"arms: strength=-1 is out of range"),
        ("arms.s2d.preset=papre", r"arms: preset='papre' is unknown; choose from default, paper"),
        ("arms.s2d.model=x", r"arms: the decay has no setting 'model'"),
        ("arms.tweo={baseline: twoe}", r"arms: there is no baseline 'twoe'; did you mean tweo\?"),
        (
            "arms.tweo={baseline: tweo, wieght: 1}",
            r"arms: the baseline tweo has no setting 'wieght'; did you mean weight",
        ),
        ("arms.tweo={baseline: tweo, weight: -1}", r"arms: weight=-1 is out of range"),
        ("arms.none={}", r"arms: the arm 'none' is the model as it is"),
        ("arms={'a/b': null}", r"arms: an arm's name holds letters"),
        ("arms={}", r"arms=\{\}"),
        ("reference={score: 60}", r"reference\.arm='none' is no arm; adamw, s2d are"),
        ("reference={score: 60, arm: s2d, within: 0}", r"reference\.within=0: input should be greater than 0"),
        ("steps", r"write key=value"),
        ("=5", r"write key=value"),
        ("model.name=x", r"model is a single value"),
        ("train.steps=[1", r"the value is not YAML"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_recipe("minilm-docstrings", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "line 1 is not YAML"),
        ("- a\n- b\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("task: {name: docstrings}", "model is missing"),
        ("model: x", "task is missing"),
        ("model: !!python/object/apply:os.getcwd []\ntask: {name: docstrings}", "is not YAML"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(str(file))


def test_unknown_names_list_close_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe 'minilm-docstring'; did you mean minilm-docstrings"):
        read_recipe("minilm-docstring")
    with pytest.raises(InputError, match=r"cannot read the recipe .*nothing\.yaml: No such file"):
        read_recipe(str(tmp_path / "nothing.yaml"))


def test_arms_stand_for_settings_of_the_decay() -> None:
    assert decay_settings({}) == PRESETS["default"]
    assert decay_settings({"preset": "paper", "include": "*.fc2"}) == PRESETS["paper"]
    assert decay_settings({"strength": 0.5, "kinds": ["norm"]}).kinds == ("norm",)
    assert make_recipe(SMALL).arms == {"adamw": None, "s2d": {}}


def test_an_arm_can_name_a_rival() -> None:
    recipe = make_recipe(SMALL, ["arms.tweo={baseline: tweo, weight: 0.5}"])
    assert recipe.arms["tweo"] == {"baseline": "tweo", "weight": 0.5}
    whole = arm_settings({"baseline": "tweo", "weight": 0.5})
    assert whole == {"baseline": "tweo", "weight": 0.5, "tau": 3.0, "power": 4.0, "at": "blocks"}
    assert arm_settings({"strength": 0.5})["outlier_ratio"] == PRESETS["default"].outlier_ratio
