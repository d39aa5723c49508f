"""Runtimes as data: the schema, and what is legal where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2d import quant
from s2d.errors import InputError
from s2d.export import export
from s2d.export.runtime import FOLDER, find_runtime, read_runtime, runtimes
from s2d.quant import QuantSpec


class Net(nn.Module):
    """Two Linears, of 32 and 48 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 48), nn.Linear(48, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).relu())


def complaint(runtime: str, spec: Any) -> str | None:
    return find_runtime(runtime).complaint(quant.plan(Net(), QuantSpec.parse(spec)))


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_what_a_runtime_begins_with_is_legal_there(name: str) -> None:
    runtime = find_runtime(name)
    assert runtime.about and runtime.quantizes_itself == (runtime.spec is None)
    if runtime.spec is not None:
        begun = QuantSpec.parse(runtime.spec)
        if name == "vllm-blackwell":  # 48 inputs are no blocks of 16 of them all
            assert complaint(name, begun) is None
        plain = nn.Sequential(nn.Linear(64, 64))
        model = nn.ModuleDict({"layers": nn.ModuleList([plain])})
        assert runtime.complaint(quant.plan(model, begun)) is None


def test_four_bit_activations_are_refused_where_they_buy_nothing() -> None:
    for name in ("onnxruntime", "openvino"):
        found = complaint(name, "w4a4")
        assert found is not None and "uint4" in found and "--spec '{base: w8a8, attention: false}'" in found
        assert complaint(name, "w4a8") is None and complaint(name, "w8a8-token") is None
    assert complaint("executorch", "w4aint16") is not None, "static inputs have 8 bits there"


def test_sizes_that_do_not_divide_are_named() -> None:
    found = complaint("executorch", "w4a8-token")
    assert found is not None and "layers.1 of 32 x 48" in found and "multiples of 1 outputs and 32 inputs" in found
    spec = {"base": "w4a8-token", "overrides": {"layers.1": "keep"}}
    assert complaint("executorch", spec) is None


def test_fused_layers_share_their_width() -> None:
    attention = nn.ModuleDict({f"{each}_proj": nn.Linear(32, 32) for each in "qkv"})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": attention})])})
    spec = {"base": "w4a8-token", "overrides": {"*.k_proj": {"weight": {"bits": 8}}}}
    found = find_runtime("vllm-arm").complaint(quant.plan(model, QuantSpec.parse(spec)))
    assert found is not None and "layers.0.attn" in found and "k_proj int8 (channel)" in found
    assert find_runtime("onnxruntime").complaint(quant.plan(model, QuantSpec.parse(spec))) is None


def test_time_is_weighted_by_weights() -> None:
    runtime = find_runtime("onnxruntime")
    fast = next(layer.time for layer in runtime.layers if layer.inputs is not None and layer.time)
    assert runtime.time_of(quant.plan(Net(), QuantSpec.parse("w8a8"))) == pytest.approx(fast)
    half = QuantSpec.parse({"base": "w8a8", "overrides": {"layers.0": "keep"}})
    assert runtime.time_of(quant.plan(Net(), half)) == pytest.approx((1 + fast) / 2)
    assert [runtime.stored_bits(bits) for bits in (2, 4, 5, 8)] == [4, 4, 8, 8]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("about: x\nfiles: []\nlayer: []\n", "unknown key layer; did you mean layers?"),
        ("files: []\n", "about is missing"),
        ("about: x\nfiles: [.exe]\n", "files.0"),
        ("about: [", "cannot be read as YAML"),
        ("- 1\n", "should hold keys and values"),
        ("about: !!python/object/apply:os.getcwd []\nfiles: []\n", "cannot be read as YAML"),
        (
            "about: x\nfiles: []\nspec: w8a8\nlayers: [{weights: {formats: [int9], granularity: [channel]}, "
            "kernel: k, source: s}]\n",
            "unknown number format 'int9'",
        ),
        (
            "about: x\nfiles: []\nspec: w8a8\nlayers: [{weights: {format: [int8], granularity: [channel]}, "
            "kernel: k, source: s}]\n",
            "did you mean formats?",
        ),
        ("about: x\nfiles: []\nspec: w8a8\n", "a runtime with layers has a spec"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_runtime(path)
    assert str(path) in str(raised.value) and said in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_runtime_lists_close_names() -> None:
    with pytest.raises(InputError, match="did you mean onnxruntime"):
        find_runtime("onnx-runtime")
    assert "onnxruntime" in runtimes()


def test_names_of_files_are_those_of_the_runtime() -> None:
    find_runtime("openvino").check_file(Path("model.xml"))
    with pytest.raises(InputError, match=r"model\.onnx"):
        find_runtime("onnxruntime").check_file(Path("model.xml"))
    with pytest.raises(InputError, match="writes no file for hailo"):
        find_runtime("hailo").check_file(Path("model.onnx"))


@pytest.mark.parametrize("spec", ["w8a8", "w4a8", "w8a8-token", "w8a16", {"base": "w8a8", "attention": False}])
def test_what_is_legal_for_onnxruntime_exports_and_runs(spec: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(4, 6, 32)
    model = quant.quantize(Net(), spec, calibration=[{"x": x}])
    find_runtime("onnxruntime").refuse(quant.record(model).sites)
    report = export(model, tmp_path / "net.onnx", example={"x": x}, time_it=False)
    assert report.passed and not report.unchecked
