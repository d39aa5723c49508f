"""Which rows an audit sees: masks, fused projections, attention, convolutions; and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.audit import audit
from s2d.audit.hooks import watching
from s2d.errors import InputError
from s2d.targets.weights import Target, find_targets


def seen(model: nn.Module, batches: list[Any], **settings: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """All rows that an audit sees, by the weight's name."""
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(target: Target, x: Tensor, A: Tensor) -> None:
        rows.setdefault(target.name, []).append((x.clone(), A.clone()))

    with watching(model, find_targets(model, **settings), note, None) as feed:
        assert feed(batches) == len(batches)
    return {name: (torch.cat([x for x, _ in parts]), torch.cat([A for _, A in parts])) for name, parts in rows.items()}


def assert_products(model: nn.Module, rows: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Every output is the input times the weight, without the bias."""
    for target in find_targets(model):
        if target.name in rows:
            x, A = rows[target.name]
            torch.testing.assert_close(A, x @ target.matrix().mT, rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """Token vectors through a layer each, and a pooled one without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.fc(self.table(input_ids)).mean(1))


def padded_batch() -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(1, 20, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1, 2])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, mask


def test_padding_is_not_seen_and_pooled_rows_are() -> None:
    model, (batch, mask) = Tokens(), padded_batch()
    nn.init.constant_(model.table.weight[0], 1e6)  # what padding holds would stand out
    rows = seen(model, [batch])
    assert_products(model, rows)
    assert rows["fc.weight"][0].shape == (int(mask.sum()), 8)
    assert rows["fc.weight"][0].abs().max() < 100
    assert rows["head.weight"][0].shape == (5, 6)
    assert "unused.weight" not in rows


def test_a_mask_of_another_name_is_given_by_a_function() -> None:
    class Other(Tokens):
        def forward(self, input_ids: Tensor, real: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(input_ids)

    model, (batch, mask) = Other(), padded_batch()
    other = {"input_ids": batch["input_ids"], "real": mask}
    found = audit(model, [other], mask=lambda given: given["real"], include="fc")
    assert found.run["tokens"] == int(mask.sum())
    assert audit(model, [other], include="fc").run["tokens"] == mask.numel()


def test_a_weight_that_never_runs_has_a_row_without_statistics_and_is_listed() -> None:
    model, (batch, _) = Tokens(), padded_batch()
    found = audit(model, [batch])
    row = found.row("unused.weight")
    assert len(row.sigma) == 3 and row.stable_rank >= 1
    assert row.pcdr is row.pcdr_data is row.output_max is row.output_ratio is row.input_max is row.error is None
    assert not row.selected and found.missed == {"unused.weight": "no batch reached its module"}
    assert [row.weight for row in found.rows] == ["fc.weight", "head.weight", "unused.weight"]


class Block(nn.Module):
    """Attention as vision transformers write it: one fused projection."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


def test_a_fused_projection_is_seen_in_three_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    rows = seen(model, [torch.randn(2, 5, 12)])
    names = [f"{i}.{part}" for i in (0, 1) for part in ("qkv.weight[0:12]", "qkv.weight[12:24]", "qkv.weight[24:36]")]
    assert set(rows) == {*names, "0.proj.weight", "1.proj.weight"}
    assert_products(model, rows)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_torchs_own_attention_is_seen_whole(batch_first: bool, cross: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(12, 3, batch_first=batch_first).eval()
    x, y = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    batch = {"query": x, "key": y if cross else x, "value": y if cross else x}
    before = model(**batch)[0]
    rows = seen(model, [batch])
    assert set(rows) == {"in_proj_weight[0:12]", "in_proj_weight[12:24]", "in_proj_weight[24:36]", "out_proj.weight"}
    assert_products(model, rows)
    torch.testing.assert_close(rows["in_proj_weight[12:24]"][0], batch["key"].reshape(-1, 12))
    heads, W = rows["out_proj.weight"][0], model.out_proj.weight.detach()
    outputs = before if batch_first else before.transpose(0, 1)  # the rows are in order of the sequences
    expected = outputs.reshape(-1, 12) - model.out_proj.bias.detach()
    torch.testing.assert_close(heads @ W.T, expected, rtol=1e-4, atol=1e-5)
    assert type(model) is nn.MultiheadAttention


def test_separate_projections_of_torchs_attention_are_seen_and_its_output_is_listed_as_missed() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(12, 3, kdim=6, vdim=4, batch_first=True).eval()
    batch = (torch.randn(2, 5, 12), torch.randn(2, 4, 6), torch.randn(2, 4, 4))
    rows = seen(model, [batch])
    assert_products(model, rows)
    assert {name: x.shape[1] for name, (x, _) in rows.items()} == {
        "q_proj_weight": 12,
        "k_proj_weight": 6,
        "v_proj_weight": 4,
    }
    assert list(audit(model, [batch]).missed) == ["out_proj.weight"]


def test_torchs_encoder_is_seen_in_spite_of_its_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    before = torch.backends.mha.get_fastpath_enabled()
    expected = model(x, src_key_padding_mask=padding)
    rows = seen(model, [{"src": x, "src_key_padding_mask": padding}])
    assert len(rows) == 2 * (3 + 1 + 2)
    assert_products(model, rows)
    assert torch.backends.mha.get_fastpath_enabled() is before
    torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)


@pytest.mark.parametrize("settings", [{}, {"padding": 1, "stride": 2}, {"padding": "same"}, {"dilation": 2}])
def test_a_convolution_is_seen_by_its_patches(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 7, 3, **settings)
    x = torch.randn(2, 3, 9, 8)
    rows = seen(conv, [x])
    assert_products(conv, rows)
    expected = (conv(x) - conv.bias.detach()[:, None, None]).flatten(2).mT.reshape(-1, 7)  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(rows["weight"][1], expected, rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_has_its_spectrum_only() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1))
    found = audit(model, [torch.randn(2, 4, 6, 6)])
    assert list(found.missed) == ["0.weight"] and "grouped" in found.missed["0.weight"]
    assert found.rows[0].sigma and found.rows[0].pcdr is None and found.rows[1].pcdr is not None
    assert found.rows[0].kind == "conv" and found.rows[0].shape == [8, 18]


def test_kinds_and_patterns_choose_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 2))
    x = [torch.randn(2, 3, 3, 3)]
    assert [row.weight for row in audit(model, x, kinds=("linear",)).rows] == ["2.weight", "3.weight"]
    assert [row.weight for row in audit(model, x, exclude="3").rows] == ["0.weight", "2.weight"]
    assert [row.weight for row in audit(model, x, include=lambda module, name: name == "3").rows] == ["3.weight"]


class Doubling(nn.Linear):
    """A linear layer that computes more than one."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input) ** 2


def test_a_layer_that_computes_more_is_seen_by_its_own_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Doubling(8, 6), nn.Linear(6, 2))
    assert_products(model, seen(model, [torch.randn(4, 8)]))


def test_inputs_may_be_keywords_tuples_or_tensors_and_have_any_leading_dimensions() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.fc(input=x * scale)

    torch.manual_seed(0)
    model, x = Named(), torch.randn(2, 3, 4, 8)
    found = [audit(model, [batch]).records() for batch in (x, (x,), (x, 1.0), {"x": x}, x.reshape(-1, 8))]
    assert all(records == found[0] for records in found)


def test_a_compiled_model_is_seen() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
    x = torch.randn(5, 8)
    expected = audit(plain, [x])
    compiled = torch.compile(plain, backend="eager")
    compiled(x)
    found = audit(compiled, [x])  # pyright: ignore[reportArgumentType]
    assert found.records() == expected.records() and found.model == "Sequential"


# -- no trace ----------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Moody(nn.Module):
    """Attention, dropout, and a layer that can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.attention(x, x, x)[0])
        if self.fails:
            raise KeyboardInterrupt
        return self.fc(y)


@pytest.mark.parametrize("how", ["well", "interrupted", "batch", "nan"])
def test_the_model_is_left_as_it_was_whatever_happens(how: str) -> None:
    torch.manual_seed(0)
    model = Moody().train()
    model.attention.eval()  # a part that the user froze
    model.fc.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    kinds, count = [type(module) for module in model.modules()], hooks(model)

    model.fails = how == "interrupted"
    batch = {"batch": torch.randn(2, 3, 9), "nan": torch.full((2, 3, 8), torch.nan)}.get(how, torch.randn(2, 3, 8))
    expected = {"well": None, "interrupted": KeyboardInterrupt}.get(how, InputError)
    if expected is None:
        audit(model, [batch])
    else:
        with pytest.raises(expected):
            audit(model, [batch])

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [type(module) for module in model.modules()] == kinds and hooks(model) == count
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
