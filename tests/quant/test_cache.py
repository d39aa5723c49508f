"""Keys and values as caches hold them: the spec, the ranges, the plan, the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quant.tiny_models import Case

from s2d.errors import InputError
from s2d.models.tracing import trace
from s2d.quant import QuantSpec, describe, load, plan, quantize, save
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.quantizer import Quantizer


def test_spans_are_rounded_channel_by_channel() -> None:
    x = torch.randn(2, 3, 10, 4) * torch.tensor([1.0, 30.0, 0.1, 5.0])
    quantizer = Quantizer(FORMATS["uint4"], "span", name="k", span=4)
    found = quantizer.fake_quantize(x)
    for start, end in ((0, 4), (4, 8), (8, 10)):  # the last span is not full
        for channel in range(4):
            values = x[1, 2, start:end, channel]
            lo, hi = values.min().clamp(max=0), values.max().clamp(min=0)
            scale = (hi - lo) / 15
            zero = torch.round(-lo / scale)
            wanted = ((torch.round(values / scale) + zero).clamp(0, 15) - zero) * scale
            torch.testing.assert_close(found[1, 2, start:end, channel], wanted, rtol=1e-5, atol=1e-6)


def test_a_channel_of_outliers_costs_the_others_nothing() -> None:
    x = torch.randn(1, 1, 64, 16)
    x[..., 3] *= 100
    errors = {}
    for granularity, span in (("token", 0), ("span", 32)):
        quantizer = Quantizer(FORMATS["uint4"], granularity, name="k", span=span)
        others = torch.arange(16) != 3
        errors[granularity] = (quantizer.fake_quantize(x) - x)[..., others].square().mean().sqrt()
    assert errors["span"] < 0.2 < 0.5 < errors["token"]


@pytest.mark.parametrize(
    ("text", "bits"),
    [("w4a4kv8", (4, 4, 4, 8, 8)), ("w4a8kv4", (4, 8, 8, 4, 4)), ("w4a16kv4", (4, 16, 16, 4, 4)),
     ("w8a8kv16", (8, 8, 8, 16, 16)), ("w4a4kv8-token", (4, 4, 4, 8, 8))],
)  # fmt: skip
def test_the_bits_of_a_cache_are_its_own(make: Callable[[str], Case], text: str, bits: tuple[int, ...]) -> None:
    spec = QuantSpec.parse(text)
    assert str(spec) == text and QuantSpec.parse(spec.to_dict()) == spec
    case = make("llama-sdpa")
    sites = {site.name: site for site in plan(case.model, spec, trace(case.model, case.batches[0]))}
    block = "model.layers.1."
    names = ("mlp.down_proj.weight", "mlp.down_proj.input", "self_attn.q", "self_attn.k", "self_attn.v")
    assert tuple(sites[block + name].bits for name in names) == bits
    if bits[-1] != 16:
        k, v = sites[block + "self_attn.k"], sites[block + "self_attn.v"]
        assert (k.granularity, k.group, v.granularity) == ("span", 32, "token")
        assert any("self_attn.k" in line and "span-32" in line for line in describe(list(sites.values())).splitlines())
    assert (sites[block + "mlp.down_proj.input"].granularity == "token") is text.endswith("-token")
    assert sites["lm_head.weight"].bits == 16


def test_a_base_with_a_cache_can_be_changed() -> None:
    spec = QuantSpec.parse({"base": "w4a4kv8", "attention": False})
    assert spec.attention is None
    assert {pattern: held.attention and held.attention.format.bits for pattern, held in spec.overrides} == {
        "*.k": 8,
        "*.v": 8,
    }
    assert QuantSpec.parse("w4a4kv8").with_observer("mse").overrides[0][1].attention == spec.overrides[0][1].attention


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("w4a4kv9", "9 bits is not possible"),
        ("w4a4kv", "unknown quantization spec"),
        ("w4a4-tokens", "unknown quantization spec"),
    ],
)
def test_impossible_caches_are_refused(text: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        QuantSpec.parse(text)
    with pytest.raises(InputError, match="granularity 'span' is not one of tensor, token, head, span-32, block"):
        QuantSpec.parse({"base": "w4a4", "attention": {"bits": 4, "granularity": "span"}})


@pytest.mark.parametrize("name", ["llama-sdpa", "llama-eager"])
def test_quantized_where_the_products_read_them(make: Callable[[str], Case], name: str, tmp_path: Path) -> None:
    """Rounding k and v alone changes the output as rounding the cache's own tensors does, and goes into the file."""
    case = make(name)
    quantized = quantize(case.model, "w16a16kv4", calibration=case.batches)
    assert not torch.equal(case.output(quantized), case.output())
    save(quantized, tmp_path / "cache")
    assert torch.equal(case.output(load(tmp_path / "cache", case.model)), case.output(quantized))


def test_the_tensors_that_are_rounded_are_those_of_the_cache(make: Callable[[str], Case]) -> None:
    case = make("llama-sdpa")
    quantized = quantize(case.model, "w16a16kv8", calibration=case.batches)
    seen: dict[str, torch.Tensor] = {}
    attention = next(m for m in quantized.modules() if hasattr(m, "attention_quantizer")).attention_quantizer
    for which in ("k", "v"):
        getattr(attention, which).watch = lambda x, which=which: seen.__setitem__(which, x.detach().clone())
    with torch.no_grad():
        cache = quantized(**{**case.batches[0], "use_cache": True}).past_key_values
    layer = cache.layers[0]
    for which, held in (("k", layer.keys), ("v", layer.values)):
        repeats = seen[which].shape[1] // held.shape[1]  # grouped-query attention repeats what the cache holds once
        assert torch.equal(seen[which], held.repeat_interleave(repeats, dim=1))
