"""The first tokens of a text at full precision: out of the rounding, out of the ranges, in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quant.tiny_models import Case
from torch import nn

from s2d.errors import InputError
from s2d.export.integers import integer_activation
from s2d.quant import QuantSpec, load, quantize, remove, save
from s2d.quant.modules.sites import quantizers_of
from s2d.quant.numerics.quantizer import Quantizer

SPEC = {"base": "w16a4", "prefix": 1}


def test_a_massive_first_token_stretches_no_range() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    batches = [torch.randn(2, 6, 8) for _ in range(3)]
    for batch in batches:
        batch[:, 0] *= 1000
    plain = quantize(model, "w16a4", calibration=[batch[:, 1:] for batch in batches])
    kept, stretched = (quantize(model, spec, calibration=batches) for spec in (SPEC, "w16a4"))
    with torch.no_grad():
        assert torch.equal(kept(batches[0])[:, 1:], plain(batches[0][:, 1:]))
        assert torch.equal(kept(batches[0])[:, 0], model(batches[0])[:, 0])
        lost = (stretched(batches[0])[:, 1:] - model[0].bias).abs().max()
    assert lost == 0, "without the prefix nothing is left of the other tokens"


def test_what_is_kept_is_kept_exactly_and_the_rest_as_without(make: Callable[[str], Case]) -> None:
    case = make("llama-sdpa")
    quantized = quantize(case.model, SPEC, calibration=case.batches)
    quantizers = [q for q in quantizers_of(quantized) if q.prefix]
    assert len(quantizers) == 2 * (7 + 4), "inputs and operands of both blocks"
    seen: list[bool] = []
    for quantizer in quantizers:
        x = torch.randn(2, 3, 5, 8)
        found = quantizer(x)
        seen.append(torch.equal(found[:, :, :1], x[:, :, :1]))
        assert torch.equal(found[:, :, 1:], quantizer.fake_quantize(x)[:, :, 1:]) or quantizer.dynamic
        assert not torch.equal(found[:, :, 1:], x[:, :, 1:])
    assert all(seen)


@torch.no_grad()
def test_token_by_token_with_a_cache_is_the_text_at_once(make: Callable[[str], Case]) -> None:
    case = make("llama-sdpa")
    quantized = quantize(case.model, {"base": "w16a4", "prefix": 2}, calibration=case.batches)
    ids = case.batches[0]["input_ids"][:, :6]
    whole, cache, steps = quantized(input_ids=ids, use_cache=False).logits, None, []
    for position in range(ids.shape[1]):
        out = quantized(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    # A value on the edge of two codes may fall to either side where sums are taken in another order.
    found = torch.cat(steps, 1)
    assert float((found - whole).norm() / whole.norm()) < 0.02
    assert float((whole - case.model(input_ids=ids).logits).norm() / whole.norm()) > 0.05
    remove(quantized)
    assert not quantized._forward_pre_hooks and not quantized._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("method", ["rtn", "gptq", "repq"])
def test_saved_and_loaded_to_the_bit(make: Callable[[str], Case], method: str, tmp_path: Path) -> None:
    case = make("llama-sdpa")
    quantized = quantize(case.model, {"base": "w4a4kv8", "prefix": 2}, calibration=case.batches, method=method)
    save(quantized, tmp_path / "model")
    loaded = load(tmp_path / "model", case.model)
    assert {q.prefix for q in quantizers_of(loaded) if not q.name.endswith("weight")} == {2}
    assert torch.equal(case.output(loaded), case.output(quantized))


def test_bad_prefixes_are_one_line() -> None:
    for value in (-1, "two", True):
        with pytest.raises(InputError, match="prefix is a number of tokens, 0 or more"):
            QuantSpec.parse({"base": "w4a4", "prefix": value})
    with pytest.raises(InputError, match="a prefix of its own; give it once"):
        QuantSpec.parse({"base": "w4a4", "overrides": {"*": {"base": "w8a8", "prefix": 1}}})
    quantizer = Quantizer(QuantSpec.parse("w4a4").activation.format, "tensor", name="fc")  # type: ignore[union-attr]
    quantizer.prefix, quantizer.enabled = 1, True
    with pytest.raises(InputError, match="fc sees its tokens without their sequences, \\[6, 4\\]"):
        quantizer(torch.randn(6, 4))
    with pytest.raises(InputError, match="fc keeps the first 1 tokens at full precision, which no runtime here does"):
        integer_activation(quantizer)
    spec = QuantSpec.parse({"base": "w4a4", "prefix": 1})
    assert QuantSpec.parse(spec.to_dict()) == spec
