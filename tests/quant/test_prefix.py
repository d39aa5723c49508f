"""The first tokens of a text at full precision: out of the rounding, out of the ranges, in the file."""

from __future__ import annotations

import copy
import pickle
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


@pytest.mark.parametrize("spec", ["w16a4", "w8a8", "w4a4-token"])
@torch.no_grad()
def test_token_by_token_with_a_cache_is_the_whole_text_at_once(spec: str, make: Callable[[str], Case]) -> None:
    case = make("llama-sdpa")
    kept = quantize(case.model, {"base": spec, "prefix": 2}, calibration=case.batches)
    ids = case.batches[0]["input_ids"][:2, :6].clamp(min=2)
    for model in (kept, copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        whole, steps, cache = model(input_ids=ids, use_cache=False), [], None
        for start, end in ((0, 1), (1, 4), (4, 5), (5, 6)):
            found = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            steps.append(found[0])
            cache = found.past_key_values
        assert torch.allclose(torch.cat(steps, 1), whole[0], atol=1e-5)
    assert not remove(kept)._forward_pre_hooks and not any(m._forward_pre_hooks for m in kept.modules())
