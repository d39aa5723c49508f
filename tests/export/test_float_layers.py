"""FP8, MXFP4, MXFP8 and NVFP4 in folders: what compressed-tensors decompresses, and what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import builders
from tests.export.test_layer_formats import batch, language_model
from tests.quant import tiny_families
from torch import Tensor

import s2d
from s2d.errors import InputError
from s2d.export.float_layers import as_read
from s2d.optional import require
from s2d.quant.numerics.formats import FORMATS, BlockFormat
from s2d.quant.numerics.quantizer import block_scales

pytest.importorskip("transformers")
NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    require("transformers", "hf")
    pytest.importorskip("compressed_tensors", reason='not installed: pip install "s2d[compressed-tensors]"')


def without_attention(base: str, **more: Any) -> dict[str, Any]:
    return {"base": base, "attention": False, **more}


@pytest.mark.parametrize(
    ("spec", "format"),
    [
        (without_attention("fp8"), "float-quantized"),
        (without_attention("fp8", weight={"granularity": "tensor"}), "float-quantized"),
        (without_attention("fp8", activation={"granularity": "token"}), "float-quantized"),
        (without_attention("fp8", activation="keep"), "naive-quantized"),
        (without_attention("nvfp4"), "nvfp4-pack-quantized"),
        (without_attention("nvfp4", activation="keep"), "nvfp4-pack-quantized"),
        (without_attention("mxfp4"), "mxfp4-pack-quantized"),
        (without_attention("mxfp8"), "mxfp8-quantized"),
        (without_attention("nvfp4", overrides={"*.down_proj": without_attention("fp8")}), "mixed-precision"),
        (without_attention("nvfp4", overrides={"*.down_proj": "w4a16"}), "mixed-precision"),
    ],
    ids=["fp8", "fp8-tensor", "fp8-token", "fp8-w", "nvfp4", "nvfp4-w", "mxfp4", "mxfp8", "mixed", "integers"],
)
def test_the_library_decompresses_the_very_weights_and_transformers_computes_the_same(
    spec: Any, format: str, tmp_path: Path
) -> None:
    model = language_model(spec)
    report = s2d.export(model, tmp_path / "served", example=batch())
    assert report.passed and len(report.layers) == 14 and not report.unchecked
    settings = json.loads((tmp_path / "served" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == format
    stored = load_file(tmp_path / "served" / "model.safetensors")
    values = decompressed(stored, settings, NAME)
    layer: Any = model.get_submodule(NAME)
    expected = layer.weight_quantizer(layer.weight).detach()
    assert torch.equal(values, expected.to(values.dtype))  # the library unpacks blocks to bfloat16


def test_layers_of_one_input_share_the_scale_that_a_server_has_room_for(tmp_path: Path) -> None:
    model = language_model(without_attention("nvfp4"))
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    before = layer.weight_quantizer.scale.clone()
    report = s2d.export(model, tmp_path / "served", example=batch())
    assert any("layers take the tensor scale" in line for line in report.about)
    stored = load_file(tmp_path / "served" / "model.safetensors")
    scales = {key: float(value) for key, value in stored.items() if key.endswith("weight_global_scale")}
    for index in range(2):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({scales[f"model.layers.{index}.{name}.weight_global_scale"] for name in group}) == 1
    assert len(set(scales.values())) == 8
    assert torch.equal(layer.weight_quantizer.scale, before)  # the model itself is left alone


def decompressed(stored: dict[str, Tensor], settings: dict[str, Any], name: str) -> Tensor:
    """The weight as compressed-tensors' own code unpacks it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    for group in settings["config_groups"].values():
        if name in group["targets"] or group["targets"] == ["Linear"]:
            scheme = QuantizationScheme(**group)
            parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
            compressor: Any = BaseCompressor.get_value_from_registry(group["format"])
            return compressor.decompress(parts, scheme)["weight"]
    raise AssertionError(name)


@pytest.mark.parametrize("spec", ["nvfp4", "fp8"])
def test_a_vision_model_with_biases(spec: str, tmp_path: Path) -> None:
    transformers: Any = require("transformers", "hf")
    options = {**tiny_families.IMAGES, "hidden_size": 64, "intermediate_size": 96}
    model = tiny_families.liven(builders.transformers_model("ViTForImageClassification", "ViTConfig", options))
    torch.manual_seed(0)
    images = {"pixel_values": torch.randn(3, 3, 16, 16)}
    quantized = s2d.quantize(model, without_attention(spec), calibration=[images])
    report = s2d.export(quantized, tmp_path / "served", example=images)
    assert report.passed and len(report.layers) == 12
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "served", dtype=torch.bfloat16)
    with torch.no_grad():
        found = loaded.eval()(images["pixel_values"].bfloat16()).logits.float()
        expected = quantized(**images).logits
    assert float(torch.nn.functional.cosine_similarity(found, expected).min()) > 0.97


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8"])
def test_block_scales_by_the_reader_s_rule_are_the_reader_s(name: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    torch.manual_seed(0)
    format: Any = FORMATS[name]
    quantized = tiny(without_attention(name))
    as_read(quantized)
    quantizer: Any = quantized.get_submodule("0").input_quantizer
    x = torch.randn(40, 8, 64) * 2.0 ** torch.randint(-12, 3, (40, 8, 1))
    x[0, 0, :32] = 0.0
    shared = format.scale is not None
    args = QuantizationArgs(
        num_bits=format.bits,
        type="float",  # pyright: ignore[reportArgumentType]
        strategy="tensor_group" if shared else "group",  # pyright: ignore[reportArgumentType]
        group_size=format.block,
        dynamic=True,
        scale_dtype=torch.float8_e4m3fn if shared else torch.uint8,
    )
    above = (1.0 / quantizer.scale).reshape(1) if shared else None
    theirs, _ = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), above)
    blocks = x.unflatten(-1, (-1, format.block))
    ours = block_scales(blocks, quantizer.scale, quantizer.format).squeeze(-1)
    busy = blocks.abs().amax(-1) > 0
    assert torch.equal(ours[busy], theirs[busy]) and int((~busy).sum()) > 0


def tiny(spec: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)).eval()
    return s2d.quantize(model, spec, calibration=[torch.randn(64, 64)])


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (without_attention("mxfp4"), {"intermediate_size": 80}, r"down_proj has 80 inputs.*blocks of 32.*: nvfp4"),
        (without_attention("nvfp4"), {"intermediate_size": 72}, r"down_proj has 72 inputs.*blocks of 16.*\"fp8\""),
        (without_attention("fp8", weight={"format": "fp8_e5m2"}), {}, r"fp8_e5m2.*nearest spec.*fp8"),
        (without_attention("nvfp4", activation={"bits": 8}), {}, r"nvfp4 weights with uint8 inputs.*one format"),
        (without_attention("nvfp4", prefix=1), {}, r"keeps the first 1 tokens"),
        ("nvfp4", {}, r"operands of attention.*attention: false"),
    ],
    ids=["mxfp4-80", "nvfp4-72", "e5m2", "mixture", "prefix", "attention"],
)
def test_what_has_no_words_is_refused_before_any_work(
    spec: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        s2d.export(language_model(spec, **changes), tmp_path / "served", example=batch())
    assert list(tmp_path.iterdir()) == []


def test_the_rule_of_ocp_stays_the_default() -> None:
    for name in ("mxfp4", "mxfp8", "nvfp4"):
        format: Any = FORMATS[name]
        assert isinstance(format, BlockFormat) and format.rule == "floor"
    seven = torch.tensor([[[7.5, 1.0]]])
    from dataclasses import replace

    format = FORMATS["mxfp4"]
    assert isinstance(format, BlockFormat)
    assert block_scales(seven, torch.ones(()), format).item() == 1.0
    assert block_scales(seven, torch.ones(()), replace(format, rule="even")).item() == 2.0
