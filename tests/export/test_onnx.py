"""Exported files: every family against the simulated model in the real runtimes, and the gate that guards them."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quant.tiny_families import Family, build, one_block, outlying
from tests.tiny_text import make_data, make_model
from torch import Tensor, nn

import s2d
from s2d.cli import main
from s2d.errors import InputError
from s2d.export import exporters, open_exported
from s2d.export.gate import Check, cosine
from s2d.export.lowering import lower, round_embeddings
from s2d.export.onnx import EXACT, kernels, session, write_onnx
from s2d.export.parity import LayerParity, compare_layers
from s2d.export.table_bits import table_bits

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxscript", reason='onnxscript is not installed: pip install "s2d[export]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is not installed: pip install "s2d[export]"')

ONE_BLOCK = ("vit-classifier", "clip", "siglip-vision", "llama")  # for time; the others have two
FAMILIES = (*ONE_BLOCK, "bert", "plain", "torch-pre-norm", "timm-vit", "open-clip")
INTEGER = {"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul"}


def tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def case(family: Family, spec: Any = "w4a4", method: str = "rtn") -> tuple[nn.Module, list[dict[str, Tensor]]]:
    batches = [tensors(batch) for batch in family.batches]
    return s2d.quantize(family.model, spec, calibration=batches, method=method), batches


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    return case(one_block(build("bert")))


@pytest.fixture(scope="module")
def lowered(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The file of `bert` as it is traced, and what was traced."""
    made, path = lower(bert[0]), tmp_path_factory.mktemp("lowered") / "model.onnx"
    write_onnx(made, bert[1][0], path)
    return path, made


@pytest.fixture(scope="module")
def exported(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    s2d.export(bert[0], path, example=bert[1][0], embeddings=0, time_it=False)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_every_family_computes_the_same_with_integer_kernels(name: str, tmp_path: Path) -> None:
    model, batches = case(one_block(build(name)) if name in ONE_BLOCK else build(name))
    report = s2d.export(model, tmp_path / "model.onnx", example=batches[0], embeddings=0, time_it=False)
    linears = sum(site.what == "weight" and site.format is not None for site in s2d.quant.record(model).sites)  # type: ignore[attr-defined]
    bare = sum(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    assert report.passed and len(report.layers) == linears - bare
    assert sum(count for kind, count in report.kernels.items() if kind in INTEGER) >= len(report.layers)
    told = json.loads((tmp_path / "model.json").read_text())
    assert told["export"]["passed"] and told["export"]["layers"][0]["error"] <= 1e-5
    with torch.no_grad():
        assert cosine(open_exported(tmp_path / "model.onnx")(**batches[1]), model(**batches[1])) > 0.95


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("w8a8", "rtn"),
        ("w4a16", "rtn"),
        ({"weight": {"bits": 4}, "activation": {"bits": 4}, "ends": "w8a8"}, "rtn"),
        ({"weight": {"bits": 4}, "activation": {"format": "int4"}}, "rtn"),
        ({"weight": {"bits": 8}, "activation": {"format": "int8", "granularity": "token"}}, "rtn"),
        ({"weight": {"bits": 4}, "activation": {"bits": 8, "granularity": "token"}}, "rtn"),
        ({"weight": {"bits": 4, "granularity": "group-16"}, "activation": {"bits": 8}}, "rtn"),
        ("w4a4", "rotation+svdquant"),
        ("w4a4", "repq+qwt"),
    ],
    ids=["w8a8", "w4a16", "ends", "signed", "signed-token", "token", "group", "rotation+svdquant", "repq+qwt"],
)
def test_every_kind_of_spec_and_method_computes_the_same(spec: Any, method: str, tmp_path: Path) -> None:
    model, batches = case(one_block(outlying()), spec, method)
    report = s2d.export(model, tmp_path / "model.onnx", example=batches[0], time_it=False)
    assert report.passed and report.layers


def test_codes_are_four_bits_wide_on_disk_and_hold_the_weights(bert: Any, lowered: Any) -> None:
    model, _ = bert
    stored = {each.name: each for each in onnx.load(lowered[0]).graph.initializer}
    codes = {name: each for name, each in stored.items() if name.endswith(".codes")}
    assert len(codes) == 6 and {each.data_type for each in codes.values()} == {onnx.TensorProto.INT4}
    layer = model.get_submodule("encoder.layer.0.intermediate.dense")
    name = "model.encoder.layer.0.intermediate.dense.weight_codes"
    values = onnx.numpy_helper.to_array(stored[f"{name}.codes"]).astype("float32")
    values = values * onnx.numpy_helper.to_array(stored[f"{name}.weight_scale"])
    assert torch.equal(torch.from_numpy(values).T, layer.weight_quantizer(layer.weight))  # type: ignore[operator]
    assert len(codes[f"{name}.codes"].raw_data) * 2 == layer.weight.numel()  # type: ignore[union-attr,operator,arg-type]


def test_batch_and_length_are_free(bert: Any, exported: Path) -> None:
    model, _ = bert
    runner = open_exported(exported)
    for rows, length in ((1, 4), (7, 20)):
        inputs = {
            "input_ids": torch.randint(3, 64, (rows, length)),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
        }
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
        assert runner(**inputs).last_hidden_state.shape == expected.shape
        assert cosine(runner(**inputs), expected) > 0.99


def test_exact_products_are_asked_for_where_they_would_overflow(lowered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("s2d.export.onnx")
    for answer in (True, False):
        monkeypatch.setattr(module, "overflows", lambda answer=answer: answer)
        options = session(lowered[0]).get_session_options()
        if answer:
            assert options.get_session_config_entry(EXACT[0]) == EXACT[1]
        else:
            with pytest.raises(RuntimeError):  # there is no such entry
                options.get_session_config_entry(EXACT[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_embedding_tables_shrink_and_the_reference_has_the_same_ones(bits: int, bert: Any, tmp_path: Path) -> None:
    model, batches = bert
    report = s2d.export(model, tmp_path / "model.onnx", example=batches[0], embeddings=bits, time_it=False)
    stored = {each.name: each for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    table = stored["model.embeddings.word_embeddings.codes"]
    assert table.data_type == (onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8)
    assert report.passed and report.embeddings == bits and "embeddings at" in report.label[0]


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(64, 32), nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.table(ids))


def test_tables_get_4_bits_where_that_loses_little_beside_the_weights() -> None:
    torch.manual_seed(0)
    model, batch = Lookup(), {"ids": torch.randint(64, (4, 9))}
    narrow, plain = copy.deepcopy(model), model(**batch)
    round_embeddings(narrow, 4)
    lost = (narrow(**batch) - plain).norm()
    for spec, bits in (("w2a16", 4), ("w8a16", 8)):  # weights that lose much, and almost nothing
        quantized = s2d.quantize(model, {"base": spec, "overrides": {"*": spec}}, calibration=[batch])
        assert (lost < (quantized(**batch) - plain).norm() / 4) == (bits == 4)
        assert table_bits(quantized, batch, Check()) == bits


def test_tables_that_are_tied_to_a_head_stay() -> None:
    model, _ = case(build("llama-tied"))
    assert round_embeddings(model, 8) == []


def test_a_layer_that_computes_something_else_is_found_and_no_file_is_left(
    bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = bert
    honest = lower

    def tampered(*arguments: Any, **options: Any) -> nn.Module:
        made = honest(*arguments, **options)
        codes = made.get_submodule("encoder.layer.0.output.dense.weight_codes").codes
        codes[0] = -codes[0]  # type: ignore[index,operator]
        return made

    monkeypatch.setattr(importlib.import_module("s2d.export.graphs"), "lower", tampered)
    with pytest.raises(InputError, match=r"not written: 1 of 6 layers differ; worst encoder\.layer\.0\.output\.dense"):
        s2d.export(model, tmp_path / "model.onnx", example=batches[0], time_it=False)
    assert list(tmp_path.iterdir()) == []
    report = s2d.export(model, tmp_path / "model.onnx", example=batches[0], time_it=False, force=True)
    assert not report.passed and (tmp_path / "model.onnx").is_file()


def test_a_flipped_code_is_told_from_a_wrong_layer(bert: Any, lowered: Any) -> None:
    model, batches = bert
    path, made = lowered
    rows, missing = compare_layers(path, made, model, batches[0])
    assert not missing and all(row.passed and row.error < 1e-6 for row in rows)
    counts, held = kernels(path)
    assert sum(counts.get(kind, 0) for kind in INTEGER) == 8 and held > 0


def test_two_rows_on_the_other_side_of_a_tie_are_none_too_many_in_a_small_batch() -> None:
    assert LayerParity("x", 1e-7, 2 / 32, 32).passed and not LayerParity("x", 1e-7, 3 / 32, 32).passed
    assert LayerParity("x", 1e-7, 0.01, 1000).passed and not LayerParity("x", 1e-7, 0.011, 1000).passed
    assert not LayerParity("x", 2e-5, 0.0, 32).passed


def test_openvino_runs_the_same_file_and_its_own(bert: Any, exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason='openvino is not installed: pip install "s2d[openvino]"')
    model, batches = bert
    report = s2d.export(model, tmp_path / "own.xml", example=batches[0], embeddings=0, time_it=False)
    assert report.passed and {each.name for each in tmp_path.glob("own*")} == {"own.xml", "own.bin", "own.json"}
    assert any("I8" in kind for kind in report.openvino)
    written = sum((tmp_path / name).stat().st_size for name in ("own.xml", "own.bin"))
    assert report.file_mb == pytest.approx(written / 1e6)
    with torch.no_grad():
        expected = model(**batches[0])
    for runner in (open_exported(tmp_path / "own.xml"), open_exported(exported, runtime="openvino")):
        assert cosine(runner(**batches[0]), expected) > 0.95


def test_ctrl_c_is_no_crash_after_models_of_openvino_closed_in_any_order(lowered: Any) -> None:
    pytest.importorskip("openvino", reason='openvino is not installed: pip install "s2d[openvino]"')
    code = f"""
import os, signal
from s2d.export import OpenVinoModel
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background has it ignored
first, second = OpenVinoModel({str(lowered[0])!r}), OpenVinoModel({str(lowered[0])!r})
del first
del second
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_bad_input(bert: Any, tmp_path: Path) -> None:
    model, batches = bert
    assert set(exporters()) == {".onnx", ".xml", ".gguf", ".pte", ".mlpackage", ".encodings", ""} and all(
        exporters().values()
    )
    plain = build("bert").model
    for arguments, message in (
        ((plain, "m.onnx", batches[0]), "not quantized; run s2d quantize first"),
        ((model, "m.tflite", batches[0]), "unknown kind of file; name it NAME.onnx, NAME.xml"),
        ((model, "m.onnx", {}), "a batch of two or more"),
        ((model, "m.onnx", {name: value[:1] for name, value in batches[0].items()}), "a batch of two or more"),
    ):
        with pytest.raises(InputError, match=message):
            s2d.export(arguments[0], tmp_path / arguments[1], example=arguments[2])
    with pytest.raises(InputError, match="number of bits"):
        s2d.export(model, tmp_path / "m.onnx", example=batches[0], embeddings=12)
    with pytest.raises(InputError, match="is a folder"):
        (tmp_path / "d.onnx").mkdir()
        s2d.export(model, tmp_path / "d.onnx", example=batches[0])
    with pytest.raises(InputError, match="not an exported model"):
        open_exported(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="cannot run"):
        open_exported(tmp_path / "broken.onnx")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    model, data = make_model(tmp_path / "bert"), make_data(tmp_path / "data")
    task = ["--task", "text-classification", "--data", str(data), "-o", "task.max_length=24"]
    steps = ["--steps", "2", "-o", "train.batch_size=16"]
    assert main(["condition", str(model), *task, "--out", str(tmp_path / "c"), *steps, "-q"]) == 0
    assert main(["quantize", str(tmp_path / "c"), *task, "--out", str(tmp_path / "q"), "-q"]) == 0
    capsys.readouterr()
    out = tmp_path / "made" / "model.onnx"
    assert main(["export", str(tmp_path / "q"), "--out", str(out), *task, "--no-time"]) == 0
    said = capsys.readouterr().out
    assert "passed" in said and "accuracy (validation): simulated" in said and "no CPU multiplies 4 by 4 bits" in said
    assert out.is_file() and out.with_suffix(".json").is_file()
    assert (out.with_suffix(".inputs") / "tokenizer.json").is_file()
    for arguments, message in (
        ([str(tmp_path / "q")], "add --out NAME.onnx"),
        ([str(model), "--out", str(out)], "is not quantized; first: s2d quantize"),
        ([str(tmp_path / "q"), "--out", str(tmp_path / "m.bin")], "unknown kind of file"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
