"""The exporter's second trace is skipped where it changes nothing, and only there."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2d.export import lean_exporter
from s2d.export.onnx import write_onnx

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
runtime = pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Operators that ONNX knows, and those that a trace adds: casts, one that changes nothing, and a logical one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kept = ((x > 0.1) & (x < 1.0)).to(x.dtype)
        return torch.softmax(self.fc(self.norm(x.to(torch.float32))) * kept, -1)


class WritesInPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].add_(1.0)  # a view: only the second trace knows that y changes too
        return super().forward(y)


def written(model: nn.Module, path: Path) -> Counter[str]:
    write_onnx(model.eval(), {"x": X}, path)
    (found,) = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": X[:1].numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(X[:1]), rtol=1e-5, atol=1e-6)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(("model", "skipped"), [(Plain, True), (WritesInPlace, False)])
def test_the_second_trace_is_skipped_where_it_changes_nothing(
    model: type[nn.Module], skipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    simplified = lean_exporter.simplified

    def watched(*given: object) -> bool:
        seen.append(simplified(*given))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(lean_exporter, "simplified", watched)
    lean = written(model(), tmp_path / "lean.onnx")
    assert seen == [skipped]
    monkeypatch.setattr(lean_exporter, "_without_decompositions", nullcontext)
    assert lean == written(model(), tmp_path / "whole.onnx")
