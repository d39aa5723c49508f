"""The residual stream in operators that quantizers leave: outputs stay, and no large channel spoils a range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

from tests.export.static_quantizer import in_8_bits, write_stripped  # noqa: E402  (after the libraries that it needs)

from s2d.export.float_stream import keep_stream  # noqa: E402
from s2d.export.onnx import OnnxModel, write_onnx  # noqa: E402


class Scaled(nn.Module):
    """Two pre-norm branches with a scale per channel; the bias of one channel is a hundred times the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.scales = nn.ParameterList(torch.rand(32) + 0.5 for _ in range(2))
        self.get_parameter("layers.0.bias").data[5] = 100.0
        for at in (1, 2):
            self.get_parameter(f"norms.{at}.weight").data[5] = (
                0.01  # as trained norms have it: the channel is large, not its effect
            )

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer, scale in zip(self.norms, self.layers, self.scales, strict=False):
            x = x + layer(norm(x)) * scale
        return self.norms[2](x)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 7, 32)
    return write_stripped(Scaled(), {"x": x}, tmp_path / "model.onnx"), x


def quantized_error(path: Path, x: Tensor) -> float:
    a, b = OnnxModel(path)(x=x), OnnxModel(in_8_bits(path, {"x": x}))(x=x)
    return float((a - b).norm() / a.norm())


def test_a_static_quantizer_keeps_the_small_channels(written: tuple[Path, Tensor]) -> None:
    path, x = written
    kept = path.with_name("kept.onnx")
    model = onnx.load(path)
    assert keep_stream(model) == 3 + 2 + 2 + 2  # norms, sums, scales, biases
    onnx.checker.check_model(model)
    onnx.save(model, kept)
    torch.testing.assert_close(OnnxModel(kept)(x=x), OnnxModel(path)(x=x), atol=1e-5, rtol=1e-5)
    before, after = quantized_error(path, x), quantized_error(kept, x)
    assert after < 0.2 * before, (before, after)


def test_standard_operators_that_quantizers_leave(written: tuple[Path, Tensor]) -> None:
    model = onnx.load(written[0])
    keep_stream(model)
    kinds = [node.op_type for node in model.graph.node]
    assert not {node.domain for node in model.graph.node} - {""}
    assert kinds.count("Mean") == 4 and kinds.count("Add") == kinds.count("Mul") == 0
    assert kinds.count("LayerNormalization") == 3 and kinds.count("MatMul") == 2
    epsilons = [each.f for node in model.graph.node for each in node.attribute if each.name == "epsilon"]
    np.testing.assert_allclose(epsilons, [1e-5] * 3)


def test_a_scale_of_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, path = Scaled().eval(), torch.randn(2, 7, 32), tmp_path / "model.onnx"
    model.scales[1].data[3] = 0.0
    write_onnx(model, {"x": x}, path, opset=20)
    made = onnx.load(path)
    keep_stream(made)
    onnx.save(made, path)
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(path)(x=x), model(x), atol=1e-5, rtol=1e-5)


def test_a_file_without_a_stream_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), {"input": torch.randn(2, 8)}, path)
    model = onnx.load(path)
    before = model.SerializeToString()
    assert keep_stream(model) == 0 and model.SerializeToString() == before
