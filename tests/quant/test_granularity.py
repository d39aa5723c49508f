"""Ranges of groups and of heads, the ends, and convolutions: from the plan to the file and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.quant.tiny_models import Case, PlainTransformer
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant import QuantSpec, describe, load, plan, quantize, remove, save
from s2d.quant.modules.sites import Site
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer, fake_quantize

GROUPS = {"base": "w4a8", "weight": {"granularity": "group-8"}}
HEADS = {"base": "w8a4", "attention": {"granularity": "head"}}


def rows(sites: list[Site], what: str) -> dict[str, Site]:
    return {site.module: site for site in sites if site.what == what}


def test_a_group_of_inputs_has_a_scale_of_its_own() -> None:
    weight = torch.randn(5, 12) * torch.tensor([1.0] * 4 + [10.0] * 4 + [0.1] * 4)
    quantizer = WeightQuantizer(FORMATS["int4"], "group", name="w", channels=5, groups=3)
    groups = weight.reshape(5, 3, 4)
    quantizer.set_range(groups.amin(-1), groups.amax(-1))
    for index in range(3):
        largest = groups[:, index].abs().amax(-1, keepdim=True)
        wanted = fake_quantize(groups[:, index], largest / 7, torch.tensor(0), FORMATS["int4"])
        assert torch.equal(quantizer.fake_quantize(weight)[:, 4 * index : 4 * index + 4], wanted)


def test_groups_are_closer_than_channels(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    with torch.no_grad():
        errors = [
            (case.output(quantize(case.model, spec, calibration=case.batches)) - case.output()).norm()
            for spec in (GROUPS, "w4a8")
        ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("spec", [GROUPS, HEADS, {"base": "w4a8", "ends": "w8a8"}], ids=["groups", "heads", "ends"])
def test_saved_and_loaded_to_the_bit(
    make: Callable[[str], Case], tmp_path: Path, spec: dict[str, Any], method: str
) -> None:
    for name in ("vit-sdpa", "torch-encoder"):
        case = make(name)
        quantized = quantize(case.model, spec, calibration=case.batches, method=method)
        save(quantized, tmp_path / name)
        loaded = load(tmp_path / name, case.model)
        with torch.no_grad():
            assert torch.equal(case.output(loaded), case.output(quantized))


def test_groups_that_do_not_divide_are_named_before_any_work() -> None:
    class Untouched(PlainTransformer):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("work was done")

    with pytest.raises(InputError, match=r"blocks.0.attn.qkv: groups of 5 do not divide its 16 inputs; choose another"):
        plan(Untouched(), QuantSpec.parse({"base": "w4a16", "weight": {"granularity": "group-5"}}))
    spec = {"base": "w4a16", "weight": {"granularity": "group-5"}}
    with pytest.raises(InputError, match="groups of 5 do not divide"):
        quantize(Untouched(), spec, calibration=[torch.randn(2, 7, 16)])


def test_a_head_has_a_range_of_its_own(make: Callable[[str], Case]) -> None:
    case = make("vit-sdpa")
    quantized = quantize(case.model, HEADS, calibration=case.batches)
    attention = next(m for m in quantized.modules() if hasattr(m, "attention_quantizer")).attention_quantizer
    assert all(getattr(attention, which).scale.shape == (4,) for which in ("q", "k", "probs", "v"))
    x = torch.randn(2, 4, 7, 8)
    for head in range(4):
        q: Quantizer = attention.q
        wanted = fake_quantize(x[:, head], q.scale[head], q.zero_point[head], q.format)
        assert torch.equal(q(x)[:, head], wanted)
    with torch.no_grad():
        plain = case.output()
        whole = quantize(case.model, "w8a4", calibration=case.batches)
        assert (case.output(quantized) - plain).norm() < (case.output(whole) - plain).norm()


def test_heads_that_cannot_be_told_apart(make: Callable[[str], Case]) -> None:
    case = make("plain-bmm")
    with pytest.raises(InputError, match=r"blocks.0.attn.. has 3 dimensions, .* use granularity tensor"):
        quantize(case.model, HEADS, calibration=case.batches)


def test_the_ends_by_rule_and_by_override(make: Callable[[str], Case]) -> None:
    case = make("vit-sdpa")
    projection = "embeddings.patch_embeddings.projection"

    def weight(spec: Any) -> Site:
        return rows(plan(case.model, QuantSpec.parse(spec)), "weight")[projection]

    assert weight("w4a4").format is None and "first layer" in weight("w4a4").reason
    assert weight({"base": "w4a4", "ends": "w8a8"}).bits == 8
    assert weight({"base": "w4a4", "ends": "w8a8", "overrides": {"*projection": "w3a16"}}).bits == 3
    sites = plan(case.model, QuantSpec.parse({"base": "w4a4", "ends": "w8a8"}))
    assert {site.bits for site in sites if site.module not in (projection, "pooler.dense")} == {4}
    assert "group-8" in describe(plan(case.model, QuantSpec.parse(GROUPS)))
    with pytest.raises(InputError, match="groups of 8 do not divide a convolution"):
        weight({**GROUPS, "ends": {"weight": {"bits": 4}}})


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_quantized_convolution_equals_its_definition(kind: type[nn.Conv2d]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 6, 3, padding=1, groups=2)).eval()
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    x = torch.randn(2, 4, *(5,) * dims)
    quantized = quantize(model, {"base": "w16a16", "overrides": {"0": "w4a4"}}, calibration=[x])
    w, a = quantized[0].weight_quantizer, quantized[0].input_quantizer
    weight = torch.fake_quantize_per_channel_affine(model[0].weight, w.scale, w.zero_point, 0, -7, 7)
    inputs = torch.fake_quantize_per_tensor_affine(x, a.scale, a.zero_point, 0, 15)
    wanted = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims](inputs, weight, model[0].bias, padding=1, groups=2)
    assert torch.equal(quantized(x), wanted)
    assert torch.equal(remove(quantized)(x), model(x))


@torch.no_grad()
def test_heads_that_are_repeated_for_their_groups_keep_their_ranges(make: Callable[[str], Case]) -> None:
    case = make("llama-sdpa")  # 4 heads of queries, 2 of keys and values
    found: Any = quantize(case.model, HEADS, calibration=case.batches)
    k = found.model.layers[0].self_attn.attention_quantizer.k
    x = torch.randn(2, 2, 5, 8)
    assert len(k.scale) == 2 and torch.equal(k(x.repeat_interleave(2, 1)), k(x).repeat_interleave(2, 1))
