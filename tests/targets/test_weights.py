"""Which weights are meant: names, slices, patterns, ties, and what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2d.errors import InputError
from s2d.targets.weights import find_targets


class Attention(nn.Module):
    """timm's way: one Linear for q, k and v."""

    def __init__(self, width: int = 8, kv_width: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, width // 2
        self.qkv = nn.Linear(width, width + 2 * (kv_width or width))
        self.proj = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.patch = nn.Conv2d(3, 8, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def names(model: nn.Module, *args: object, **kwargs: object) -> list[str]:
    return [target.name for target in find_targets(model, *args, **kwargs)]  # type: ignore[arg-type]


def test_default_is_every_linear_and_convolution_in_order() -> None:
    assert names(Model()) == [
        "patch.weight",
        *(
            f"blocks.{i}.{part}"
            for i in range(2)
            for part in (
                "attn.qkv.weight[0:8]",
                "attn.qkv.weight[8:16]",
                "attn.qkv.weight[16:24]",
                "attn.proj.weight",
                "mlp.0.weight",
                "mlp.2.weight",
            )
        ),
        "head.weight",
    ]


def test_slices_are_views_of_the_fused_weight() -> None:
    model = Model()
    key = find_targets(model, "blocks.0.attn.qkv.weight[8:16]")[0]
    weight = dict(model.named_parameters())["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(key.matrix(), weight[8:16].detach())
    key.matrix().zero_()
    assert weight[8:16].abs().sum() == 0 and weight[:8].abs().sum() > 0
    gradient = torch.arange(24.0).unsqueeze(1).expand(24, 8)
    assert key.view(gradient)[:, 0].tolist() == list(range(8, 16))


def test_convolutions_are_flattened_and_norms_are_not_matrices() -> None:
    model = Model()
    patch = find_targets(model, "patch")[0]
    assert patch.kind == "conv" and patch.matrix().shape == (8, 48)
    norm = find_targets(model, "blocks.1.norm1", kinds=("norm",))[0]
    assert norm.kind == "norm" and norm.parameter.shape == (8,)
    with pytest.raises(InputError, match="norm gain, not a matrix"):
        norm.matrix()


def test_bare_in_proj_weight_of_multihead_attention() -> None:
    targets = find_targets(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}))
    assert [str(target) for target in targets] == [
        "attn.in_proj_weight[0:8]",
        "attn.in_proj_weight[8:16]",
        "attn.in_proj_weight[16:24]",
        "attn.out_proj.weight",
    ]
    assert targets[1].parameter_name == "in_proj_weight" and targets[1].module_name == "attn"


def test_grouped_query_and_interleaved_qkv_stay_whole() -> None:
    grouped = nn.ModuleDict({"attn": Attention(8, kv_width=2)})
    assert names(grouped, "*qkv*") == ["attn.qkv.weight"]

    class GPTNeoXAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query_key_value = nn.Linear(8, 24)

    assert names(nn.ModuleDict({"a": GPTNeoXAttention()})) == ["a.query_key_value.weight"]


def test_transposed_linear_of_transformers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    attention = conv1d(24, 8)  # [in, out] = [8, 24]
    targets = find_targets(nn.ModuleDict({"c_attn": attention, "c_fc": conv1d(32, 8)}))
    assert [target.matrix().shape for target in targets] == [(8, 8), (8, 8), (8, 8), (32, 8)]
    torch.testing.assert_close(targets[2].matrix(), attention.weight.detach().T[16:24])


def test_ties_appear_once_under_the_first_name_of_the_kinds_asked_for() -> None:
    assert "head.weight" in names(Model())
    both = names(Model(), kinds=("linear", "embedding"))
    assert "tokens.weight" in both and "head.weight" not in both


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("blocks.1.mlp.2", ["blocks.1.mlp.2.weight"]),
        ("blocks.1.mlp.2.weight", ["blocks.1.mlp.2.weight"]),
        ("*.mlp.0", ["blocks.0.mlp.0.weight", "blocks.1.mlp.0.weight"]),
        ("re:mlp\\.[02]\\.weight$", [f"blocks.{i}.mlp.{j}.weight" for i in (0, 1) for j in (0, 2)]),
        (["patch", "head"], ["patch.weight", "head.weight"]),
        (lambda module, name: name.endswith("proj"), ["blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight"]),
    ],
)
def test_selection(include: object, expected: list[str]) -> None:
    assert names(Model(), include) == expected


def test_exclude_takes_away_and_may_match_nothing() -> None:
    assert names(Model(), "*mlp*", exclude=("re:^blocks\\.0", "*nothing*")) == [
        "blocks.1.mlp.0.weight",
        "blocks.1.mlp.2.weight",
    ]
    with pytest.raises(InputError, match="excludes every selected weight"):
        find_targets(Model(), "patch", exclude="*")


def test_depth_is_the_block_number() -> None:
    depths = {target.name: target.depth for target in find_targets(Model())}
    assert depths["patch.weight"] is None and depths["blocks.1.mlp.0.weight"] == 1
    assert depths["blocks.1.attn.qkv.weight[8:16]"] == 1


def test_no_match_lists_close_names() -> None:
    with pytest.raises(InputError, match=r"matches 'blocks.0.mlp.3'; close names: .*blocks.0.mlp.[02]"):
        find_targets(Model(), "blocks.0.mlp.3")
    with pytest.raises(InputError, match="'re:\\(' is not a regular expression"):
        find_targets(Model(), "re:(")
    with pytest.raises(InputError, match="unknown kind of weight 'dense'"):
        find_targets(Model(), kinds=("dense",))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="callable selects no weight"):
        find_targets(Model(), lambda module, name: False)


def test_one_of_several_patterns_without_match_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no weight of the model matches '\\*bath'"):
        assert names(Model(), ["patch", "*bath"]) == ["patch.weight"]


def test_unusable_weights_are_left_out() -> None:
    model = nn.ModuleDict(
        {
            "meta": nn.Linear(4, 4, device="meta"),
            "lazy": nn.LazyLinear(4),
            "eight": nn.Linear(4, 4),
            "fine": nn.Linear(4, 4),
            "brain": nn.Linear(4, 4, dtype=torch.bfloat16),
        }
    )
    model["eight"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert names(model) == ["fine.weight", "brain.weight"]
    with pytest.raises(InputError, match="has no linear or conv weights"):
        find_targets(nn.ModuleDict({"norm": nn.LayerNorm(4), "meta": nn.Linear(2, 2, device="meta")}))


def test_wrappers_do_not_change_names() -> None:
    model = Model()
    assert names(torch.compile(model)) == names(model)  # type: ignore[arg-type]
    assert names(nn.DataParallel(model)) == names(model)


def test_parameter_follows_a_replaced_weight() -> None:
    model = Model()
    target = find_targets(model, "patch")[0]
    model.patch.weight = nn.Parameter(torch.ones(8, 3, 4, 4))
    assert target.matrix().sum() == 8 * 48
