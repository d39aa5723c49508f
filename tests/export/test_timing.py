"""Models timed side by side: what runs where, and what is told about models that do not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.quant import tiny_families
from tests.tiny_text import make_model

import s2d
from s2d.cli import main
from s2d.errors import InputError
from s2d.export.timing import bench

pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = tiny_families.one_block(tiny_families.build("bert"))
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    s2d.export(
        s2d.quantize(family.model, "w4a8", calibration=family.batches), path, example=family.batches[0], time_it=False
    )
    return path


def test_every_model_in_every_runtime_at_every_size(exported: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "bert")
    threads = torch.get_num_threads()
    # Ids of the tiny vocabularies end below those of real ones.
    rows = bench([exported], batches=(1, 3), threads=(1,), length=8, rounds=3)
    runtimes = {row.runtime for row in rows}
    assert "onnxruntime" in runtimes and runtimes <= {"onnxruntime", "openvino"}
    assert len(rows) == 2 * len(runtimes) and torch.get_num_threads() == threads
    for row in rows:
        assert 0 < row.p50_ms <= row.p95_ms and row.cold_ms > 0
        assert row.per_second == pytest.approx(1e3 * row.batch / row.p50_ms)
    assert [row.runtime for row in bench([folder], batches=(2,), length=8, rounds=1)] == ["torch"]


def test_bad_input_is_one_line(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rounds must be 1 or more"):
        bench([exported], rounds=0)
    for arguments, message in (
        ([str(tmp_path / "none.onnx")], "there is no file"),
        ([str(exported), "--batch", "a"], "--batch takes whole numbers"),
        ([str(exported), "--batch", "0"], "batch must be 1 or more"),
        ([str(exported), "--length", "1000"], "choose another --length"),
    ):
        capsys.readouterr()
        assert main(["bench", *arguments, "--rounds", "1"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("s2d: ") and message in error and error.count("\n") == 1


def test_the_table_and_the_json(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "made" / "bench.svg"
    files = ["--json", str(out), "--plot", str(plot)]
    assert main(["bench", str(exported), "--batch", "1", "--rounds", "2", "--length", "8", *files]) == 0
    assert "onnxruntime, 1 thread" in plot.read_text()
    assert "rows/s" in capsys.readouterr().out
    assert {row["batch"] for row in json.loads(out.read_text())["bench"]} == {1}
