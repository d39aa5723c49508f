"""The plan lists every product with a weight, and is what is executed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.quant.ptq.test_folds_confirmed import tiny
from tests.quant.tiny_models import PlainTransformer
from torch import Tensor, nn

import s2d
from s2d.quant import QuantSpec, planned, record


class Bypassing(nn.Module):
    """Uses the weight of one of its Linears without calling it, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = F.linear(x, self.layers[1].weight, self.layers[1].bias)
        return self.layers[2](x @ self.mixing)


def experts() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.AutoModel.from_config(config).eval()


TOKENS = {"input_ids": torch.arange(4, 28).reshape(2, 12)}
CASES: dict[str, tuple[Any, Any]] = {
    "bypassing": (Bypassing, (torch.randn(2, 5, 8),)),
    "experts": (experts, TOKENS),
    "Gemma2": (lambda: tiny("Gemma2"), TOKENS),
    "torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        (torch.randn(2, 5, 16),),
    ),
}


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        made = model(**batch) if isinstance(batch, dict) else model(*batch)
    return made if isinstance(made, Tensor) else made[0]


def plan_of(model: nn.Module, batch: Any, spec: str = "w8a8") -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return planned(model, QuantSpec.parse(spec), [batch])


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_that_the_plan_does_not_list_does_nothing_for_the_output(name: str) -> None:
    make, batch = CASES[name]
    model = make().eval()
    listed = {f"{site.module}.weight".lstrip(".") for site in plan_of(model, batch)}
    listed |= {site.module for site in plan_of(model, batch)}
    listed |= {f"{site.module}.in_proj_weight" for site in plan_of(model, batch)}
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    before = output(model, batch)
    for key, parameter in model.named_parameters():
        if parameter.ndim < 2 or key in listed | tables:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
            assert torch.equal(output(model, batch), before), key
            parameter.copy_(kept)


def test_a_weight_used_without_its_module_is_kept_with_the_reason() -> None:
    sites = {site.name: site for site in plan_of(Bypassing(), CASES["bypassing"][1])}
    assert sites["layers.0.weight"].format and sites["layers.2.input"].format
    assert not sites["layers.1.weight"].format and not sites["layers.1.input"].format
    assert "without calling its module" in sites["layers.1.weight"].reason
    assert "mixing.weight" in sites or "mixing" in {site.module for site in sites.values()}


def test_attention_that_cannot_be_quantized_is_kept_with_the_reason_and_the_rest_quantized() -> None:
    model, x = PlainTransformer(style="relative").eval(), torch.randn(2, 7, 16)
    sites = {site.name: site for site in plan_of(model, (x,), "w4a8")}
    for what in ("q", "k", "probs", "v"):
        site = sites[f"blocks.0.attn.{what}"]
        assert site.format is None and "more than two products of activations" in site.reason
    assert sites["blocks.0.attn.qkv.input"].format
    assert output(s2d.quantize(model, "w4a8", calibration=[x]), (x,)).isfinite().all()


class ByHand(nn.Module):
    """Attention whose projections are products with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return F.scaled_dot_product_attention(x @ self.q.T, x @ self.k, x @ self.v.T)


def test_attention_with_projections_by_hand_is_quantized() -> None:
    model, x = ByHand().eval(), torch.randn(2, 5, 8)
    quantized = s2d.quantize(model, "w8a8", calibration=[x])
    assert {site.what for site in record(quantized).sites if site.format} >= {"q", "k", "probs", "v"}
    assert 0 < float((output(quantized, (x,)) - output(model, (x,))).norm() / output(model, (x,)).norm()) < 0.1


def test_a_computed_weight_is_kept_with_the_reason() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), norm(nn.Linear(8, 8)), nn.Linear(8, 8)) for _ in range(2)))
    sites = {site.name: site for site in plan_of(model, (torch.randn(4, 8),))}
    assert "computed from others" in sites["0.1.weight"].reason and sites["0.2.weight"].format
    assert "0.1.parametrizations.weight.original1.weight" in sites
    s2d.quantize(model, "w4a8", calibration=[torch.randn(4, 8)])


@pytest.mark.parametrize("method", ["ptq4vit", "gptq", "repq", "adaround"])
def test_a_model_without_blocks_is_quantized(method: str) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    x = torch.randn(16, 8)
    quantized = s2d.quantize(model, "w4a8", calibration=[x], method=method)
    assert 0 < float((output(quantized, (x,)) - output(model, (x,))).norm() / output(model, (x,)).norm()) < 0.3


def test_most_products_left_out_are_told_first() -> None:
    with pytest.warns(UserWarning, match=r"50% of the products stay at full precision.*layers.1, mixing"):
        planned(Bypassing(), QuantSpec.parse("w8a8"), [CASES["bypassing"][1]])


@pytest.mark.parametrize("name", CASES)
def test_planned_is_executed_and_saved(name: str, tmp_path: Path) -> None:
    make, batch = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    expected = plan_of(model, batch, "w4a8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = s2d.quantize(model, "w4a8", calibration=[batch])
        assert list(record(quantized).sites) == expected
        if name in ("experts", "Gemma2"):
            s2d.save(quantized, tmp_path / "q")
            loaded = s2d.load(tmp_path / "q").model
            assert list(record(loaded).sites) == expected
            assert torch.equal(output(loaded, batch), output(quantized, batch))
            stored = json.loads((tmp_path / "q" / "quantization.json").read_text())["sites"]
            assert len(stored) == len(expected)
