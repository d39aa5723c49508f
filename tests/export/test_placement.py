"""Where onnxruntime puts nodes, on a graph written by hand and on providers that every onnxruntime has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from s2d.commands.bench import bench
from s2d.errors import InputError

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
runtime = pytest.importorskip("onnxruntime", minversion="1.24", reason="onnxruntime of 1.24 or later is not installed")

from s2d.export.placement import placement, provider_name, refuse_fallback  # noqa: E402


@pytest.fixture
def path(tmp_path: Path) -> Path:
    node, sides = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    nodes = [node("MatMul", ["x", "weight"], ["h"]), node("Relu", ["h"], ["r"]), node("Neg", ["r"], ["y"])]
    x, y = (sides(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = onnx.helper.make_graph(nodes, "three", [x], [y], [weight])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10),
        tmp_path / "three.onnx",
    )
    return tmp_path / "three.onnx"


def test_all_nodes_are_on_the_cpu_that_was_asked_for(path: Path) -> None:
    found = placement(path, "cpu")
    assert found.placed == {"MatMul": 1, "Relu": 1, "Neg": 1} and found.fallen == {}
    assert str(found).endswith("three.onnx: 3 of 3 nodes on CPUExecutionProvider")
    refuse_fallback(found)


@pytest.mark.skipif("AzureExecutionProvider" not in runtime.get_available_providers(), reason="no such provider")
def test_nodes_that_fell_back_are_named_and_refused(path: Path) -> None:
    found = placement(path, "azure")  # it takes no node of this kind
    assert found.placed == {} and found.fallen == {"MatMul": 1, "Relu": 1, "Neg": 1}
    with pytest.raises(InputError, match=r"0 of 3 nodes on AzureExecutionProvider; back on the CPU: .*1 Relu"):
        refuse_fallback(found)
    with pytest.raises(InputError, match="leave out --no-fallback"):
        bench([str(path)], batch="1", rounds=1, provider="azure", no_fallback=True)
    bench([str(path)], batch="1", rounds=1, provider="azure", quiet=True)


def test_bad_input(path: Path) -> None:
    with pytest.raises(InputError, match=r"no provider 'cpuu'.*cpu"):
        provider_name("cpuu")
    with pytest.raises(InputError, match="is no ONNX file"):
        placement(path.with_name("absent.onnx"))
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot open"):
        placement(path)
