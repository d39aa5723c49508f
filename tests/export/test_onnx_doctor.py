"""What ruins a range in an ONNX file, and the mended one: on graphs written by hand, so that the truth is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2d.errors import InputError

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
runtime = pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

from tests.export.static_quantizer import in_8_bits  # noqa: E402  (after the libraries that it needs)

from s2d.cli import main  # noqa: E402
from s2d.export import onnx_doctor  # noqa: E402

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
LOWEST = float(np.finfo(np.float32).min)


def attention(
    *, lowest: float, how: str = "where", weight: Any = None, opset: int = 21, scale: float = 1.0, twice: bool = False
) -> Any:
    """Scores of a product with itself, masked and normalised: ``x [batch, tokens, 8]``, ``mask [batch, tokens]``."""
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    held = [
        tensor(np.float32(lowest) if how != "add" else np.array([lowest], np.float32), "lowest"),
        tensor(np.float32(0.0), "zero"),
        tensor(np.float32(1.0), "one"),
        tensor(np.array([1], np.int64), "axes"),
        tensor(np.float32(scale), "scale"),
        tensor(np.eye(8, dtype=np.float32) if weight is None else weight, "weight"),
    ]
    nodes = [
        node("MatMul", ["x", "weight"], ["q"]),
        node("Mul", ["q", "scale"], ["scaled"]),
        node("Transpose", ["x"], ["k"], perm=[0, 2, 1]),
        node("MatMul", ["scaled", "k"], ["scores"]),
        node("Unsqueeze", ["mask", "axes"], ["wide"]),
    ]
    if how == "where":
        nodes += [
            node("Cast", ["wide"], ["seen"], to=onnx.TensorProto.BOOL),
            node("Where", ["seen", "zero", "lowest"], ["bias"]),
        ]
    else:
        nodes += [
            node("Cast", ["wide"], ["floats"], to=FLOAT),
            node("Sub", ["one", "floats"], ["hidden"]),
            node("Mul", ["hidden", "lowest"], ["bias"]),
        ]
    nodes += [node("Add", ["scores", "bias"], ["masked"]), node("Softmax", ["masked"], ["y"], axis=-1)]
    outputs = [onnx.helper.make_tensor_value_info("y", FLOAT, None)]
    if twice:
        nodes.append(node("Mul", ["one", "lowest"], ["told"]))
        outputs.append(onnx.helper.make_tensor_value_info("told", FLOAT, None))
    inputs = [
        onnx.helper.make_tensor_value_info("x", FLOAT, ["batch", "tokens", 8]),
        onnx.helper.make_tensor_value_info("mask", INT64, ["batch", "tokens"]),
    ]
    graph = onnx.helper.make_graph(nodes, "attention", inputs, outputs, held)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def run(path: Path, feed: dict[str, Any]) -> list[Any]:
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)


@pytest.mark.parametrize(("lowest", "how"), [(LOWEST, "where"), (-np.inf, "where"), (-65504.0, "add"), (LOWEST, "add")])
def test_masks_are_named_and_bounded(lowest: float, how: str, tmp_path: Path) -> None:
    onnx.save(attention(lowest=lowest, how=how), tmp_path / "a.onnx")
    (found,) = onnx_doctor.examine(onnx_doctor.open_file(tmp_path / "a.onnx"))
    assert (found.kind, found.where, found.fixed_by) == ("mask", "lowest", "--fix bounds it")
    repair = onnx_doctor.fix(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (repair.masks, repair.bound, repair.stream, repair.columns) == (1, 100.0, 0, 0) and repair.moved <= 1e-6
    assert str(repair).startswith("mask constants at -100: 1; outputs moved by")
    assert onnx_doctor.examine(onnx_doctor.open_file(tmp_path / "b.onnx")) == []
    random = np.random.default_rng(1)
    mask = np.ones((3, 7), np.int64)
    mask[1, 4:] = 0
    feed = {"x": random.standard_normal((3, 7, 8)).astype(np.float32), "mask": mask}
    np.testing.assert_allclose(run(tmp_path / "a.onnx", feed)[0], run(tmp_path / "b.onnx", feed)[0], atol=1e-6)


def test_scores_that_are_larger_than_the_bound_get_a_larger_one(tmp_path: Path) -> None:
    onnx.save(attention(lowest=LOWEST, scale=20.0), tmp_path / "a.onnx")
    repair = onnx_doctor.fix(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert repair.bound > 100.0 and repair.moved <= 1e-6


def test_scores_that_no_bound_is_good_for_are_refused(tmp_path: Path) -> None:
    onnx.save(attention(lowest=LOWEST, scale=1e5), tmp_path / "a.onnx")
    with pytest.raises(InputError, match="still move by.*nodes_to_exclude"):
        onnx_doctor.fix(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_a_constant_that_others_read_stays_theirs(tmp_path: Path) -> None:
    onnx.save(attention(lowest=LOWEST, twice=True), tmp_path / "a.onnx")
    kinds = [each.kind for each in onnx_doctor.examine(onnx_doctor.open_file(tmp_path / "a.onnx"))]
    assert kinds == ["mask", "shared"]
    onnx_doctor.fix(tmp_path / "a.onnx", tmp_path / "b.onnx")
    feed = {"x": np.ones((1, 3, 8), np.float32), "mask": np.ones((1, 3), np.int64)}
    assert run(tmp_path / "b.onnx", feed)[1] == np.float32(LOWEST)


def test_one_large_channel_and_an_old_opset_are_named(tmp_path: Path) -> None:
    weight = np.eye(8, dtype=np.float32)
    weight[:, 5] *= 32.0
    model = attention(lowest=-50.0, weight=weight, opset=13)
    channels, opset = onnx_doctor.examine(model)
    assert channels.kind == "channels" and "channel 5 is 32 times" in channels.text and "5.0 bits" in channels.text
    assert opset.kind == "opset" and "need 21" in opset.text


@pytest.mark.parametrize("kind", ["quantized", "values", "half", "twice", "branch"])
def test_what_cannot_be_mended_or_seen_is_said(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    weight[:, 5] *= 100.0
    model = layers(weight, np.zeros(8, np.float32))
    product = next(each for each in model.graph.node if each.op_type == "MatMul")
    held = next(each for each in model.graph.initializer if each.name == product.input[1])
    if kind == "quantized":
        for name in ("scale", "zero"):
            value = np.float32(0.1) if name == "scale" else np.uint8(0)
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
        model.graph.node.insert(0, onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]))
        expected = ["quantized: 1 nodes: the file is quantized already"]
    elif kind == "values":
        weight[2, 5] = np.nan
        held.CopyFrom(onnx.numpy_helper.from_array(weight, held.name))
        expected = [f"values: {held.name}: 1 values are not finite"]
    elif kind == "half":
        half = onnx.numpy_helper.from_array(weight.astype(np.float16), "half")
        model.graph.initializer.append(half)
        model.graph.node.append(onnx.helper.make_node("MatMul", ["halves", "half"], ["other"]))
        model.graph.input.append(onnx.helper.make_tensor_value_info("halves", onnx.TensorProto.FLOAT16, [2, 8]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT16, [2, 8]))
        expected = ["channels: half: channel 5", "(a scale per channel (per_channel=True in onnxruntime))"]
    elif kind == "twice":
        model.graph.node.append(onnx.helper.make_node("MatMul", ["x", held.name], ["other"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None))
        expected = [f"channels: {held.name}: channel 5"]
    else:
        floats = [onnx.helper.make_tensor_value_info("branch", onnx.TensorProto.FLOAT, None)]
        inner = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["branch"])], "inner", [], floats)
        either = onnx.helper.make_node("If", ["which"], ["other"], then_branch=inner, else_branch=inner)
        model.graph.node.append(either)
        model.graph.input.append(onnx.helper.make_tensor_value_info("which", onnx.TensorProto.BOOL, []))
        model.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None))
        expected = ["2 nodes in branches and loops were not looked at"]
    onnx.save(model, tmp_path / "a.onnx")
    assert main(["doctor", str(tmp_path / "a.onnx")]) == 0
    said = capsys.readouterr().out
    for each in expected:
        assert said.count(each) == 1, said
    if kind in ("quantized", "values"):
        assert "100 times" not in said


@pytest.mark.parametrize(
    ("before", "after", "apart"),
    [
        ([1.0, 2.0], [1.0, 1.0], 0.5),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([1.0, 2.0], [np.nan, 2.0], np.inf),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([-np.inf, 2.0], [-np.inf, 1.0], 0.5),
        ([-np.inf, 2.0], [np.inf, 2.0], np.inf),
        ([1.0, 2.0], [np.inf, 2.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_distances_of_outputs_that_are_not_all_finite(before: list[float], after: list[float], apart: float) -> None:
    a, b = ({"y": np.array(each, np.float32)} for each in (before, after))
    assert onnx_doctor._apart(a, b) == pytest.approx(apart)


def bad_file(kind: str, folder: Path) -> Path:
    """One file that is no ONNX model, or no longer."""
    file = folder / "a.onnx"
    model = attention(lowest=LOWEST, weight=np.ones((8, 8), np.float32))
    if kind == "folder":
        file.mkdir()
    elif kind == "text":
        file.write_bytes(b"no graph")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind.startswith("truncated"):
        content = model.SerializeToString()
        file.write_bytes(content[: len(content) * int(kind.split()[1]) // 100])
    elif kind == "weights":
        next(each for each in model.graph.initializer if each.name == "weight").dims[0] = 9
        file.write_bytes(model.SerializeToString())
    elif kind.startswith("outside"):
        onnx.save(model, file, save_as_external_data=True, location="a.data", size_threshold=0)
        if "missing" in kind:
            (folder / "a.data").unlink()
        else:
            (folder / "a.data").write_bytes((folder / "a.data").read_bytes()[:40])
    return file


@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "text", "empty", "truncated 20", "truncated 50", "truncated 99", "weights",
     "outside missing", "outside truncated"],
)  # fmt: skip
def test_bad_files_are_one_line_of_the_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bad_file(kind, tmp_path)
    for more in ([], ["--fix", str(tmp_path / "b.onnx")]):
        assert main(["doctor", str(file), *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert str(file) in line and "Traceback" not in line
    assert not (tmp_path / "b.onnx").exists()


def test_the_command_names_what_it_finds_and_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, fixed, told = (tmp_path / name for name in ("a.onnx", "b.onnx", "c.json"))
    onnx.save(attention(lowest=LOWEST), file)
    assert main(["doctor", str(file), "--fix", str(fixed), "--json", str(told)]) == 0
    assert "mask: lowest" in capsys.readouterr().out
    content = json.loads(told.read_text())
    assert content["fixed"]["bound"] == 100.0 and [each["kind"] for each in content["findings"]] == ["mask"]
    assert main(["doctor", str(fixed)]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["doctor", "--fix", str(fixed)]) == 2
    assert "name it: s2d doctor MODEL.onnx" in capsys.readouterr().err


def layers(weight_CC: Any, bias_C: Any, *, fixed_rows: int = 0) -> Any:
    """``x [batch, tokens, 8]``: ``h = x W + b``, ``y = norm(x + h)``."""
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    gain = np.ones(8, np.float32)
    gain[5] = 0.01  # as trained norms have it: the channel is large, not its effect
    held = [
        tensor(weight_CC, "weight"),
        tensor(bias_C, "bias"),
        tensor(gain, "gain"),
        tensor(np.eye(8, dtype=np.float32), "eye"),
        tensor(np.array([fixed_rows or -1, 5, 8], np.int64), "shape"),
    ]
    nodes = [
        node("Reshape", ["x", "shape"], ["shaped"]),
        node("MatMul", ["shaped", "weight"], ["product"]),
        node("Add", ["product", "bias"], ["h"]),
        node("Add", ["shaped", "h"], ["sum"]),
        node("LayerNormalization", ["sum", "gain"], ["normed"], axis=-1),
        node("MatMul", ["normed", "eye"], ["y"]),
    ]
    inputs = [onnx.helper.make_tensor_value_info("x", FLOAT, ["batch", 5, 8])]
    outputs = [onnx.helper.make_tensor_value_info("y", FLOAT, None)]
    graph = onnx.helper.make_graph(nodes, "layers", inputs, outputs, held)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def lost_by_8_bits(path: Path, x: Any) -> float:
    """How far onnxruntime's static quantizer takes a file's outputs, over their length."""
    torch = pytest.importorskip("torch")
    before = run(path, {"x": x})[0]
    after = run(in_8_bits(path, {"x": torch.from_numpy(x)}), {"x": x})[0]
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))


@pytest.mark.parametrize("spoiled", ["stream", "channels"])
def test_a_large_channel_is_named_and_the_mended_file_quantizes_better(spoiled: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, bias = random.standard_normal((8, 8)).astype(np.float32) / 3, np.zeros(8, np.float32)
    if spoiled == "stream":
        bias[5] = 200.0
    else:
        weight[:, 5] *= 100.0
    file, fixed, x = tmp_path / "a.onnx", tmp_path / "b.onnx", random.standard_normal((4, 5, 8)).astype(np.float32)
    onnx.save(layers(weight, bias), file)
    found = onnx_doctor.examine(onnx_doctor.open_file(file), {"x": x})
    named = {each.where: each for each in found}
    assert {each.kind for each in found} == {spoiled, "stream", *({"activation"} if spoiled == "channels" else ())}
    assert (
        "channel 5" in named["sum"].text and f"{np.abs((x @ weight + bias + x)[..., 5]).max():.3g}" in named["sum"].text
    )
    repair = onnx_doctor.fix(file, fixed)
    assert repair.moved <= 1e-5 and repair.stream > 0 and repair.columns == (spoiled == "channels")
    np.testing.assert_allclose(run(fixed, {"x": x})[0], run(file, {"x": x})[0], atol=1e-4)
    assert onnx_doctor.examine(onnx_doctor.open_file(fixed), {"x": x}) == []
    before, after = lost_by_8_bits(file, x), lost_by_8_bits(fixed, x)
    assert after < 0.5 * before, (before, after)


def test_constants_that_are_nodes_are_constants(tmp_path: Path) -> None:
    bias = np.zeros(8, np.float32)
    bias[5] = 200.0
    model = layers(np.eye(8, dtype=np.float32), bias)
    for held in list(model.graph.initializer):
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [held.name], value=held))
    del model.graph.initializer[:]
    onnx.save(model, tmp_path / "a.onnx")
    feed = {"x": np.ones((1, 5, 8), np.float32)}
    kinds = {each.where: each.kind for each in onnx_doctor.examine(model, feed)}
    assert kinds["sum"] == "stream"
    onnx_doctor.fix(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert onnx_doctor.examine(onnx_doctor.open_file(tmp_path / "b.onnx"), feed) == []


def test_inputs_are_given_where_none_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, inputs, told = (tmp_path / name for name in ("a.onnx", "x.npz", "told.json"))
    onnx.save(layers(np.eye(8, dtype=np.float32), np.zeros(8, np.float32), fixed_rows=3), file)
    assert main(["doctor", str(file), "--json", str(told)]) == 0
    assert "activations were not looked at" in capsys.readouterr().out
    assert "--inputs FILE.npz" in json.loads(told.read_text())["omitted"][0]
    assert main(["doctor", str(file), "--fix", str(tmp_path / "b.onnx")]) == 2
    x = np.ones((3, 5, 8), np.float32)
    x[..., 2] = 50.0
    np.savez(inputs, x=x)
    capsys.readouterr()
    assert main(["doctor", str(file), "--inputs", str(inputs)]) == 0
    assert "stream: h: channel 2 reaches 50, 50 times" in capsys.readouterr().out
    np.savez(inputs, other=x)
    assert main(["doctor", str(file), "--inputs", str(inputs)]) == 2
    assert "reads x, which the inputs lack" in capsys.readouterr().err
    inputs.write_bytes(b"nothing")
    assert main(["doctor", str(file), "--inputs", str(inputs)]) == 2
    assert "cannot be read as inputs" in capsys.readouterr().err
