"""The scripts that make data and models for the benchmarks: what they write is read, and holds what was given."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_images import make_idx

from s2d.models import load
from s2d.tasks import create

image = pytest.importorskip("PIL.Image")
pytest.importorskip("pycocotools")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *given])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


def test_boxes_are_around_the_garments_and_nothing_is_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = make_idx(tmp_path / "garments", {"train": 5300, "t10k": 30}, (28, 28))
    counts = {"train": 8, "validation": 4, "test": 6}
    given = [part for split, count in counts.items() for part in (f"--{split}", str(count))]
    run(monkeypatch, "fashion_boxes.py", str(data), "--out", str(tmp_path / "boxes"), *given)
    task = create("detection", data=tmp_path / "boxes")
    assert task.sizes() == counts
    for split in counts:
        for row, boxes in zip(task.rows[split], task._boxes[split], strict=True):  # pyright: ignore
            pixels = np.asarray(image.open(row.source)).copy()
            assert 1 <= len(boxes) <= 3
            for x, y, width, height in boxes.int().tolist():
                edge = pixels[y : y + height, x : x + width]
                assert edge[0].any() and edge[-1].any() and edge[:, 0].any() and edge[:, -1].any()
            for x, y, width, height in boxes.int().tolist():
                pixels[y : y + height, x : x + width] = 0
            assert not pixels.any()


def test_a_detector_starts_with_the_encoders_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "start"
    run(monkeypatch, "yolos_from_vit.py", "trained:vit-fashion", "new:yolos-fashion", "--out", str(out))
    assert "69 of 72 tensors" in capsys.readouterr().out
    made: Any = load(str(out)).model
    given: Any = load("trained:vit-fashion").model
    x = torch.linspace(-1, 1, 5 * 128).view(1, 5, 128)
    expected, found = given.encoder.vit.layers[1](x), made.vit.encoder.layer[1](x)
    assert torch.allclose(found[0] if isinstance(found, tuple) else found, expected, atol=1e-5)
