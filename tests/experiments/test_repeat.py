"""The same command with the same seed gives the same files, byte for byte but for seconds, memory, disk and dates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from s2d import cli
from s2d.experiments import smoke

pytest.importorskip("accelerate")
pytest.importorskip("PIL")
pytest.importorskip("jinja2")
VARYING = {"seconds", "peak_mb", "started", "command", "disk"}  # other programs write as well


def plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key not in VARYING}
    return [plain(item) for item in content] if isinstance(content, list) else content


def files(folder: Path) -> dict[str, Any]:
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: plain(json.loads(path.read_text())) if name.endswith(".json") else path.read_bytes()
        for name, path in found.items()
    }


def test_every_command_repeats_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `s2d run` is repeated by tests/experiments/test_faults.py in processes of their own; `s2d bench` measures seconds.
    data = smoke._images(tmp_path / "data")
    task = ["--task", "image-classification", "--data", str(data), "-q"]
    few = ["-o", "train.steps=3", "-o", "train.batch_size=8", "-o", "quantize.calibration.samples=8"]
    decay = ["-o", "decay.refresh_every=1", "-o", "decay.outlier_ratio=1.1"]
    commands = [
        ["audit", "new:vit-tiny", "--data", str(data), "--json", "audit.json", "-q"],
        ["condition", "new:vit-tiny", *task, *few, *decay, "--out", "conditioned", "--json", "condition.json"],
        ["quantize", "conditioned", *task, *few, "--method", "gptq", "--out", "quantized", "--json", "quantize.json"],
        ["evaluate", "quantized", *task, "--json", "evaluate.json"],
        ["report", "evaluate.json", "audit.json", "--out", "report.html", "-q"],
        ["recipes", "list", "--json", "recipes.json", "-q"],
        ["doctor", "--json", "doctor.json", "-q"],
    ]
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        for command in commands:
            assert cli.main(command) == 0, command
        (folder / "report.html").unlink()  # the seconds are in it
        found.append(files(folder))
    first, second = found
    assert first.keys() == second.keys() and len(first) >= 10
    assert [name for name in first if first[name] != second[name]] == []
    assert first["condition.json"]["history"], "the decay had something to do"
