"""Kinds of models and specs that once came out wrong, each on inputs of its own: the file runs, at other sizes too."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import s2d
from s2d.errors import InputError
from s2d.export import ExportReport, child_process, copies, graphs, open_exported, openvino

pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')


class Repeated(nn.Module):
    """One Linear, used ``times`` times around a norm."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(times)
        self.first, self.again, self.norm = nn.Linear(24, 40), nn.Linear(40, 40), nn.LayerNorm(40)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, 24]`` to ``[B, T, 40]``."""
        x = self.first(x)
        for _ in range(self.times):
            x = x + torch.tanh(self.again(self.norm(x)))
        return x


def everywhere(spec: Any) -> dict[str, Any]:
    """A spec for Linears outside of any block."""
    return {"base": spec, "overrides": {"*": spec}}


def rows(count: int) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 5, 24)}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values()))


@torch.no_grad()
def written(
    model: nn.Module, spec: Any, batches: list[dict[str, Tensor]], path: Path, other: Callable[[int], dict[str, Tensor]]
) -> ExportReport:
    """Export, and compare with the simulation on one row and on three."""
    quantized = s2d.quantize(model, spec, calibration=batches)
    report = s2d.export(quantized, path, example=batches[0], embeddings=0, describe=False)
    assert report.passed and not report.unchecked
    runner, simulated = open_exported(path), copies.in_float32(quantized, {})[0]
    for count in (1, 3):
        feed = copies.in_float32(quantized, other(count))[1]
        wanted, found = first(simulated(**feed)), first(runner(**feed))
        assert float((wanted - found).norm() / wanted.norm()) < 0.05  # codes at ties; wrong wiring is beyond 1
    return report


@pytest.mark.parametrize(("times", "spec"), [(2, "w8a8"), (3, "w4a16"), (4, "w8a8-token")])
def test_a_layer_that_is_used_again_is_compared_at_every_use(times: int, spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = written(Repeated(times).eval(), everywhere(spec), [rows(4), rows(4)], tmp_path / "m.onnx", rows)
    assert [each.name for each in report.layers].count("again") == times


def test_a_runtime_that_ends_its_process_leaves_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "_LOADED", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    torch.manual_seed(0)
    quantized = s2d.quantize(Repeated(1).eval(), everywhere("w8a8"), calibration=[rows(4)])
    with pytest.raises(InputError, match=f"onnxruntime crashed on this graph \\({signal.SIGSEGV.name}\\)"):
        s2d.export(quantized, tmp_path / "m.onnx", example=rows(2), time_it=False)
    monkeypatch.setattr(child_process, "_LOADED", "import time; time.sleep(60)")
    monkeypatch.setattr(child_process, "SECONDS", 1.0)
    with pytest.raises(InputError, match="onnxruntime did not run this graph once in 1 s"):
        s2d.export(quantized, tmp_path / "m.onnx", example=rows(2), time_it=False)
    assert list(tmp_path.iterdir()) == []
    assert graphs.try_runtime is child_process.try_runtime


def test_openvino_reads_no_file_here_that_ended_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(child_process, "_OPENVINO", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(openvino, "convert", lambda *paths: pytest.fail("read here"))
    torch.manual_seed(0)
    quantized = s2d.quantize(Repeated(1).eval(), everywhere("w8a8"), calibration=[rows(4)])
    with pytest.raises(InputError, match="OpenVINO crashed on this graph"):
        s2d.export(quantized, tmp_path / "m.xml", example=rows(2), time_it=False)


@pytest.mark.parametrize(
    ("dtype", "spec"), [(torch.bfloat16, "w8a8"), (torch.float16, "w4a16"), (torch.float64, "w4a8")]
)
def test_other_precisions_are_written_as_float32(dtype: torch.dtype, spec: str, tmp_path: Path) -> None:
    def in_type(count: int) -> dict[str, Tensor]:
        return {"x": torch.randn(count, 5, 24).to(dtype)}

    torch.manual_seed(0)
    written(Repeated(1).to(dtype).eval(), everywhere(spec), [in_type(4), in_type(4)], tmp_path / "m.onnx", in_type)
