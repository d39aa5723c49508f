"""CLIP and SigLIP as two files: each computes what its tower does, and together they are judged as the model is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny_images import make_folders

from s2d import quant
from s2d.errors import InputError
from s2d.export import example_of, export, open_exported
from s2d.export.towers import ExportedTowers, Tower, export_towers, paths_of
from s2d.models import load
from s2d.models.dual_encoder import DualEncoder
from s2d.quant.modules.sites import quantizers_of
from s2d.tasks import Task, create

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("PIL")
pytest.importorskip("transformers")


def quantized(name: str, folder: Path, spec: str) -> tuple[DualEncoder, Task, dict[str, torch.Tensor]]:
    loaded = load(name)
    task = create("zero-shot", data=make_folders(folder, {"train": 10, "val": 6, "test": 6}))
    model = task.build(loaded).eval()
    assert isinstance(model, DualEncoder)
    inputs = [each for batch in task.batches("train", batch_size=8) for each in task.inputs(batch)]
    made = quant.quantize(model, spec, calibration=inputs)
    assert isinstance(made, DualEncoder)
    return made, task, example_of(inputs)


@pytest.mark.parametrize("name", ["new:clip-tiny", "new:siglip-tiny"])
def test_both_towers_compute_the_same_and_score_the_same(name: str, tmp_path: Path) -> None:
    model, task, example = quantized(name, tmp_path / "images", "w8a8")
    target = tmp_path / "m.onnx"
    reports = export_towers(model, target, example=example, embeddings=0, task=task, time_it=False)
    assert set(reports) == {"image", "text"} and all(report.passed for report in reports.values())
    assert sum(len(report.layers) for report in reports.values()) == len(list(quant_layers(model)))
    assert reports["image"].parity["metric"] == task.primary
    content = json.loads((tmp_path / "m.json").read_text())
    assert set(content["export"]) == {"image", "text"}
    assert sorted(path.name for path in tmp_path.glob("m.*")) == ["m.image.onnx", "m.json", "m.text.onnx"]

    opened = ExportedTowers(*(open_exported(path) for path in paths_of(target).values()))
    texts = {key: value for key, value in example.items() if key != "pixel_values"}
    pixels = example["pixel_values"][:3]  # another batch than the traced one
    with torch.no_grad():
        image, text = opened.image(pixels), opened.text(**texts)
        assert ((image * model.image(pixels)).sum(-1) > 0.999).all()
        assert ((text * model.text(**texts)).sum(-1) > 0.999).all()
        score = content["score"]
        scores = score["scale"] * image @ text.T + score["bias"]
        expected = model(pixels, **texts)
    assert (scores - expected).abs().max() < 0.05 * score["scale"]


def quant_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and list(quantizers_of(m))]


def test_a_tower_is_without_the_other(tmp_path: Path) -> None:
    model, _, example = quantized("new:clip-tiny", tmp_path / "images", "w4a4")
    pixels = {"pixel_values": example["pixel_values"]}
    tower = Tower(model, "image", pixels)
    names = [name for name, module in tower.named_modules() if isinstance(module, torch.nn.Linear)]
    assert names and not any("text" in name for name in names)
    with torch.no_grad():
        assert torch.equal(tower(**pixels), model.image(**pixels))


def test_what_cannot_be_exported_has_its_line_and_leaves_no_file(tmp_path: Path) -> None:
    model, task, example = quantized("new:clip-tiny", tmp_path / "images", "w8a8")
    with pytest.raises(InputError, match=r"batches of different sizes \(.*\).*export_towers"):
        export(model, tmp_path / "m.onnx", example=example)
    with pytest.raises(InputError, match="images and texts"):
        export_towers(model, tmp_path / "m.onnx", example={"pixel_values": example["pixel_values"]})
    with torch.no_grad(), pytest.raises(InputError, match="unknown kind of file"):
        export_towers(model, tmp_path / "m.pt", example=example, task=task)
    assert not list(tmp_path.glob("m*"))
