"""The model that comes with s2d: it is what its page says, and four bits cost it what the demo is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s2d import quant
from s2d.cli import main
from s2d.errors import InputError
from s2d.experiments.recipe import read_recipe
from s2d.models import load
from s2d.models.trained import trained_models
from s2d.tasks import create
from s2d.tasks.base import calibration_inputs

pytest.importorskip("PIL")
pytest.importorskip("transformers")
FASHION = Path("/usr/share/datasets/fashion-mnist")


def test_every_trained_model_loads_in_full_precision_and_says_how_it_was_trained() -> None:
    assert trained_models() == ["vit-fashion"]
    loaded = load("trained:vit-fashion")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.model.labels == tuple(read_recipe("vit-fashion-condition")[1].task.options["classes"])
    folder = Path(quant.__file__).parents[1] / "models" / "trained" / "vit-fashion"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    assert "s2d run vit-fashion-mnist" in (folder / "README.md").read_text()


def test_an_unknown_one_is_named() -> None:
    with pytest.raises(InputError, match="trained:vit-fashon does not come with s2d; did you mean vit-fashion?"):
        load("trained:vit-fashon")


def test_the_vision_demo_says_where_its_data_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("s2d.commands.runs._FASHION", tmp_path / "nowhere")
    assert main(["demo", "--vision"]) == 2
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Fashion-MNIST (apt install dataset-fashion-mnist)")
def test_four_bits_cost_it_ten_points() -> None:
    recipe = read_recipe("vit-fashion-condition")[1]
    task = create(recipe.task.name, **recipe.task.options)
    loaded = load(recipe.model)
    model = task.build(loaded)
    full = task.evaluate(model, "test", batch_size=500)["accuracy"]
    calibration = calibration_inputs(task, 128, 32, seed=0)
    rounded = quant.quantize(model, "w4a4", calibration=calibration, observer="minmax")
    assert full > 83
    assert task.evaluate(rounded, "test", batch_size=500)["accuracy"] < full - 7
