from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.quant.tiny_models import Case, PlainTransformer
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.masks import token_mask
from s2d.models.running import evaluating, real_tokens
from s2d.quant import quantize, record
from s2d.quant.calibration.observe import Batches
from s2d.quant.modules.sites import is_quantized, quantizers_of

OBSERVERS = ("minmax", "percentile", "mse")


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {q.name: q.scale.clone() for q in quantizers_of(model) if not q.dynamic}


@pytest.mark.parametrize("implementation", ["bert-sdpa", "bert-eager"])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_stands_in_padding_changes_nothing(
    make: Callable[[str], Case], implementation: str, observer: str
) -> None:
    case = make(implementation)
    real = case.batches[0]["attention_mask"].bool()
    others = [{**batch, "input_ids": torch.where(real, batch["input_ids"], 7)} for batch in case.batches]
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(case.batches, others, strict=True))
    first, second = (
        scales(quantize(case.model, "w4a4", calibration=b, observer=observer)) for b in (case.batches, others)
    )
    assert first.keys() == second.keys() and len(first) == 2 * (6 * 2 + 4)
    for name, scale in first.items():
        assert torch.equal(scale, second[name]), name


def test_without_the_mask_padding_would_count(make: Callable[[str], Case]) -> None:
    """The check above can fail: ranges from all tokens differ from those of real tokens."""
    case = make("bert-sdpa")
    with torch.no_grad():
        x = case.model.embeddings(case.batches[0]["input_ids"])
    mask = case.batches[0]["attention_mask"].bool()
    assert real_tokens(x, mask, "input").shape == (int(mask.sum()), 32)
    assert real_tokens(x, None, "input") is x


def test_the_scale_is_that_of_the_real_tokens(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    quantized = quantize(case.model, "w8a8", calibration=case.batches)
    site = quantized.encoder.layer[0].attention.self.query.input_quantizer
    lo, hi = [], []
    with torch.no_grad():
        for batch in case.batches:
            x = case.model.embeddings(batch["input_ids"])[batch["attention_mask"].bool()]
            lo.append(x.min())
            hi.append(x.max())
    assert torch.allclose(site.scale, (max(hi) - min(lo)) / 255)


def test_layouts_of_real_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)  # 3 x 4, 6 real
    ids = torch.arange(12).view(3, 4)
    wanted = ids[mask].tolist()
    tokens = ids[..., None].float()  # [B, T, 1]
    heads = tokens[:, None].expand(3, 2, 4, 1)

    def got(x: Tensor, what: Any) -> list[int]:
        return sorted(int(v) for v in real_tokens(x, mask, what).flatten())

    assert got(tokens, "input") == wanted
    assert got(tokens.transpose(0, 1), "input") == wanted
    assert got(tokens.flatten(0, 1), "input") == wanted
    assert got(heads, "q") == sorted(wanted * 2)
    assert got(heads.flatten(0, 1), "v") == sorted(wanted * 2)
    assert got(tokens, "k") == wanted
    # As many heads as tokens: an operand's second dimension is still the heads.
    assert got(tokens[:, None].expand(3, 4, 4, 1), "probs") == sorted(wanted * 4)
    for elsewhere in (torch.zeros(3, 5, 1), torch.zeros(3, 1)):
        assert real_tokens(elsewhere, mask, "input") is elsewhere
    assert real_tokens(torch.zeros(3, 2, 5, 1), mask, "q").shape == (3, 2, 5, 1)


def test_the_mask_is_found_wherever_it_is_passed() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            seen.append(mask())
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            seen.append(mask())
            return self.inner(x[:, :2], None if attention_mask is None else attention_mask[:, :2])

    model, seen = Outer(), []
    given = torch.tensor([[1, 1, 0], [1, 0, 0]])
    with token_mask(model) as mask:
        model(torch.zeros(2, 3), given)
        model(torch.zeros(2, 3), attention_mask=torch.ones(2, 3, dtype=torch.long))
        model(torch.zeros(2, 3))
    assert [None if m is None else m.tolist() for m in seen] == [
        given.bool().tolist(),
        given[:, :2].bool().tolist(),
    ] + [None] * 4
    assert not model._forward_pre_hooks and not model.inner._forward_pre_hooks


class Masked(nn.Module):
    """Torch's own encoder behind a model that calls the mask by another name."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=hidden)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_padding_of_torch_encoders_does_not_count(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(3, 6, 32)
    hidden = torch.arange(6) >= torch.tensor([[6], [4], [2]])
    mask = hidden if kind == "boolean" else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    calm, wild = x.masked_fill(hidden[..., None], 0.0), x.masked_fill(hidden[..., None], 100.0)
    found = [scales(quantize(model, "w4a4", calibration=[{"x": padded, "hidden": mask}])) for padded in (calm, wild)]
    for name, scale in found[0].items():
        torch.testing.assert_close(scale, found[1][name], msg=name)
    shown = scales(quantize(model, "w4a4", calibration=[{"x": wild, "hidden": torch.zeros_like(hidden)}]))
    first = "encoder.layers.0.self_attn.input"
    assert shown[first] > 5 * found[1][first]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_do_not_depend_on_batching(make: Callable[[str], Case], observer: str) -> None:
    case = make("plain-sdpa")
    together = [{"x": torch.cat([batch["x"] for batch in case.batches])}]
    first, second = (
        scales(quantize(case.model, "w4a4", calibration=b, observer=observer)) for b in (case.batches, together)
    )
    for name, scale in first.items():
        torch.testing.assert_close(scale, second[name], rtol=1e-4, atol=0)


def test_every_form_of_batch(make: Callable[[str], Case]) -> None:
    case = make("plain-matmul")
    wanted = scales(quantize(case.model, "w4a4", calibration=case.batches))

    def generator() -> Iterator[Any]:
        yield from case.batches

    tensors = [batch["x"] for batch in case.batches]
    loader = torch.utils.data.DataLoader(torch.cat(tensors), batch_size=3)  # type: ignore[arg-type]
    for form in (generator(), tuple(case.batches), tensors, [(t,) for t in tensors], [[t] for t in tensors], loader):
        got = scales(quantize(case.model, "w4a4", calibration=form))
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_generator_is_read_once() -> None:
    batches = Batches(iter([1, 2, 3]))
    assert batches.first == 1 and list(batches) == [1, 2, 3]
    with pytest.raises(InputError, match="several times; give a list"):
        list(batches)
    batches = Batches([1, 2])
    assert list(batches) == list(batches) == [1, 2] and len(batches) == 2


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration data is empty"),
        (iter(()), "calibration data is empty"),
        ({"x": torch.zeros(1, 7, 16)}, "list of batches.*not one dict"),
        (torch.zeros(1, 7, 16), "list of batches.*not one Tensor"),
        (None, "list of batches.*not one NoneType"),
        (["text"], "calibration batch 0 is a str"),
        ([{"y": torch.zeros(1, 7, 16)}], "calibration batch 0 does not fit PlainTransformer: .*'y'"),
        (
            [{"x": torch.zeros(1, 7, 16)}, {"x": torch.zeros(1, 7, 15)}],
            "calibration batch 1 does not fit PlainTransformer",
        ),
        ([{"x": torch.full((1, 7, 16), torch.nan)}], r"blocks.0.attn.qkv.input received NaN or infinite"),
    ],
)
def test_bad_calibration_data(calibration: Any, message: str) -> None:
    model = PlainTransformer().eval()
    before = model.state_dict()
    with pytest.raises(InputError, match=message):
        quantize(model, "w4a4", calibration=calibration, inplace=True)
    # Nothing is left behind, even in place.
    assert not is_quantized(model) and model.state_dict().keys() == before.keys()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_nan_weights_name_the_site() -> None:
    model = PlainTransformer().eval()
    with torch.no_grad():
        model.blocks[1].fc2.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="blocks.1.fc2.weight holds NaN"):
        quantize(model, "w4a16", calibration=[torch.zeros(1, 7, 16)])


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = PlainTransformer(), PlainTransformer()

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.a(a) if b is None else self.a(a) + self.b(b)


def test_sites_that_no_data_reaches_are_named() -> None:
    x = torch.randn(2, 7, 16)
    with pytest.raises(InputError, match=r"never reached b.blocks.0.attn.qkv.input, .* and \d+ more"):
        quantize(TwoTowers().eval(), "w4a4", calibration=[{"a": x}])
    quantize(TwoTowers().eval(), {"base": "w4a4", "overrides": {"b.*": "keep"}}, calibration=[{"a": x}, {"a": x}])


def test_attention_that_appears_later_is_not_skipped() -> None:
    x = torch.randn(2, 7, 16)
    with pytest.raises(
        InputError, match="b.blocks.0.attn .FunctionalAttention. computes attention that the plan does not cover"
    ):
        quantize(TwoTowers().eval(), "w4a4", calibration=[{"a": x}, {"a": x, "b": x}])
    # Without attention sites it is nobody's business.
    quantize(TwoTowers().eval(), {"base": "w4a4", "attention": False}, calibration=[{"a": x}, {"a": x, "b": x}])


def test_an_attention_that_is_none_we_know_is_kept_with_the_reason(make: Callable[[str], Case]) -> None:
    case = make("plain-linear")
    kept = {s.name: s.reason for s in record(quantize(case.model, "w4a4", calibration=case.batches)).sites if s.reason}
    assert "FunctionalAttention multiplies two activations in what is no attention" in kept["blocks.0.attn.input"]
    quantize(case.model, {"base": "w4a4", "attention": False}, calibration=case.batches)


def test_evaluation_mode_is_put_back() -> None:
    model = PlainTransformer().train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
