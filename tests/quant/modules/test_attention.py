"""The attention mechanism: it changes nothing while off, quantizes the four operands, refuses what it does not know."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quant.tiny_models import Case
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.tracing import trace
from s2d.quant import quantize
from s2d.quant.modules.attention import AttentionQuantizer, QuantizedAttention, attention
from s2d.quant.modules.linear import swap_in, swap_out
from s2d.quant.modules.products import attentions_of
from s2d.quant.modules.sites import insert, plan, quantizers_of
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.spec import QuantSpec

OPERANDS = ("q", "k", "probs", "v")
ATTENTION_ONLY = {"attention": {"bits": 8}}


def unchanged(which: str, x: Tensor) -> Tensor:
    return x


def by_torch(x: Tensor, quantizer: Quantizer) -> Tensor:
    """What torch's own operators make of a quantizer's scale and zero point."""
    limits = (quantizer.format.qmin, quantizer.format.qmax)
    if quantizer.granularity == "channel":
        return torch.fake_quantize_per_channel_affine(x, quantizer.scale, quantizer.zero_point, 0, *limits)
    return torch.fake_quantize_per_tensor_affine(x, quantizer.scale, quantizer.zero_point, *limits)


def graph_of(case: Case) -> Graph:
    return trace(case.model, case.batches[0])


def put_in(case: Case, spec: Any = "w8a8") -> list[Quantizer]:
    """Quantizers that are all off."""
    return list(insert(case.model, plan(case.model, QuantSpec.parse(spec), graph_of(case))).values())


@torch.no_grad()
def test_switched_off_it_is_the_plain_model(case: Case) -> None:
    before = case.output()
    quantizers = put_in(case)
    assert any(isinstance(module, QuantizedAttention) for module in case.model.modules())
    assert all(not quantizer.enabled for quantizer in quantizers)
    torch.testing.assert_close(case.output(), before, rtol=0, atol=1e-6)


@torch.no_grad()
def test_every_operand_passes_its_quantizer_once_a_forward(case: Case) -> None:
    put_in(case, ATTENTION_ONLY)
    seen: list[str] = []
    modules = [m for m in case.model.modules() if isinstance(m, AttentionQuantizer)]
    assert len(modules) == 2
    for module in modules:
        for which in OPERANDS:
            getattr(module, which).watch = lambda x, which=which: seen.append(which)
    case.output()
    assert sorted(seen) == sorted(OPERANDS * 2)


@torch.no_grad()
def test_probabilities_and_scores_are_what_they_should_be(case: Case) -> None:
    """softmax(q k^T * scale + mask) of the operands seen is the probabilities seen: the operands are not mixed up."""
    put_in(case, ATTENTION_ONLY)
    module = next(m for m in case.model.modules() if isinstance(m, AttentionQuantizer))
    seen: dict[str, Tensor] = {}
    for which in OPERANDS:
        getattr(module, which).watch = lambda x, which=which: seen.__setitem__(which, x)
    case.output()
    q, k, probs, v = (seen[which] for which in OPERANDS)
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
    assert probs.shape[-1] == v.shape[-2] == k.shape[-2] and probs.shape[-2] == q.shape[-2]
    if q.ndim == 4:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    # Whatever mask there is: among the pairs it allows, log(probs) and the scores differ by one constant a row.
    scores = q @ k.transpose(-2, -1)
    factors = (q.shape[-1] ** -0.5, 1.0)  # the scale may be in q already
    assert any(constant_a_row(probs, factor * scores) for factor in factors)


def constant_a_row(probs: Tensor, scores: Tensor) -> bool:
    rest = torch.where(probs > 0, probs.log() - scores, torch.nan)
    top, bottom = rest.nan_to_num(-torch.inf).amax(-1), rest.nan_to_num(torch.inf).amin(-1)
    return bool((top - bottom < 1e-4).all())


@torch.no_grad()
def test_quantized_output_equals_the_formula() -> None:
    """A whole quantized attention against its definition, written out."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True

    def fake(which: str, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 1 / 15 if which == "probs" else 0.1, 7, 0, 15)

    scores = (fake("q", q) @ fake("k", k).transpose(-2, -1)) / 8**0.5
    wanted = fake("probs", scores.masked_fill(~mask, -torch.inf).softmax(-1)) @ fake("v", v)
    ours, _ = attention(q, k, v, mask, 0.0, False, None, False, fake)
    torch.testing.assert_close(ours, wanted)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    mask=st.sampled_from(["none", "bool", "float", "causal"]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_the_decomposition_equals_the_fused_operator(
    heads: tuple[int, int], lengths: tuple[int, int], mask: str, scale: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    queries, keys = lengths
    q, k, v = draw(2, heads[0], queries, 8), draw(2, heads[1], keys, 8), draw(2, heads[1], keys, 6)
    allowed = torch.rand(2, 1, queries, keys, generator=generator) > 0.3  # now and then a query may look nowhere
    attn_mask = {"bool": allowed, "float": draw(2, 1, queries, keys).masked_fill(~allowed, -torch.inf)}.get(mask)
    call: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": mask == "causal", "scale": scale}
    call["enable_gqa"] = heads[0] != heads[1]
    ours, probs = attention(q, k, v, dropout_p=0.0, operand=unchanged, **call)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **call), rtol=0, atol=1e-6)
    assert bool((probs >= 0).all())


class TestMultiheadAttention:
    """nn.MultiheadAttention in all its variants, with its fast path out of the way."""

    def wrapped(self, module: nn.MultiheadAttention) -> nn.MultiheadAttention:
        swap_in(module, QuantizedAttention, {"attention_quantizer": AttentionQuantizer("x", {})}, "x")
        return module

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("variant", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}])
    @pytest.mark.parametrize(
        "masks", ["none", "padding", "float padding", "bool", "float", "per head", "both", "causal"]
    )
    @pytest.mark.parametrize("need_weights", [True, False])
    @torch.no_grad()
    def test_equals_the_plain_module(
        self, batch_first: bool, variant: dict[str, bool], masks: str, need_weights: bool
    ) -> None:
        torch.manual_seed(0)
        module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **variant).eval()
        x = torch.randn(3, 5, 8)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 3:] = True
        square = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
        call: dict[str, Any] = {
            "none": {},
            "padding": {"key_padding_mask": padding},
            "float padding": {"key_padding_mask": torch.randn(3, 5)},
            "bool": {"attn_mask": square},
            "float": {"attn_mask": torch.randn(5, 5)},
            "per head": {"attn_mask": torch.randn(6, 5, 5)},
            "both": {"attn_mask": square, "key_padding_mask": padding},
            "causal": {"attn_mask": square, "is_causal": True},
        }[masks]
        x = x if batch_first else x.transpose(0, 1)
        plain_output, plain_weights = module(x, x, x, need_weights=need_weights, **call)
        output, weights = self.wrapped(module)(x, x, x, need_weights=need_weights, **call)
        torch.testing.assert_close(output, plain_output, rtol=0, atol=1e-6)
        assert (weights is None) == (plain_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights, plain_weights, rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_cross_attention_unbatched_and_per_head_weights(self) -> None:
        torch.manual_seed(0)
        module = nn.MultiheadAttention(8, 2).eval()
        query, memory = torch.randn(4, 8), torch.randn(6, 8)
        padding = torch.tensor([False] * 5 + [True])
        call = {"key_padding_mask": padding, "average_attn_weights": False}
        plain_output, plain_weights = module(query, memory, memory, **call)
        output, weights = self.wrapped(module)(query, memory, memory, **call)
        torch.testing.assert_close(output, plain_output, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights, plain_weights, rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_fused_projection_and_output_are_quantized(self) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).eval()

        class Self(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = module

            def forward(self, x: Tensor) -> Tensor:
                return self.layers[0](x, x, x, need_weights=False)[0]

        x = torch.randn(3, 5, 8)
        quantized = quantize(Self().eval(), {"base": "w4a4", "attention": False}, calibration=[x])
        mha = quantized.layers[0]
        holder = mha.attention_quantizer
        q, k, v = F.linear(
            by_torch(x, holder.input), by_torch(mha.in_proj_weight, holder.weight), mha.in_proj_bias
        ).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = mha.out_proj
        wanted = F.linear(by_torch(heads, out.input_quantizer), by_torch(out.weight, out.weight_quantizer), out.bias)
        torch.testing.assert_close(quantized(x), wanted, rtol=0, atol=1e-6)

    def test_separate_projections_are_refused_by_name(self) -> None:
        model = nn.ModuleDict({"cross": nn.MultiheadAttention(8, 2, kdim=6, vdim=6)})
        with pytest.raises(InputError, match="cross: separate kdim"):
            plan(model, QuantSpec.parse("w4a4"))


def test_torchs_fused_encoder_layers_are_off_while_quantized(make: Callable[[str], Case]) -> None:
    case = make("torch-encoder")
    layer = case.model.layers[0]
    before = (layer.activation_relu_or_gelu, case.model.use_nested_tensor)
    assert before == (1, True)
    # Linears alone: no attention module tells torch that something is different.
    quantized = quantize(case.model, {"weight": {"bits": 2}}, calibration=case.batches)
    with torch.no_grad():
        fused = case.output()
        fast = case.output(quantized)
        torch.testing.assert_close(
            fast, case.output(quantize(case.model, "w2a16", calibration=case.batches).train().eval())
        )
    assert not torch.allclose(fast[0], fused[0], atol=1e-2)
    from s2d.quant import remove

    remove(quantized)
    layer = quantized.layers[0]
    assert (layer.activation_relu_or_gelu, quantized.use_nested_tensor) == before


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("linear", "no attention product was seen|not take the probabilities|more than one product"),
        ("relative", "more than one product"),
    ],
)
def test_unknown_attention_is_refused_by_name(make: Callable[[str], Case], style: str, message: str) -> None:
    case = make(f"plain-{style}")
    quantizers = {which: Quantizer(FORMATS["uint8"], "tensor", name=which) for which in OPERANDS}
    module = case.model.blocks[1].attn
    swap_in(module, QuantizedAttention, {"attention_quantizer": AttentionQuantizer("blocks.1.attn", quantizers)}, "x")
    with pytest.raises(
        InputError, match=f"blocks.1.attn .FunctionalAttention. computes attention in an unknown way: ({message})"
    ):
        case.output()
    # The error leaves no mode behind.
    swap_out(module, ("attention_quantizer",))
    case.output()


def test_a_module_that_computes_no_attention_is_refused() -> None:
    module = nn.Linear(4, 4)
    swap_in(module, QuantizedAttention, {"attention_quantizer": AttentionQuantizer("odd", {})}, "odd")
    with pytest.raises(InputError, match="odd .Linear. .*no attention product was seen"):
        module(torch.randn(2, 4))


def test_interrupts_leave_no_mode_behind(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    put_in(case, ATTENTION_ONLY)
    attn = case.model.blocks[0].attn

    def interrupt(x: Tensor) -> None:
        raise KeyboardInterrupt

    attn.attention_quantizer.probs.watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        case.output()
    x = torch.randn(2, 3, 4)
    assert torch.equal((x @ x.mT), torch.matmul(x, x.mT))
    attn.attention_quantizer.probs.watch = None
    case.output()


def test_nested_attention_modules_keep_to_themselves() -> None:
    """An outer attention whose keys come from an inner one: neither sees the other's products."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            scores = x @ self.inner(x).mT
            return scores.softmax(-1) @ self.inner(x)

    outer, seen = Outer(), []
    for name, module in (("inner", outer.inner), ("outer", outer)):
        quantizer = Quantizer(FORMATS["uint8"], "tensor", name=name)
        quantizer.watch = lambda x, name=name: seen.append(name)
        swap_in(module, QuantizedAttention, {"attention_quantizer": AttentionQuantizer(name, {"q": quantizer})}, name)
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(outer(x), Outer()(x))
    assert sorted(seen) == ["inner", "inner", "outer"]


def test_the_graph_finds_the_attention_modules(case: Case) -> None:
    found = attentions_of(case.model, graph_of(case))
    names = {type(case.model.get_submodule(name)).__name__ for name in found}
    assert len(found) == 2 and len(names) == 1 and not any(found.values())
    assert names <= {"BertSelfAttention", "LlamaAttention", "ViTAttention", "FunctionalAttention", "MultiheadAttention"}


@torch.no_grad()
def test_copies_and_pickles_are_independent(case: Case) -> None:
    quantized = quantize(case.model, "w4a4", calibration=case.batches)
    wanted = case.output(quantized)
    twin = copy.deepcopy(quantized)
    restored = pickle.loads(pickle.dumps(quantized))
    for quantizer in quantizers_of(quantized):
        if not quantizer.dynamic:
            quantizer.scale.mul_(3.0)
    for other in (twin, restored):
        assert type(other) is type(quantized)
        assert torch.equal(case.output(other), wanted)
    assert not torch.equal(case.output(quantized), wanted)


def test_gradient_flows_to_every_parameter(case: Case) -> None:
    quantized = quantize(case.model, "w8a8", calibration=case.batches).train()
    plain = case.model.train()
    torch.manual_seed(1)
    case.output(quantized).square().sum().backward()
    torch.manual_seed(1)
    case.output(plain).square().sum().backward()
    mine = dict(quantized.named_parameters())
    assert mine.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert (mine[name].grad is None) == (parameter.grad is None), name
    # At 8 bits the gradient points the way of the full-precision one (dropout draws may differ between the two paths).
    if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in plain.modules()):
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None and parameter.grad.norm() > 1e-3:
                assert F.cosine_similarity(parameter.grad.flatten(), mine[name].grad.flatten(), dim=0) > 0.9, name


@torch.no_grad()
def test_tracers_see_the_same_numbers(make: Callable[[str], Case]) -> None:
    """torch.export and torch.compile take a quantized model as it is."""
    case = make("bert-sdpa")
    quantized = quantize(case.model, "w4a4", calibration=case.batches)
    exported = torch.export.export(quantized, (), kwargs=case.batches[0]).module()
    torch.testing.assert_close(case.output(exported), case.output(quantized), rtol=0, atol=1e-6)

    case = make("plain-matmul")
    quantized = quantize(case.model, "w4a4", calibration=case.batches)
    compiled = torch.compile(quantized, backend="eager")
    torch.testing.assert_close(case.output(compiled), case.output(quantized), rtol=0, atol=1e-6)


def test_a_query_that_may_look_nowhere_gets_zeros_and_a_finite_gradient() -> None:
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    output, _ = attention(q, k, v, mask, 0.0, False, None, False, unchanged)
    assert output[0, 0, 1].abs().sum() == 0
    output.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("kind", ["boolean", "float", "half"])
def test_a_query_that_may_look_nowhere_gets_zeros_and_the_others_what_torch_gives(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    seen = torch.rand(2, 1, 5, 5) > 0.4
    seen[0, 0, 2] = False
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    added = torch.zeros(seen.shape, dtype=torch.float16 if kind == "half" else torch.float32)
    mask = seen if kind == "boolean" else added.masked_fill(~seen, -torch.inf)
    found, probabilities = attention(q, k, v, mask, 0.0, False, None, False, lambda which, x: x)
    torch.testing.assert_close(found, expected.nan_to_num(), rtol=1e-5, atol=1e-6)
    assert probabilities[0, :, 2].count_nonzero() == 0
