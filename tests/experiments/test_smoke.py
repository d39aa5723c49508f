"""Every packaged recipe that can be tried out runs from end to end on a tiny model, offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2d.errors import InputError
from s2d.experiments.recipe import Recipe, read_recipe
from s2d.experiments.recipe_files import packaged
from s2d.experiments.records import spec_name
from s2d.experiments.runner import Runner
from s2d.experiments.smoke import smoke_test

pytest.importorskip("PIL")
pytest.importorskip("transformers")
pytest.importorskip("jinja2")
TRIED = [name for name in packaged() if read_recipe(name)[1].smoke is not None]


def short(name: str) -> Recipe:
    """A recipe with its first and its last bit width alone, and with one of the quantized trainings, for time."""
    full = read_recipe(name)[1]
    specs = json.dumps([full.quantize.specs[0], full.quantize.specs[-1]])
    less = [f"quantize.specs={specs}", "quantize.observers=[mse]"]
    return read_recipe(name, less if full.qat is None else [*less, f"qat.specs=[{full.qat.specs[0]}]"])[1]


def different() -> list[str]:
    """Recipes without those that differ from a later one by data, numbers and an untrained arm alone."""
    seen: dict[str, str] = {}
    for name in TRIED:
        recipe = short(name)
        numbers = {"lr", "weight_decay", "steps", "batch_size", "clip", "checkpoints"}
        content = recipe.model_dump(include={"smoke": True, "quantize": {"methods"}, "qat": True})
        content["train"] = recipe.train.model_dump(exclude=numbers)
        content["task"] = recipe.task.name, sorted(recipe.task.options.keys() - {"data", "classes"})
        content["arms"] = {arm: decay for arm, decay in recipe.arms.items() if arm != "none"}
        seen[repr(content)] = name
    return list(seen.values())


def test_the_papers_recipes_are_there_and_say_what_they_do() -> None:
    assert {"siglip2-imagenet", "siglip2-384-imagenet", "siglip-imagenet", "clip-imagenet"} <= set(TRIED)
    recipe = read_recipe("siglip2-imagenet")[1]
    paper = recipe.arms["s2d"]
    assert paper == {"preset": "paper"} and {"erq", "repq", "ptq4vit"} <= set(recipe.quantize.methods)


@pytest.mark.parametrize("name", different())
def test_the_whole_recipe_runs(name: str, tmp_path: Path) -> None:
    """All arms and methods."""
    recipe = short(name)
    if recipe.task.name == "detection":
        pytest.importorskip("pycocotools", reason="needs the extra s2d[detection]")
    results = Runner(name, smoke_test(recipe, tmp_path / "data"), tmp_path / "run").run()
    found = {(r["conditioning"], r["spec"], r["method"]) for r in results["records"]}
    low = spec_name(recipe.quantize.specs[-1])
    assert low.startswith("w4a4")
    for arm in recipe.arms:
        assert {(arm, "fp32", "none"), *((arm, low, method) for method in recipe.quantize.methods)} <= found
    assert any(record["selected"] for record in results["history"]), "the decay had something to do"
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_eager_decay_is_not_put_on_a_rival(tmp_path: Path) -> None:
    recipe = read_recipe("vit-cifar10-small", ["arms.l2={baseline: l2, strength: 0.1}"])[1]
    arms = smoke_test(recipe, tmp_path).arms
    assert arms["l2"] == {"baseline": "l2", "strength": 0.1} and arms["adamw"] is None
    assert arms["s2d"] is not None and arms["s2d"]["refresh_every"] == 2


def test_a_recipe_without_a_smoke_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no smoke section"):
        smoke_test(read_recipe("minilm-sst2")[1], tmp_path)
