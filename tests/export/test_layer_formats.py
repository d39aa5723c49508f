"""Folders of compressed-tensors and GGUF files: what their own libraries read against the simulated model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import builders
from tests.quant import tiny_families
from torch import Tensor, nn

import s2d
from s2d.errors import InputError
from s2d.export import gguf
from s2d.quant.modules.linear import QuantizedLinear

pytest.importorskip("transformers")

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
GROUPS = {"weight": {"bits": 4, "granularity": "group-32"}, "activation": {"bits": 16}}


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, 21).view(2, 9)}


def language_model(spec: Any, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_families.liven(builders.transformers_model("LlamaForCausalLM", "LlamaConfig", {**CONFIG, **changes}))
    calibration = [{**batch(), "use_cache": False}]
    return s2d.quantize(model, spec, calibration=calibration)


def without_attention(bits: int, **activation: Any) -> dict[str, Any]:
    return {"weight": {"bits": bits}, "activation": {"bits": 8, **activation}, "attention": False}


@pytest.mark.parametrize(
    ("spec", "format"),
    [
        ("w4a16", "pack-quantized"),
        ("w3a16", "pack-quantized"),
        (GROUPS, "pack-quantized"),
        (without_attention(4), "pack-quantized"),
        (without_attention(8), "int-quantized"),
        (without_attention(8, granularity="token"), "int-quantized"),
        ({**without_attention(8), "overrides": {"*.down_proj": "w4a16"}}, "mixed-precision"),
    ],
    ids=["channel", "3-bit", "group", "w4a8", "w8a8", "token", "mixed"],
)
def test_transformers_and_compressed_tensors_load_the_folder_and_compute_the_same(
    spec: Any, format: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason='not installed: pip install "s2d[compressed-tensors]"')
    transformers = pytest.importorskip("transformers")
    model = language_model(spec)
    report = s2d.export(model, tmp_path / "served", example=batch())
    assert report.passed and len(report.layers) == 14 and report.embeddings == 0
    assert max(row.error for row in report.layers) < 1e-6
    settings = json.loads((tmp_path / "served" / "config.json").read_text())
    assert settings["quantization_config"]["format"] == format
    assert settings["quantization_config"]["quant_method"] == "compressed-tensors"
    assert json.loads((tmp_path / "served.json").read_text())["export"]["passed"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = model(**batch()).logits, loaded(**batch()).logits
    assert float(torch.nn.functional.cosine_similarity(expected, found, dim=-1).min()) > 0.9999


def test_codes_are_four_bits_wide_in_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason='not installed: pip install "s2d[compressed-tensors]"')
    model = language_model("w4a16")
    s2d.export(model, tmp_path / "served", example=batch())
    stored = load_file(tmp_path / "served" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    packed, scale = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"]
    assert packed.dtype == torch.int32 and packed.numel() * 8 == 96 * 64 and f"{name}.weight" not in stored
    # Eight codes to a word, the first in the lowest bits, 8 above what they stand for.
    codes = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(1) - 8
    layer: Any = model.get_submodule(name)
    torch.testing.assert_close(codes * scale, layer.weight_quantizer(layer.weight))
    assert "lm_head.weight" not in stored  # tied to the table


@pytest.mark.parametrize("spec", ["w4a16", "w8a16", GROUPS], ids=["w4", "w8", "group"])
def test_transformers_reads_the_gguf_file_and_computes_the_same(spec: Any, tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    model = language_model(spec)
    report = s2d.export(model, tmp_path / "model.gguf", example=batch(), embeddings=0)
    assert report.passed and len(report.layers) == 14 and max(row.error for row in report.layers) < 1e-6
    tensors = {each.name: each for each in library.GGUFReader(tmp_path / "model.gguf").tensors}
    kind = library.GGMLQuantizationType.Q8_0 if spec == "w8a16" else library.GGMLQuantizationType.Q4_0
    assert tensors["blk.0.ffn_down.weight"].tensor_type == kind and "output.weight" not in tensors
    values = torch.from_numpy(library.quants.dequantize(tensors["blk.0.ffn_down.weight"].data, kind))
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    expected = layer.weight_quantizer(layer.weight).detach()
    assert values.shape == expected.shape
    assert float(((values - expected).abs() / expected.abs().clamp(min=1e-9)).max()) < 2.0**-11 * 1.01  # d is a half


def test_embedding_tables_at_8_bits_in_gguf(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    model = language_model("w4a16")
    full = s2d.export(model, tmp_path / "full.gguf", example=batch(), embeddings=0)
    report = s2d.export(model, tmp_path / "model.gguf", example=batch())
    assert report.embeddings == 8 and report.file_mb < full.file_mb
    tensors = {each.name: each for each in library.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["token_embd.weight"].tensor_type == library.GGMLQuantizationType.Q8_0


def test_blocks_are_what_gguf_reads() -> None:
    library = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    for bits, kind in ((4, "Q4_0"), (8, "Q8_0")):
        top = 2 ** (bits - 1) - 1
        codes = torch.randint(-top, top + 1, (6, 96), generator=generator).to(torch.int8)
        scale = 2.0 ** -torch.randint(3, 9, (6, 3), generator=generator).float()  # halves hold them exactly
        stored = gguf.blocks(codes, scale, bits)
        values = library.quants.dequantize(stored, getattr(library.GGMLQuantizationType, kind))
        assert torch.equal(torch.from_numpy(values), codes * scale.repeat_interleave(32, 1))


@pytest.mark.parametrize("name", ["served", "model.gguf"])
def test_a_wrong_weight_is_found_and_nothing_is_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors" if name == "served" else "gguf")
    from s2d.export import compressed_tensors

    module: Any = compressed_tensors if name == "served" else gguf
    honest = module.plain_layers

    def tampered(*arguments: Any) -> Any:
        for layer in honest(*arguments):
            if layer.name.endswith("1.mlp.up_proj"):
                layer.weight.codes[3] = -layer.weight.codes[3]
            yield layer

    model = language_model("w4a16")
    monkeypatch.setattr(module, "plain_layers", tampered)
    with pytest.raises(InputError, match=r"not written: 1 of 14 layers differ; worst model\.layers\.1\.mlp\.up_proj"):
        s2d.export(model, tmp_path / name, example=batch())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("served", "w4a8", r"operands of attention.*w8a8-token, attention: false"),
        ("served", {**without_attention(8), "activation": {"format": "int8"}}, r"symmetric activations.*nearest spec"),
        ("model.gguf", without_attention(4), r"rounds its input.*nearest spec is w4a16"),
        ("model.gguf", {"weight": {"bits": 4, "granularity": "group-16"}}, r"blocks of 32.*nearest spec.*group-32"),
    ],
    ids=["attention", "symmetric", "activations", "group-16"],
)
def test_what_the_format_cannot_say_is_refused_with_the_nearest_spec(
    name: str, spec: Any, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors" if name == "served" else "gguf")
    with pytest.raises(InputError, match=message):
        s2d.export(language_model(spec), tmp_path / name, example=batch())
    assert list(tmp_path.iterdir()) == []


def test_bad_input(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("compressed_tensors")
    bert = tiny_families.build("bert")
    model = s2d.quantize(bert.model, "w4a16", calibration=bert.batches)
    with pytest.raises(InputError, match="written for LlamaForCausalLM, not BertModel"):
        s2d.export(model, tmp_path / "model.gguf", example=bert.batches[0])
    plain = tiny_families.build("plain")
    with pytest.raises(InputError, match="holds transformers models; PlainTransformer is none"):
        s2d.export(
            s2d.quantize(plain.model, "w4a16", calibration=plain.batches), tmp_path / "served", example=plain.batches[0]
        )
    outlying = tiny_families.outlying()
    rotated = s2d.quantize(outlying.model, "w4a16", calibration=outlying.batches, method="svdquant")
    with pytest.raises(InputError, match="computes beside the weight"):
        s2d.export(rotated, tmp_path / "served", example=outlying.batches[0])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("dear")
    with pytest.raises(InputError, match="not an empty folder"):
        s2d.export(model, tmp_path / "taken", example=bert.batches[0])
    with pytest.raises(InputError, match="at 8 bits or in full"):
        s2d.export(language_model("w4a16"), tmp_path / "model.gguf", example=batch(), embeddings=4)


def test_a_sentence_encoder_is_written_as_the_model_in_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from s2d.models.heads import SentenceEncoder

    bert = tiny_families.build("bert")
    model = s2d.quantize(SentenceEncoder(bert.model), without_attention(8), calibration=bert.batches)
    report = s2d.export(model, tmp_path / "served", example=bert.batches[0])
    layers = [each for each in model.modules() if isinstance(each, QuantizedLinear)]
    assert report.passed and len(report.layers) == len(layers) and (tmp_path / "served" / "config.json").is_file()
