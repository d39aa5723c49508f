"""ExecuTorch's file, run by its own runtime, against the simulated model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import builders
from tests.quant import tiny_families
from torch import Tensor, nn

import s2d
from s2d.errors import InputError
from s2d.export.gate import cosine

NEEDS = 'executorch is not installed: pip install "s2d[executorch]"'


STATIC: dict[str, Any] = {"weight": {"bits": 8}, "activation": {"bits": 8}, "attention": False}
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}  # 32 divides it


def quantized(name: str, spec: Any) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    batches: list[dict[str, Tensor]]
    if name == "bert":
        model = builders.transformers_model("BertModel", "BertConfig", {**SIZE, "vocab_size": 64})
        batches = [tiny_families.ids(attention_mask=torch.ones(3, 9, dtype=torch.long)) for _ in range(2)]
    else:
        options = {**SIZE, "image_size": 16, "patch_size": 4}
        model = builders.transformers_model("ViTForImageClassification", "ViTConfig", options)
        batches = [tiny_families.pixels() for _ in range(2)]
    return s2d.quantize(tiny_families.liven(model), spec, calibration=batches), batches


def token(bits: int) -> dict[str, Any]:
    return {"weight": {"bits": bits}, "activation": {"bits": 8, "granularity": "token"}, "attention": False}


@pytest.mark.parametrize(("name", "bits"), [("bert", 4), ("bert", 8), ("vit", 4)])
def test_the_file_computes_what_the_simulated_model_does(name: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime", reason=NEEDS)
    from s2d.export.executorch import PteModel

    model, batches = quantized(name, token(bits))
    report = s2d.export(model, tmp_path / "model.pte", example=batches[0], time_it=False)
    assert report.passed and len(report.layers) == 12 and any("delegated" in line for line in report.label)
    runner = PteModel(tmp_path / "model.pte")
    with torch.no_grad():
        assert cosine(runner(**batches[1]), model(**batches[1])) > 0.99
    if name == "bert":  # another length
        shorter = {key: value[:, :5] for key, value in batches[1].items()}
        with torch.no_grad():
            assert cosine(runner(**shorter), model(**shorter)) > 0.99


def test_static_ranges_go_in_as_decomposed_operators(tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime", reason=NEEDS)
    model, batches = quantized("vit", STATIC)
    report = s2d.export(model, tmp_path / "model.pte", example=batches[0], time_it=False)
    assert report.passed and len(report.layers) == 12 and any("of 12 layers to 8 bits" in line for line in report.label)
    assert report.placement is not None
    pairs = {name: count for name, count in report.placement.fallen.items() if "quantize" in name}
    assert not pairs and report.placement.placed  # every pair, and its Linear, went to XNNPACK


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch.runtime", reason=NEEDS)
    from s2d.export import executorch

    honest = executorch.with_codes

    def tampered(model: nn.Module) -> nn.Module:
        made: Any = honest(model)
        made.encoder.layer[1].output.dense.weight.qdata[:] *= -1
        return made

    model, batches = quantized("bert", token(4))
    monkeypatch.setattr(executorch, "with_codes", tampered)
    with pytest.raises(InputError, match=r"not written: 1 of 12 layers differ; worst encoder\.layer\.1\.output\.dense"):
        s2d.export(model, tmp_path / "model.pte", example=batches[0], time_it=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "w4a16",
            "inputs of 8 bits, unsigned, static or with a range for every token; the nearest spec is weight",
        ),
        ({"weight": {"bits": 8}, "activation": {"bits": 6}, "attention": False}, "inputs of 8 bits"),
        (
            {**STATIC, "weight": {"bits": 4, "granularity": "group-32"}},
            "no product of a static input with groups of weights; the nearest spec is .*granularity: token",
        ),
        ("w4a8", "operands of attention.*w4a8-token, attention: false"),
        ({**token(4), "weight": {"bits": 4, "granularity": "group-16"}}, "multiple of 32.*granularity: group-32"),
    ],
)
def test_what_xnnpack_has_no_product_for_is_refused(spec: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime", reason=NEEDS)
    model, batches = quantized("bert", spec)
    with pytest.raises(InputError, match=message):
        s2d.export(model, tmp_path / "model.pte", example=batches[0])
    assert list(tmp_path.iterdir()) == []


def test_without_executorch_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model, batches = quantized("bert", token(4))
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(InputError, match=r'pip install "s2d\[executorch\]"'):
        s2d.export(model, tmp_path / "model.pte", example=batches[0])
