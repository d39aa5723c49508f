"""Constants that a branch alone reads stay; those that nothing reads go."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
runtime = pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

from s2d.export.onnx_nodes import put_nodes  # noqa: E402  (after the libraries that it needs)


def test_what_a_branch_reads_is_read() -> None:
    make, kind = onnx.helper, onnx.TensorProto.FLOAT

    def branch(constant: str) -> object:
        out = make.make_tensor_value_info(f"{constant}.out", kind, [2])
        return make.make_graph([make.make_node("Identity", [constant], [f"{constant}.out"])], constant, [], [out])

    chosen = make.make_node("If", ["yes"], ["y"], then_branch=branch("one"), else_branch=branch("two"))
    given = [make.make_tensor_value_info("yes", onnx.TensorProto.BOOL, [])]
    out = [make.make_tensor_value_info("y", kind, [2])]
    held = [onnx.numpy_helper.from_array(np.full(2, value, np.float32), name)
            for name, value in (("one", 1.0), ("two", 2.0), ("three", 3.0))]  # fmt: skip
    model = make.make_model(make.make_graph([chosen], "g", given, out, held), ir_version=8)
    put_nodes(model, [*model.graph.node], [onnx.numpy_helper.from_array(np.zeros(1, np.float32), "four")])
    assert [each.name for each in model.graph.initializer] == ["one", "two"]
    onnx.checker.check_model(model)
    run = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [float(run.run(None, {"yes": np.array(yes)})[0][0]) for yes in (True, False)] == [1.0, 2.0]
