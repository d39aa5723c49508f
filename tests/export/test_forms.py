"""Forms of ONNX: MatMulInteger written out, and types of 4 bits; and what stands in the way of an export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quant import tiny_families
from torch import Tensor, nn

import s2d
from s2d.errors import InputError, MissingExtra
from s2d.export import graphs, open_exported
from s2d.export.gate import cosine
from s2d.optional import require

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')


def quantized(name: str, spec: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    family = tiny_families.one_block(tiny_families.build(name))
    batches = [{key: value for key, value in batch.items() if isinstance(value, Tensor)} for batch in family.batches]
    return s2d.quantize(family.model, spec, calibration=batches), batches[0]


@pytest.mark.parametrize("name", ["vit-classifier", "bert", "llama"])
@pytest.mark.parametrize(("form", "spec"), [("integer", "w4a4"), ("integer", "w8a8"), ("types", "w4a4")])
def test_every_layer_computes_the_same_in_every_form(name: str, form: Any, spec: str, tmp_path: Path) -> None:
    model, example = quantized(name, spec)
    report = s2d.export(model, tmp_path / "model.onnx", example=example, form=form, embeddings=0, describe=False)
    assert report.passed and report.layers
    file = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert {entry.key: entry.value for entry in file.metadata_props}["s2d.form"] == form
    kinds = [node.op_type for node in file.graph.node]
    if form == "integer":
        assert kinds.count("MatMulInteger") == len(report.layers)
    else:
        codes = {each.name for each in file.graph.initializer if each.data_type == onnx.TensorProto.INT4}
        read = [node for node in file.graph.node if node.input and node.input[0] in codes]
        assert len(read) == len(report.layers) and {node.op_type for node in read} == {"DequantizeLinear"}
    with torch.no_grad():
        assert cosine(open_exported(tmp_path / "model.onnx")(**example), model(**example)) > 0.95


def test_tables_of_4_bits_and_token_ranges_in_the_form_of_types(tmp_path: Path) -> None:
    spec = {"weight": {"bits": 4}, "activation": {"bits": 8, "granularity": "token"}}
    model, example = quantized("bert", spec)
    report = s2d.export(model, tmp_path / "model.onnx", example=example, form="types", embeddings=4, describe=False)
    assert report.passed and report.embeddings == 4


def test_a_model_that_changed_after_calibration_is_refused(tmp_path: Path) -> None:
    model, example = quantized("bert", "w4a8")
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(InputError, match="changed after it was calibrated.*quantize it again"):
        s2d.export(model, tmp_path / "model.onnx", example=example)
    assert list(tmp_path.iterdir()) == []


def test_a_model_from_the_disk_is_the_one_that_was_calibrated(tmp_path: Path) -> None:
    model, example = quantized("bert", "w4a8")
    s2d.save(model, tmp_path / "q")
    loaded = s2d.load(tmp_path / "q").model
    s2d.export(loaded, tmp_path / "model.onnx", example=example, describe=False)
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert stored["s2d.spec"] == "w4a8" and len(stored["s2d.calibrated"]) == 16


def test_forms_are_named(tmp_path: Path) -> None:
    model, example = quantized("bert", "w4a8")
    for form, name, message in (
        ("typed", "model.onnx", "unknown form 'typed'; did you mean types"),
        ("types", "model.xml", "form types is one of ONNX"),
    ):
        with pytest.raises(InputError, match=message):
            s2d.export(model, tmp_path / name, example=example, form=form)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "site"),
    [("w8a2", "uint2"), ("w3a3", "uint3"), ({"base": "w8a8", "activation": {"format": "int4"}}, "int4")],
)
def test_grids_inside_a_4_bit_type_are_refused_before_the_trace(
    spec: Any, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "write_onnx", lambda *_, **__: pytest.fail("traced"))
    model, example = quantized("bert", spec)
    with pytest.raises(InputError, match=f" is {site}, which form types stores in a 4-bit type.*use form qdq, or"):
        s2d.export(model, tmp_path / "model.onnx", example=example, form="types")


def test_a_span_of_a_free_length_is_refused_before_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(graphs, "write_onnx", lambda *_, **__: pytest.fail("traced"))
    for name, spec in (("llama", "w8a8kv8"), ("bert", "w16a16kv4")):
        model, example = quantized(name, spec)
        with pytest.raises(InputError, match="k has a range for 32 tokens, which OpenVINO.* name the file NAME.onnx"):
            s2d.export(model, tmp_path / "model.xml", example=example)


@pytest.mark.parametrize("spec", ["w8a5", "w8a3"])
def test_the_encodings_file_takes_no_grid_inside_a_type(spec: str, tmp_path: Path) -> None:
    model, example = quantized("bert", {"base": spec, "attention": False})
    with pytest.raises(InputError, match=f"rounds its input to uint{spec[-1]}, and the encodings file describes"):
        s2d.export(model, tmp_path / "model.encodings", example=example)


def test_a_package_that_is_too_old_is_named_with_the_install_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnxruntime

    model, example = quantized("bert", "w4a8")
    monkeypatch.setattr(onnxruntime, "__version__", "1.16.3")
    with pytest.raises(MissingExtra, match=r'onnxruntime 1\.16\.3 is too old, 1\.22 is needed; .*--upgrade "s2d\[exp'):
        s2d.export(model, tmp_path / "model.onnx", example=example)
    assert require("onnx", "export", at_least="1.2") is onnx  # 1.18 is younger than 1.2


def test_a_disk_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, example = quantized("bert", "w4a8")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: "):
        s2d.export(model, tmp_path / "file" / "model.onnx", example=example)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="could not write .*model.onnx: No space left on device"):
        s2d.export(model, tmp_path / "model.onnx", example=example, time_it=False)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
