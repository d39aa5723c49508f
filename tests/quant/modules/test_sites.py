from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.quant.tiny_models import Case
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.tracing import trace
from s2d.quant import quantize, remove
from s2d.quant.modules.sites import Site, describe, insert, is_quantized, plan, quantizers_of, weight_name
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.spec import QuantSpec


def decide(case: Case, spec: Any) -> dict[str, Site]:
    graph = trace(case.model, case.batches[0])
    return {site.name: site for site in plan(case.model, QuantSpec.parse(spec), graph)}


def test_plan_of_a_bert(make: Callable[[str], Case]) -> None:
    sites = decide(make("bert-sdpa"), "w4a8")
    layer = "encoder.layer.1"
    linears = [f"attention.self.{name}" for name in ("query", "key", "value")]
    linears += ["attention.output.dense", "intermediate.dense", "output.dense"]
    wanted = {f"{layer}.{linear}.{what}" for linear in linears for what in ("weight", "input")}
    wanted |= {f"{layer}.attention.self.{what}" for what in ("q", "k", "probs", "v")}
    assert {name for name in sites if name.startswith(layer)} == wanted
    for name in wanted:
        site = sites[name]
        weight = name.endswith(".weight")
        assert (site.bits, site.granularity, site.reason) == (4 if weight else 8, "channel" if weight else "tensor", "")
    # The pooler is outside the encoder: both its sites are rows of the plan, with the reason.
    assert sites["pooler.dense.weight"].bits == 16 and "pooler" in sites["pooler.dense.weight"].reason
    assert len(sites) == 2 * len(wanted) + 2


@pytest.mark.parametrize(
    ("name", "kept"),
    [("llama-sdpa", "lm_head"), ("vit-sdpa", "embeddings.patch_embeddings.projection"), ("plain-sdpa", "head")],
)
def test_first_and_last_layers_are_kept_with_a_reason(make: Callable[[str], Case], name: str, kept: str) -> None:
    sites = decide(make(name), "w4a4")
    assert sites[f"{kept}.weight"].format is None and sites[f"{kept}.weight"].reason
    inside = [site for site in sites.values() if site.module != kept and "pooler" not in site.module]
    assert all(site.format for site in inside) and len(inside) >= 2 * (8 + 4)


def test_overrides_reach_single_sites_kept_layers_and_formats(make: Callable[[str], Case]) -> None:
    overrides = {
        "head": "w8a8",
        "*.fc2": "keep",
        "*.fc1.input": {"activation": {"bits": 8}},
        "*.probs": {"attention": {"bits": 8}},
    }
    sites = decide(make("plain-sdpa"), {"base": "w4a4", "overrides": overrides})
    assert sites["head.weight"].bits == sites["head.input"].bits == 8
    assert sites["blocks.0.fc2.weight"].reason == "override '*.fc2'"
    assert (sites["blocks.1.fc1.weight"].bits, sites["blocks.1.fc1.input"].bits) == (4, 8)
    assert (sites["blocks.1.attn.q"].bits, sites["blocks.1.attn.probs"].bits) == (4, 8)


def test_the_plan_can_be_printed(make: Callable[[str], Case]) -> None:
    lines = describe(
        list(decide(make("plain-sdpa"), {"base": "w4a4", "overrides": {"*.fc2": "keep"}}).values())
    ).splitlines()
    assert lines[0].split() == ["site", "bits", "format", "granularity", "observer"]
    row = next(line for line in lines if line.startswith("blocks.0.attn.qkv.weight"))
    assert row.split() == ["blocks.0.attn.qkv.weight", "4", "int4", "channel", "minmax"]
    assert any(line.startswith("blocks.0.fc2.input") and line.endswith("override '*.fc2'") for line in lines)


def test_planning_changes_nothing(case: Case) -> None:
    before = {name: type(module) for name, module in case.model.named_modules()}
    plan(case.model, QuantSpec.parse("w4a4"))
    assert {name: type(module) for name, module in case.model.named_modules()} == before


@torch.no_grad()
def test_inserting_adds_keys_and_removing_is_exact(case: Case) -> None:
    plain = {key: value.clone() for key, value in case.model.state_dict().items()}
    before, structure = case.output(), repr(case.model)
    attributes = {name: set(vars(module)) for name, module in case.model.named_modules()}
    quantized = quantize(case.model, "w4a4", calibration=case.batches, inplace=True)
    assert quantized is case.model and is_quantized(quantized)
    added = quantized.state_dict().keys() - plain.keys()
    assert plain.keys() <= quantized.state_dict().keys()
    assert all(key.endswith((".scale", ".zero_point")) for key in added) and added
    assert not torch.equal(case.output(), before)

    assert remove(quantized) is quantized and not is_quantized(quantized)
    after = quantized.state_dict()
    assert after.keys() == plain.keys()
    assert all(torch.equal(after[key], plain[key]) for key in plain)
    assert repr(quantized) == structure
    assert {name: set(vars(module)) for name, module in quantized.named_modules()} == attributes
    assert torch.equal(case.output(), before)


def test_parameters_hooks_and_types_survive(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    linear, attn = case.model.blocks[0].fc1, case.model.blocks[0].attn
    parameters, calls = list(case.model.parameters()), []
    linear.register_forward_hook(lambda *_: calls.append("linear"))
    attn.register_forward_hook(lambda *_: calls.append("attn"))
    quantized = quantize(case.model, "w8a8", calibration=case.batches, inplace=True)
    assert all(a is b for a, b in zip(parameters, quantized.parameters(), strict=True))
    assert quantized.blocks[0].fc1 is linear and isinstance(linear, nn.Linear)
    assert type(attn).__name__ == "FunctionalAttention"
    calls.clear()
    case.output()
    assert calls == ["attn", "linear"]


def test_quantizing_twice_is_refused(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    quantized = quantize(case.model, "w4a4", calibration=case.batches)
    with pytest.raises(InputError, match="PlainTransformer is quantized already"):
        quantize(quantized, "w8a8", calibration=case.batches)
    again = quantize(remove(quantized), "w8a8", calibration=case.batches)
    assert torch.equal(case.output(again), case.output(quantize(case.model, "w8a8", calibration=case.batches)))


@pytest.mark.parametrize(
    ("build", "spec", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "w4a4", "no Linear weights and no attention"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "w16a16", "w16a16 keeps everything at full precision"),
        (
            lambda: nn.ModuleDict({"head": nn.Linear(2, 2)}),
            "w4a4",
            "w4a4 quantizes nothing in ModuleDict: head.weight .head: the last",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 2)),
            {"base": "w4a4", "overrides": {"1.*": "keep"}},
            "override '1..' matches no site; close names: 0",
        ),
    ],
)
def test_plans_that_make_no_sense(build: Callable[[], nn.Module], spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(build(), QuantSpec.parse(spec))


def test_linears_that_are_more_than_linear_are_kept_by_name() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    sites = {
        s.name: s
        for s in plan(
            nn.Sequential(nn.Linear(2, 2), Scaled(2, 2)), QuantSpec.parse({"base": "w4a4", "overrides": {"*": "w4a4"}})
        )
    }
    assert sites["0.weight"].format and sites["1.weight"].reason == "Scaled computes more than a Linear"


def test_a_replaced_forward_is_refused_and_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].forward = lambda x: x
    with pytest.raises(InputError, match="1: another library has replaced"):
        insert(model, plan(model, QuantSpec.parse("w4a4")))
    assert not is_quantized(model) and type(model[0]) is nn.Linear
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    encoder.layers[0].linear2.forward = lambda x: x
    with pytest.raises(InputError, match="linear2: another library has replaced"):
        insert(encoder, plan(encoder, QuantSpec.parse("w4a4")))
    assert encoder.layers[0].activation_relu_or_gelu and encoder.use_nested_tensor


def test_weight_names_are_state_dict_keys(case: Case) -> None:
    keys = case.model.state_dict().keys()
    sites = [site for site in plan(case.model, QuantSpec.parse("w4a4")) if site.what == "weight" and site.format]
    assert sites and all(weight_name(case.model, site) in keys for site in sites)


def test_quantizers_take_the_models_mode(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    model = copy.deepcopy(case.model).train()
    quantized = quantize(model, "w4a4", calibration=case.batches)
    assert quantized.training and all(q.training and q.enabled for q in quantizers_of(quantized))
    assert all(isinstance(q, Quantizer) for q in quantizers_of(quantized))
