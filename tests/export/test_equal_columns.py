"""Columns of one size: outputs stay, and one range for the weight is as good as one for each channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

from tests.export.static_quantizer import in_8_bits, write_stripped  # noqa: E402  (after the libraries that it needs)

from s2d.export.equal_columns import MOST, equal_columns  # noqa: E402
from s2d.export.onnx import OnnxModel, write_onnx  # noqa: E402


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Tensor]:
    """One product whose channels differ by a hundred, and their sum in which the small ones count."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(64, 7, 32)
    layer.weight.data[3] *= 100
    layer.weight.data[5] = 0
    return write_stripped(layer, {"input": x}, tmp_path / "model.onnx"), x


def small_channels_error(path: Path, x: Tensor) -> float:
    """Of the 14 ordinary channels, with the weight in 8 bits and one range, relative."""
    made = in_8_bits(path, {"input": x}, op_types_to_quantize=["MatMul"])
    small = [at for at in range(16) if at not in (3, 5)]
    a, b = OnnxModel(path)(input=x)[..., small], OnnxModel(made)(input=x)[..., small]
    return float((a - b).norm() / a.norm())


def test_outputs_stay_and_small_channels_survive(written: tuple[Path, Tensor]) -> None:
    path, x = written
    model = onnx.load(path)
    assert equal_columns(model) == 1
    onnx.checker.check_model(model)
    kept = path.with_name("kept.onnx")
    onnx.save(model, kept)
    torch.testing.assert_close(OnnxModel(kept)(input=x), OnnxModel(path)(input=x), atol=1e-5, rtol=1e-5)
    before, after = small_channels_error(path, x), small_channels_error(kept, x)
    assert after < 0.1 * before, (before, after)


def test_the_weight_and_its_scales(written: tuple[Path, Tensor]) -> None:
    model = onnx.load(written[0])
    sizes = [each.ByteSize() for each in model.graph.initializer]
    equal_columns(model)
    held = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    weight, scale = held["columns_0.weight"], held["columns_0.scale"]
    largest = np.abs(weight).max(0)
    assert scale.min() == 1.0 and scale.max() == scale[5] == MOST and weight.dtype == scale.dtype == np.float32
    np.testing.assert_allclose(largest[[0, 3]], [largest[0], largest.max()])
    assert sum(each.ByteSize() for each in model.graph.initializer) < sum(sizes) + 200  # the old weight is gone


def test_equal_columns_stay(tmp_path: Path) -> None:
    layer, path = nn.Linear(8, 8), tmp_path / "model.onnx"
    layer.weight.data = torch.eye(8)
    write_onnx(layer.eval(), {"input": torch.randn(2, 3, 8)}, path, opset=20)
    model = onnx.load(path)
    assert equal_columns(model) == 0 and [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
