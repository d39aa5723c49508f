"""benchmarks/vlm.py on tiny parts: it resumes, scores by kind of question, quantizes one part alone, and reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.scripts import script
from tests.tiny_images import picture

import s2d
from s2d.report.schema import read_results

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("PIL")
pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.fixture
def vlm() -> ModuleType:
    return script("benchmarks/vlm.py")


def images(folder: Path) -> Path:
    folder.mkdir()
    for split, count in (("train", 40), ("test", 12)):
        rows = [{"image": {"bytes": picture(n, (32, 32)), "path": ""}, "label": n % 3} for n in range(count)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def test_it_runs_resumes_and_reports(
    vlm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["--smoke", "--data", str(images(tmp_path / "data")), "--out", str(out), "--precision", "fp32"]
    given += ["--split", "test", "--cells", "w8a8 both,w4a4 tower", "--report", str(tmp_path / "vlm.json")]
    monkeypatch.setattr(sys, "argv", ["vlm.py", *given])
    vlm.main()
    assert "| w4a4 tower | s2d |" in capsys.readouterr().out
    content = json.loads((tmp_path / "vlm.json").read_text())
    assert read_results(content).records
    of_all = [r for r in content["records"] if r["kind"] == "all"]
    assert [(r["spec"], r["quantized"]) for r in of_all] == [("fp32", "none"), ("w8a8", "both"), ("w4a4", "tower")] * 2
    cells = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
    assert len(cells) == 6 and not list(out.glob("*.state"))
    vlm.main()
    assert {path: path.stat().st_mtime_ns for path in cells} == cells, "nothing is computed again"

    start: Any = s2d.load(out / "start").model
    trained: Any = s2d.load(out / "models" / "adamw").model
    before, after = start.state_dict(), trained.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision_tower" in name for name in moved) and any("down_proj" in name for name in moved)
    assert not any("embed_tokens" in name or "input_layernorm" in name for name in moved), "only adapters are trained"


def test_the_start_reads_patches_as_words(vlm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ridge leaves a patch nearer to the word of its image than the mean of all words is."""
    out = tmp_path / "out"
    monkeypatch.setitem(vlm.SMOKE, "introduced", 0)
    given = ["--smoke", "--data", str(images(tmp_path / "data")), "--out", str(out), "--arms", "start", "--cells", ""]
    monkeypatch.setattr(sys, "argv", ["vlm.py", *given])
    vlm.main()
    start: Any = s2d.load(out / "start")
    task = vlm.VisualQuestionAnswering(out / "questions", prompt=vlm.PROMPT, max_answer=4)
    task.prepare(start)
    words, answers = start.model.get_input_embeddings(), [a.common for a in task.answers["train"]]
    named = [row for row, answer in enumerate(answers) if answer not in ("yes", "no")]
    batch = next(task.batches("train", batch_size=40))
    with torch.no_grad():
        patches = start.model.get_image_features(pixel_values=task.normalize(batch["pixels"])).pooler_output
        ids = [start.tokenizer(" " + answers[row], add_special_tokens=False)["input_ids"] for row in named]
        wanted = torch.stack([words(torch.tensor(one)).mean(0) for one in ids])
    found = torch.stack([patches[row].mean(0) for row in named])
    assert (found - wanted).square().mean() < 0.7 * (wanted - wanted.mean(0)).square().mean()


def test_kinds_of_questions(vlm: ModuleType) -> None:
    asked = ["what is it?", "is it a vehicle?", "can it fly?", "is it an automobile?", "ship or dog?"]
    assert [vlm.kind_of(question) for question in asked] == list(vlm.KINDS)
