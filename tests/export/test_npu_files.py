"""Files for NPUs: 16-bit activations, weights in blocks, scales that are powers of two, fixed sizes, placed nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.quant import tiny_families
from torch import Tensor, nn

import s2d
from s2d.cli import main
from s2d.errors import InputError
from s2d.export import open_exported
from s2d.export.fixed_shapes import fitted
from s2d.export.gate import cosine
from s2d.export.runtime import find_runtime
from s2d.export.torch_int import integer_model

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
runtime = pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')


def quantized(name: str, spec: Any) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    family = tiny_families.build(name)
    batches = [{key: value for key, value in batch.items() if isinstance(value, Tensor)} for batch in family.batches]
    return s2d.quantize(family.model, spec, calibration=batches), batches


def constants(path: Path, kind: str) -> list[tuple[np.ndarray, ...]]:
    """The constant inputs, scale first, of every node of a kind."""
    graph = onnx.load(path).graph
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    held |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    return [tuple(held[name] for name in node.input[1:]) for node in graph.node if node.op_type == kind]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[dict[str, Tensor]], Path]:
    model, batches = quantized("bert", "w4auint16")
    path = tmp_path_factory.mktemp("wide") / "model.onnx"
    options: Any = {
        "embeddings": 0,
        "form": "types",
        "shape": {"batch": 2, "tokens": 24},
        "provider": "cpu",
        "fallback": False,
    }
    report = s2d.export(model, path, example=batches[0], describe=False, **options)
    assert report.passed and len(report.layers) == 12 and report.placement and not report.placement.fallen
    return model, batches, path


def test_activations_of_16_bits_compute_the_same_in_a_file_of_fixed_sizes(wide: Any) -> None:
    model, batches, path = wide
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert {kinds[1].dtype for kinds in constants(path, "QuantizeLinear")} == {np.dtype("uint16")}
    sizes = [[each.dim_value for each in value.type.tensor_type.shape.dim] for value in file.graph.input]
    assert sizes == [[2, 24]] * len(file.graph.input)
    runner = open_exported(path)
    for rows, length in ((1, 4), (5, 24)):
        feed = {name: value[:1, :4].repeat(rows, length // 4) for name, value in batches[1].items()}
        with torch.no_grad():
            expected = model(**feed)
        found = runner(**feed)
        assert found.last_hidden_state.shape == expected.last_hidden_state.shape
        assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=2e-3)
        assert found.pooler_output.shape == expected.pooler_output.shape
    with pytest.raises(InputError, match=r"has 25 tokens, and the file takes 24: export with --shape tokens=25"):
        runner(**{name: value[:, :1].repeat(1, 25) for name, value in batches[0].items()})


def test_what_has_no_mask_is_not_filled_up() -> None:
    with pytest.raises(InputError, match="no mask"):
        fitted({"input_ids": torch.ones(2, 3, dtype=torch.long)}, {"batch": 1, "tokens": 4}, 0)


def test_no_product_of_bytes_takes_16_bits(wide: Any) -> None:
    model, batches, _ = wide
    plain = integer_model(model)
    assert not any(hasattr(module, "integer_codes") for module in plain.modules())
    with torch.no_grad():
        assert cosine(plain(**batches[0]), model(**batches[0])) > 0.9999


def test_weights_of_4_bits_in_blocks_are_blocks_in_the_file(tmp_path: Path) -> None:
    spec = {"base": "w4aint16", "weight": {"bits": 4, "granularity": "group-16"}, "attention": False}
    model, batches = quantized("bert", spec)
    report = s2d.export(model, tmp_path / "m.onnx", example=batches[0], form="types", embeddings=0, describe=False)
    assert report.passed and len(report.layers) == 12
    graph = onnx.load(tmp_path / "m.onnx").graph
    narrow = {each.name for each in graph.initializer if each.data_type == onnx.TensorProto.INT4}
    read = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in narrow]
    blocks = [{each.name: each.i for each in node.attribute} for node in read]
    assert len(blocks) == 12 and all(each["block_size"] == 16 and each["axis"] == 0 for each in blocks)
    kinds = constants(tmp_path / "m.onnx", "QuantizeLinear")
    assert kinds and all(zero.dtype == np.int16 and zero == 0 for _, zero in kinds)


def test_scales_are_powers_of_two_and_zero_points_are_zero(tmp_path: Path) -> None:
    model, batches = quantized("vit-classifier", find_runtime("ryzen-ai").spec)
    report = s2d.export(
        model, tmp_path / "m.onnx", example=batches[0], form="types", shape={"batch": 1}, describe=False
    )
    assert report.passed
    kinds = constants(tmp_path / "m.onnx", "QuantizeLinear")
    assert kinds and all(zero.dtype == np.int8 and zero == 0 for _, zero in kinds)
    scales = [
        each[0] for kind in ("QuantizeLinear", "DequantizeLinear") for each in constants(tmp_path / "m.onnx", kind)
    ]
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales)


def test_methods_that_leave_powers_of_two_are_refused() -> None:
    spec = {"weight": {"bits": 8}, "activation": {"format": "int8-pow2"}}
    family = tiny_families.build("vit-classifier")
    with pytest.raises(InputError, match=r"ptq4vit finds scales off the powers of two of int8-pow2; use rtn"):
        s2d.quantize(family.model, spec, calibration=family.batches, method="ptq4vit")


@pytest.mark.skipif("AzureExecutionProvider" not in runtime.get_available_providers(), reason="no such provider")
def test_a_file_that_falls_back_is_not_left(tmp_path: Path) -> None:
    model, batches = quantized("vit-classifier", "w8a8")
    options: Any = {"example": batches[0], "describe": False, "provider": "azure"}  # it takes no node of this kind
    with pytest.raises(InputError, match="on AzureExecutionProvider; back on the CPU: .*MatMul.*no-fallback"):
        s2d.export(model, tmp_path / "m.onnx", fallback=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_asks_for_sizes_and_devices_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["export", str(tmp_path / "absent"), "--out", str(tmp_path / "m.onnx")]
    for more, message in (
        (["--for", "qnn"], "qnn compiles fixed shapes; add --shape batch=1,tokens=128"),
        (["--for", "qnn", "--shape", "batch=1", "--no-fallback"], "this onnxruntime has no QNNExecutionProvider"),
        (["--shape", "rows=1"], "sizes are batch and tokens"),
        (["--provider", "cpuu"], "no provider 'cpuu'"),
    ):
        assert main([*begin, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_encodings_put_the_codes_back(tmp_path: Path) -> None:
    spec = {"base": "w4auint16", "attention": False}
    model, batches = quantized("bert", spec)
    report = s2d.export(model, tmp_path / "m.encodings", example=batches[0])
    assert report.passed and len(report.layers) == 12 and report.parity["exported"] < 1e-5
    told = json.loads((tmp_path / "m.encodings").read_text())
    assert told["version"] == "1.0.0" and len(told["param_encodings"]) == 12
    file = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear", "Clip"} & {node.op_type for node in file.graph.node}
    held = {each.name: each for each in file.graph.initializer}
    for entry in told["param_encodings"]:
        weight = onnx.numpy_helper.to_array(held[entry["name"]])
        codes = weight / np.array(entry["scale"], np.float32) - entry["offset"][0]
        assert np.abs(codes - codes.round()).max() < 1e-3 and codes.min() > 0 and codes.max() < 2 ** entry["bw"]
    # Rounded where the encodings say so, the float32 file computes what the quantized model does.
    ranges = {each["name"]: each for each in told["activation_encodings"]}
    for node in list(file.graph.node):
        for index, name in enumerate(node.input):
            if node.op_type == "MatMul" and index == 0 and name in ranges:
                scale, zero = ranges[name]["scale"][0], -ranges[name]["offset"][0]
                parts = {"scale": np.float32(scale), "zero": np.uint16(zero)}
                names = [f"{node.name}.{part}" for part in parts]
                file.graph.initializer.extend(map(onnx.numpy_helper.from_array, map(np.array, parts.values()), names))
                place = list(file.graph.node).index(node)
                steps = [("QuantizeLinear", name, "codes"), ("DequantizeLinear", f"{node.name}.codes", "rounded")]
                for step, (kind, source, made) in enumerate(steps):
                    pair = onnx.helper.make_node(kind, [source, *names], [f"{node.name}.{made}"])
                    file.graph.node.insert(place + step, pair)
                node.input[0] = f"{node.name}.rounded"
    onnx.save(file, tmp_path / "again.onnx")
    with torch.no_grad():
        expected = model(**batches[1]).last_hidden_state
    assert torch.allclose(open_exported(tmp_path / "again.onnx")(**batches[1]).last_hidden_state, expected, atol=2e-3)
    with pytest.raises(InputError, match="operands of attention are rounded, which the encodings file cannot hold"):
        s2d.export(quantized("bert", "w8a8")[0], tmp_path / "n.encodings", example=batches[0])


@pytest.mark.parametrize("activation", [{"bits": 8}, "keep"])
def test_core_ml_reads_the_weights_back_to_the_bit(activation: Any, tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason='coremltools is not installed: pip install "s2d[coreml]"')
    from s2d.export.coreml import read_back

    spec = {"weight": {"bits": 8}, "activation": activation, "attention": False}
    model, batches = quantized("vit-classifier", spec)
    report = s2d.export(model, tmp_path / "m.mlpackage", example=batches[0], shape={"batch": 1})
    assert report.passed and report.parity["exported"] == len(report.layers)
    kinds, weights = read_back(tmp_path / "m.mlpackage")
    assert kinds["constexpr_blockwise_shift_scale"] == len(report.layers)
    assert kinds.get("quantize", 0) == kinds.get("dequantize", 0) and ("quantize" in kinds) == (activation != "keep")
    first: Any = next(module for module in model.modules() if hasattr(module, "weight_quantizer"))
    with torch.no_grad():
        wanted = first.weight_quantizer(first.weight).numpy()
    assert any(each.shape == wanted.shape and np.array_equal(each, wanted) for each in weights)
