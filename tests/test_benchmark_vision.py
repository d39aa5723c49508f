"""benchmarks/vision.py on a tiny encoder: it resumes, compares image by image, and writes what `s2d report` reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.scripts import script

from s2d.report.schema import read_results

pytest.importorskip("transformers")
ENDS = ("strong-*full-precision", "rtn-minmax-qat=3", "rtn-minmax-qat=3-decay")


@pytest.fixture
def vision() -> ModuleType:
    return script("benchmarks/vision.py")


def run(vision: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> None:
    arguments = ["--model", "new:dinov2-tiny", "--pixels", "32", "--steps", "2", "--images", "20", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["vision.py", *arguments, "--ways", "rtn minmax", *more])
    vision.main()


def first_weight(out: Path, arm: str) -> torch.Tensor:
    """A square weight of an arm's model, the last that was trained."""
    files = out.glob("probe-*.pt") if arm == "probe" else (out / "models").glob(f"{arm}-0-*.pt")
    weights = torch.load(max(files, key=lambda file: file.stat().st_mtime_ns), weights_only=True)
    return next(weight for weight in weights.values() if weight.ndim == 2 and weight.shape[0] == weight.shape[1])


def test_it_runs_resumes_and_reports(
    vision: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    for first, count in ((0, 3000), (0, 64), (0, 128), (47_000, 20)):  # prepared before, so that no table is read
        images = torch.randint(0, 256, (min(count, 64), 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (len(images),), generator=generator)
        torch.save((images, labels), tmp_path / f"train-32-{first}-{count}.pt")
    run(vision, monkeypatch, tmp_path, "--arms", "adamw,ratio8", "--report", str(tmp_path / "vision.json"))
    text = capsys.readouterr().out
    assert "| adamw | 0 |" in text and "| to adamw | 0 |" in text
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == 4 and all(len(json.loads(path.read_text())["right"]) == 20 for path in cells)
    records = json.loads((tmp_path / "vision.json").read_text())["records"]
    assert {(r["conditioning"], r["spec"]) for r in records} == {
        (arm, spec) for arm in ("adamw", "ratio8") for spec in ("fp32", "w4a4")
    }
    assert len(read_results({"records": records}).records) == 4
    run(vision, monkeypatch, tmp_path, "--arms", "adamw,ratio8")
    assert "step" not in capsys.readouterr().out, "nothing is trained again"
    rivals = ("adamw", "muon", "averaged", "tweo", "singular-values")
    run(vision, monkeypatch, tmp_path, "--arms", ",".join(rivals), "--ways", "", "--steps", "4")
    weights = {arm: first_weight(tmp_path, arm) for arm in rivals}
    assert len({weights[arm].sum().item() for arm in rivals}) == len(rivals), "each trains in its own way"
    left, _, right = torch.linalg.svd(first_weight(tmp_path, "probe"))
    moved = left.T @ weights["singular-values"] @ right.T
    assert (moved - moved.diagonal().diag()).abs().max() < 1e-5 < moved.diagonal().abs().min()
    trained = ["rtn minmax qat=3", "rtn minmax qat=3 decay"]
    monkeypatch.setitem(vision.ARMS, "strong", {"outlier_ratio": 1.01, "strength": 0.5, "refresh_every": 1})
    arguments = ["--ways", ",".join(trained), "--arms", "strong", "--report", str(tmp_path / "qat.json")]
    run(vision, monkeypatch, tmp_path, *arguments)
    records = json.loads((tmp_path / "qat.json").read_text())["records"]
    assert [r["method"] for r in records] == ["none", "rtn + 3 QAT", "rtn + 3 QAT, decay"]
    losses = [json.loads(next((tmp_path / "cells").glob(f"*{end}.json")).read_text())["losses"] for end in ENDS]
    assert losses[0] != losses[1] != losses[2], (
        "in full precision, trained with the labels, and with the decay beside it"
    )


def test_pairs_are_compared_image_by_image(vision: ModuleType) -> None:
    arm, other = {"right": "1110"}, {"right": "1000"}
    # Differences 0, 1, 1, 0: mean 0.5, deviation 0.5, so 1.96 * 0.5 / 2 each way.
    assert vision.paired(arm, other) == "+50.0 (+1.0 to +99.0)"


def test_an_unknown_arm_is_refused(
    vision: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(vision, monkeypatch, tmp_path, "--arms", "adam")
    assert "did you mean adamw?" in capsys.readouterr().err
