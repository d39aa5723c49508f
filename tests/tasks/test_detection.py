"""AP by hand; the loss is transformers' own; a tiny detector learns; boxes that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from s2d.errors import InputError
from s2d.models import load
from s2d.tasks import create
from s2d.tasks.detection import Detection, average_precision

pytest.importorskip("PIL")
pytest.importorskip("transformers")
pytest.importorskip("pycocotools", reason="needs the extra s2d[detection]")
pytest.importorskip("scipy")


def make_folder(path: Path, count: int = 6, **changes: Any) -> Path:
    """Grey images with one bright square, left (class 0) or right (class 1)."""
    from PIL import Image, ImageDraw

    for split in ("train", "val", "test"):
        folder = path / split
        folder.mkdir(parents=True)
        lines = []
        for number in range(count):
            picture = Image.new("RGB", (80, 40), (90, 90, 90))
            x = 4 + 48 * (number % 2)
            ImageDraw.Draw(picture).rectangle((x, 8, x + 23, 31), fill=(250, 40 * (number % 2), 0))
            picture.save(folder / f"{number}.png")
            objects = {"bbox": [[x, 8, 24, 24]], "category": [number % 2], **changes}
            lines.append(json.dumps({"file_name": f"{number}.png", "objects": objects}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return path


def task(data: Path, **options: Any) -> Detection:
    made = create("detection", data=data, **options)
    assert isinstance(made, Detection)
    return made


def test_average_precision_by_hand() -> None:
    truth = {7: (torch.tensor([[0.0, 0, 10, 10], [50, 50, 10, 10]]), torch.tensor([0, 0]))}
    hit = {"image_id": 7, "category_id": 0, "bbox": [0.0, 0, 10, 10], "score": 0.9}
    miss = {"image_id": 7, "category_id": 0, "bbox": [20.0, 20, 10, 10], "score": 0.8}
    # One of two objects, found first: precision 1 up to recall 0.5, which is 51 of COCO's 101 points.
    assert average_precision(truth, [hit, miss], ["a"])["ap"] == pytest.approx(100 * 51 / 101, abs=1e-4)
    half = {**hit, "bbox": [0.0, 0, 10, 6]}  # an IoU of 0.6 counts at 0.5, 0.55 and 0.6 of ten thresholds
    found = average_precision(truth, [half], ["a"])
    assert found["ap50"] == pytest.approx(100 * 51 / 101, abs=1e-4) and found["ap75"] == 0
    assert found["ap"] == pytest.approx(0.3 * 100 * 51 / 101, abs=1e-4)
    assert average_precision(truth, [], ["a"])["ap"] == 0


def test_the_loss_is_the_models_own(tmp_path: Path) -> None:
    loaded, made = load("new:yolos-tiny"), task(make_folder(tmp_path))
    model = made.build(loaded)
    batch = next(made.batches("train", batch_size=2))
    labels = [
        {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[16 / 80, 20 / 40, 24 / 80, 24 / 40]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[64 / 80, 20 / 40, 24 / 80, 24 / 40]])},
    ]
    expected = loaded.model(pixel_values=made.normalize(batch["pixels"]), labels=labels).loss
    torch.testing.assert_close(made.loss(model.eval(), batch), expected)


def test_a_tiny_detector_learns(tmp_path: Path) -> None:
    loaded, made = load("new:yolos-tiny"), task(make_folder(tmp_path))
    model = made.build(loaded)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = next(made.batches("train", batch_size=6))
    for _ in range(150):
        optimizer.zero_grad()
        made.loss(model, batch).backward()
        optimizer.step()
    assert made.evaluate(model, "test")["ap50"] > 60


def test_more_classes_than_the_model_has_get_a_new_end(tmp_path: Path) -> None:
    made = task(make_folder(tmp_path), classes=[f"class {number}" for number in range(5)])
    model: Any = made.build(load("new:yolos-tiny"))
    assert model.class_labels_classifier.layers[-1].out_features == 6
    assert torch.isfinite(made.loss(model, next(made.batches("train", batch_size=2))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [[1, 2, 3]]}, "not four numbers"),
        ({"bbox": [[1, 2, 0, 3]]}, "no width or height"),
        ({"bbox": []}, "0 boxes and 1 categories"),
        ({"category": [None]}, "neither a name nor a number"),
        ({"category": [-2]}, "outside the"),
    ],
)
def test_bad_objects_have_their_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        task(make_folder(tmp_path, 2, **changes))


def test_another_model_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no detector"):
        task(make_folder(tmp_path)).build(load("new:vit-tiny"))
