"""Kinds of models and specs that once came out wrong, each on inputs of its own: the file runs, at other sizes too."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quant import tiny_families
from torch import Tensor, nn

import s2d
from s2d.errors import InputError
from s2d.export import ExportReport, child_process, copies, graphs, open_exported

pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

HEADS = {"granularity": "head"}
KEYS = {"base": "w8a8", "attention": {"q": {"bits": 16}, "probs": {"bits": 16}}}


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


def rows(count: int) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 5, 24)}


def family(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    found = tiny_families.build(name)
    batches = [{key: value for key, value in each.items() if isinstance(value, Tensor)} for each in found.batches]
    return found.model, batches


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values()))


@torch.no_grad()
def written(
    model: nn.Module, spec: Any, batches: list[dict[str, Tensor]], path: Path, other: Callable[[int], dict[str, Tensor]]
) -> ExportReport:
    """Export, and compare with the simulation on one row and on three."""
    quantized = s2d.quantize(model, spec, calibration=batches)
    report = s2d.export(quantized, path, example=batches[0], embeddings=0, time_it=False)
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
    report = written(Repeated(times).eval(), spec, [rows(4), rows(4)], tmp_path / "m.onnx", rows)
    assert [each.name for each in report.layers].count("again") == times


@pytest.mark.parametrize("spec", ["w3a16", "w8a16", {"base": "w4a8", "weight": {"granularity": "group-8"}}])
def test_small_matrices_stay_codes_in_the_file(spec: Any, tmp_path: Path) -> None:
    import onnx

    torch.manual_seed(0)
    report = written(Repeated(1).eval(), spec, [rows(4), rows(4)], tmp_path / "m.onnx", rows)
    graph = onnx.load(tmp_path / "m.onnx").graph
    codes = [each for each in graph.initializer if each.name.endswith("codes")]
    assert len(codes) == len(report.layers) == 2
    assert {each.data_type for each in codes} <= {onnx.TensorProto.INT4, onnx.TensorProto.INT8}
    assert not [each for each in graph.initializer if each.data_type == 1 and each.dims == [40, 40]]
    assert "float32" in report.label[2] and "uint8" not in report.label[2]
    assert report.label[1].endswith("where codes become float32")


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("bert", {"base": "w8a8", "attention": HEADS}),
        ("vit-classifier", {"base": "w6a6", "attention": HEADS}),
        ("llama", KEYS),
        ("llama", {"base": "w4a8kv4", "attention": HEADS}),
    ],
)
def test_operands_of_attention_that_no_product_of_integers_takes(name: str, spec: Any, tmp_path: Path) -> None:
    model, batches = family(name)

    def other(count: int) -> dict[str, Tensor]:
        return {key: value[:1].repeat(count, *(1 for _ in value.shape[1:])) for key, value in batches[0].items()}

    written(model, spec, batches, tmp_path / "m.onnx", other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_written_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Repeated(1).eval().to(dtype)

    def batch(count: int) -> dict[str, Tensor]:
        return {key: value.to(dtype) for key, value in rows(count).items()}

    written(model, "w4a8", [batch(4), batch(4)], tmp_path / "m.onnx", batch)
    assert {each.dtype for each in model.parameters()} == {dtype}


def test_a_runtime_that_ends_its_process_leaves_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "_LOADED", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    torch.manual_seed(0)
    quantized = s2d.quantize(Repeated(1).eval(), "w8a8", calibration=[rows(4)])
    with pytest.raises(InputError, match=f"onnxruntime itself ends on this graph \\({signal.SIGSEGV.name}\\)"):
        s2d.export(quantized, tmp_path / "m.onnx", example=rows(2), time_it=False)
    assert list(tmp_path.iterdir()) == []
    assert graphs.try_runtime is child_process.try_runtime
