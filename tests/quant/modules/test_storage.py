from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.quant.tiny_models import CASES, Case, PlainTransformer
from torch import nn

from s2d.errors import InputError
from s2d.quant import load, quantize, record, remove, save
from s2d.quant.modules.sites import is_quantized
from s2d.quant.modules.storage import decode, encode, pack, unpack
from s2d.quant.numerics.formats import FORMATS, Format
from s2d.quant.numerics.log_and_twin import LogSqrt2Quantizer, TwinQuantizer
from s2d.quant.numerics.quantizer import affine_parameters, fake_quantize

TOKEN = {"base": "w8a8", "activation": {"granularity": "token"}}
X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(5))


def fresh(model: nn.Module) -> nn.Module:
    """The same architecture with other weights."""
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    return other


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 7), st.integers(0, 99))
def test_packing_is_exact(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (-(-codes.numel() // 2) if bits <= 4 else codes.numel())
    assert torch.equal(unpack(packed, bits, (rows, columns)), codes)


@given(
    st.sampled_from([each for each in FORMATS.values() if each.bits <= 8]),
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(0, 99),
)
def test_a_stored_weight_is_the_fake_quantized_one(format: Format, rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3
    scale, zero_point = affine_parameters(weight.min(), weight.max(), format, format.symmetric)
    stored = encode(weight, scale, zero_point, format)
    assert all(part.dtype == torch.uint8 and part.ndim == 1 for part in stored.values())
    assert stored["codes"].numel() == (-(-weight.numel() // 2) if format.bits <= 4 else weight.numel())
    decoded = decode(stored, (rows, columns), scale, zero_point, format)
    assert torch.equal(decoded, fake_quantize(weight, scale, zero_point, format))
    assert torch.equal(fake_quantize(decoded, scale, zero_point, format), decoded)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["w4a4", TOKEN, "fp8", "nvfp4"], ids=["w4a4", "w8a8-token", "fp8", "nvfp4"])
def test_saving_and_loading_is_bit_identical(case: Case, spec: Any, tmp_path: Path) -> None:
    quantized = quantize(case.model, spec, calibration=case.batches)
    save(quantized, tmp_path / "model")
    restored = load(tmp_path / "model", fresh(case.model))
    assert torch.equal(case.output(restored), case.output(quantized))
    assert record(restored) == record(quantized)
    assert restored.state_dict().keys() == quantized.state_dict().keys()
    # Saved again, it is the same file: rounding is idempotent.
    save(restored, tmp_path / "again")
    names = [json.loads((tmp_path / d / "quantization.json").read_text())["tensors"] for d in ("model", "again")]
    assert names[0] == names[1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "bits", ["w8a8", "w3a6", "fp8", "mxfp4", "nvfp4", {"base": "w8a8", "weight": {"format": "uint8"}}]
)
def test_half_types_are_bit_identical_too(dtype: torch.dtype, bits: Any, tmp_path: Path) -> None:
    model = PlainTransformer().to(dtype).eval()
    quantized = quantize(model, bits, calibration=[X.to(dtype)])
    save(quantized, tmp_path)
    assert torch.equal(load(tmp_path, fresh(model))(X.to(dtype)), quantized(X.to(dtype)))
    with pytest.raises(InputError, match=r"is (bfloat16|float16) in the file; call model.to\(torch.\1\) first"):
        load(tmp_path, PlainTransformer())


def test_weights_are_stored_as_packed_codes(tmp_path: Path) -> None:
    quantized = quantize(PlainTransformer().eval(), "w4a8", calibration=[X])
    save(quantized, tmp_path)
    config = json.loads((tmp_path / "quantization.json").read_text())
    tensors = load_file(tmp_path / config["tensors"])
    weight = quantized.blocks[0].fc1.weight
    assert tensors["blocks.0.fc1.weight.codes"].numel() == weight.numel() // 2
    assert "blocks.0.fc1.weight" not in tensors and "head.weight" in tensors
    assert (config["format"], config["version"], config["method"]) == ("s2d.quantized", 1, "rtn")
    assert config["spec"]["weight"]["format"] == "int4"


def test_the_rounded_plain_model_is_what_removing_leaves(tmp_path: Path) -> None:
    model = PlainTransformer().eval()
    quantized = quantize(model, "w4a16", calibration=[X])
    save(quantized, tmp_path)
    with torch.no_grad():
        rounded = remove(load(tmp_path, model))
        assert torch.equal(rounded(X), quantized(X))
    assert len(rounded.blocks[0].fc1.weight[0].unique()) <= 15


def test_tied_weights_stay_tied_and_exact(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 16)
            self.layers = nn.ModuleList([nn.Linear(16, 16)])
            self.head = nn.Linear(16, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers[0](self.embedding(ids)))

    ids = torch.arange(10)[None]
    quantized = quantize(Tied(), {"base": "w4a8", "overrides": {"head": "w4a8"}}, calibration=[ids])
    save(quantized, tmp_path)
    restored = load(tmp_path, Tied())
    assert restored.head.weight is restored.embedding.weight
    assert torch.equal(restored.embedding.weight, quantized.embedding.weight)
    assert torch.equal(restored(ids), quantized(ids))


def test_saving_over_an_old_model_and_failing_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (quantize(PlainTransformer().eval(), "w4a4", calibration=[X]) for _ in range(2))
    save(first, tmp_path)

    import os

    replace, calls = os.replace, []

    def fail_at_the_config(source: Any, target: Any) -> None:
        calls.append(target)
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail_at_the_config)
    with pytest.raises(InputError, match="could not write .*No space left on device; nothing was changed there"):
        save(second, tmp_path)
    monkeypatch.undo()
    assert torch.equal(load(tmp_path, PlainTransformer())(X), first(X))

    save(second, tmp_path)
    assert torch.equal(load(tmp_path, PlainTransformer())(X), second(X))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not write .*File exists|could not write .*Not a directory"):
        save(quantize(PlainTransformer().eval(), "w4a4", calibration=[X]), tmp_path / "file")
    with pytest.raises(InputError, match="PlainTransformer is not a quantized model"):
        save(PlainTransformer(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


class TestForeignFiles:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        save(quantize(PlainTransformer().eval(), "w4a4", calibration=[X]), tmp_path)
        return tmp_path

    def edit(self, saved: Path, **changes: Any) -> None:
        path = saved / "quantization.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def refused(self, saved: Path, message: str, model: nn.Module | None = None) -> None:
        model = model or PlainTransformer()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(InputError, match=message):
            load(saved, model, inplace=True)
        assert not is_quantized(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "no", "not a saved quantized model: it has no quantization.json")

    def test_another_version_or_kind(self, saved: Path) -> None:
        self.edit(saved, version=99)
        self.refused(saved, "version 99, but this s2d reads version 1")
        self.edit(saved, version=1, format="other")
        self.refused(saved, "is other version 1")

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
    def test_damaged_config(self, saved: Path, text: str) -> None:
        (saved / "quantization.json").write_text(text)
        self.refused(saved, "quantization.json is damaged or was not written by s2d")

    @pytest.mark.parametrize(
        "changes", [{"sites": [{}]}, {"codes": {"x": {}}}, {"aliases": {"a": "b"}}, {"sites": None}]
    )
    def test_config_that_does_not_describe_the_tensors(self, saved: Path, changes: dict[str, Any]) -> None:
        self.edit(saved, **changes)
        self.refused(saved, "quantization.json does not describe its tensors")

    def test_a_plan_that_is_not_the_stored_one(self, saved: Path) -> None:
        sites = json.loads((saved / "quantization.json").read_text())["sites"]
        self.edit(saved, sites=[site for site in sites if site["what"] != "probs"])
        self.refused(saved, "quantization.json does not describe its tensors")

    def test_missing_or_truncated_tensors(self, saved: Path) -> None:
        path = next(saved.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-7])
        self.refused(saved, "is damaged: its content does not match")
        path.unlink()
        self.refused(saved, "cannot read")

    def test_another_model(self, saved: Path, make: Callable[[str], Case]) -> None:
        self.refused(
            saved,
            "holds a quantized PlainTransformer, which does not fit this BertModel: the (model|file) lacks",
            make("bert-sdpa").model,
        )
        self.refused(
            saved,
            r"head.weight is \[5, 16\] there and \[5, 32\] in the model|is \[\d+\] there",
            PlainTransformer(dim=32),
        )

    def test_a_quantized_model(self, saved: Path) -> None:
        model = quantize(PlainTransformer().eval(), "w4a4", calibration=[X])
        with pytest.raises(InputError, match="quantized already"):
            load(saved, model)


@pytest.mark.parametrize("options", [{"split": "magnitude"}, {"split": "sign", "form": "sum"}])
def test_other_kinds_of_quantizers_come_back(options: dict[str, str], tmp_path: Path) -> None:
    quantized = quantize(PlainTransformer().eval(), "w4a4", calibration=[X])
    attention = quantized.blocks[0].attn.attention_quantizer
    attention.probs = LogSqrt2Quantizer(FORMATS["uint4"], name="blocks.0.attn.probs")
    attention.probs.set_range(torch.tensor(0.0), torch.tensor(0.6))
    fc2 = quantized.blocks[1].fc2
    fc2.input_quantizer = TwinQuantizer(FORMATS["uint4"], name="blocks.1.fc2.input", **options)
    fc2.input_quantizer.set_range(torch.tensor(-0.1 if options["split"] == "sign" else 0.1), torch.tensor(2.0))
    attention.probs.enabled = fc2.input_quantizer.enabled = True
    save(quantized, tmp_path)
    restored = load(tmp_path, PlainTransformer().eval())
    assert torch.equal(restored(X), quantized(X))
    again = restored.blocks[1].fc2.input_quantizer
    assert isinstance(again, TwinQuantizer) and again.options() == fc2.input_quantizer.options()
    plain = remove(restored)
    assert not is_quantized(plain)


@pytest.mark.parametrize(
    "kinds",
    [
        {"blocks.0.attn.probs": {"kind": "magic", "options": {}}},
        {"nowhere.probs": {"kind": "log_sqrt2", "options": {}}},
        {"blocks.0.attn.probs": {"kind": "twin", "options": {"split": "sideways"}}},
        {"blocks.0.attn.probs": {"kind": "twin", "options": {"split": "sign"}}},
    ],
)
def test_kinds_that_do_not_fit_are_refused(kinds: dict[str, Any], tmp_path: Path) -> None:
    save(quantize(PlainTransformer().eval(), "w4a4", calibration=[X]), tmp_path)
    path = tmp_path / "quantization.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kinds": kinds}))
    model = PlainTransformer()
    with pytest.raises(InputError, match="does not describe its tensors"):
        load(tmp_path, model, inplace=True)
    assert not is_quantized(model)


def test_every_case_is_covered() -> None:
    assert {"bert-sdpa", "llama-sdpa", "vit-sdpa", "torch-encoder", "plain-sdpa"} <= CASES.keys()
