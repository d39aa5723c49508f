"""What is left out of a model, by name; and models that are compiled, or trade time for memory."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.blocks import (
    WAY_NAMES,
    WAYS,
    WIDTH,
    Encoder,
    Two,
    X,
    deciding,
    fresh,
    gain,
    normed,
    removed,
    sgd,
    still_step,
    tokens,
    weights,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# -- what is left out --------------------------------------------------------------------------------------------------


def test_frozen_weights_and_biases_are_never_touched() -> None:
    model = nn.ModuleDict({"a": normed(), "b": normed(), "c": normed()})
    for parameter in model["a"].parameters():
        parameter.requires_grad_(False)
    model["b"].first.bias.requires_grad_(False)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        model["b"].first.bias[5] = 3.0  # type: ignore[index, operator]
    trained = [p for p in [*model["a"].parameters(), *model["b"].parameters()] if p.requires_grad]
    optimizer, before = torch.optim.SGD(trained, lr=0.1), weights(model)
    with deciding(model, optimizer) as decay:
        sum((part(X) * 0).sum() for part in model.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        assert decay.skipped["a.first.weight"] == "frozen (requires_grad is False)"
        assert decay.skipped["c.first.weight"] == "no optimizer passed here holds it"
        assert decay.selected == {"b.first.weight": 1}
    changed = {name for name, old in before.items() if not torch.equal(old, model.state_dict()[name])}
    assert changed == {"b.first.weight"}


class Positions(nn.Embedding):
    """A table of positions: it reads a mask, as OPT's."""

    def forward(self, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(mask.cumsum(1).long() - 1)


class ScaledTable(nn.Embedding):
    """As Gemma's."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return 3.0 * super().forward(ids)


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.body = ScaledTable(9, 8), Positions(6, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.words(ids) + self.places(torch.ones_like(ids)))


@pytest.mark.parametrize("metric", ["weight", "data"])
def test_a_table_that_reads_no_row_numbers_is_left_out_by_name(metric: Any) -> None:
    torch.manual_seed(0)
    model = Placed()
    with torch.no_grad():
        model.words.weight[:, 5] += 30.0
    optimizer, kinds = sgd(model), ("linear", "embedding")
    settings: dict[str, Any] = {"metric": metric, "kinds": kinds, "outlier_ratio": 2.0, "threshold": 0.2}
    with removed(SelectiveSpectralDecay(model, optimizer, **settings)) as decay:
        still_step(model, optimizer, torch.randint(9, (2, 6)))
        assert list(decay.skipped) == ["places.weight"] and "positions" in decay.skipped["places.weight"]
        assert "words.weight" in {target.name for target in decay.targets}


def test_tied_weights_are_left_out_by_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(self.embed(ids)))

    model = Tied()
    optimizer = sgd(model)
    kinds: Any = ("linear", "embedding")
    with removed(SelectiveSpectralDecay(model, optimizer, metric="weight", mode="decoupled", kinds=kinds)) as decay:
        still_step(model, optimizer, torch.randint(9, (4, 5)))
        assert decay.skipped == {"embed.weight": "tied to embed.weight, head.weight"}
        assert [target.name for target in decay.targets] == ["body.weight"]


def test_lora_factors_are_left_out_by_name() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
            self.base_layer.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    for model, prefix in ((Two(Adapted(), nn.Linear(8, 8)), "first."), (Adapted(), "")):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if prefix:
            decay = SelectiveSpectralDecay(model, optimizer)
            decay.remove()
            assert "LoRA" in decay.skipped[f"{prefix}lora_A.default.weight"]
            assert "LoRA" in decay.skipped[f"{prefix}lora_B.default.weight"]
            assert "frozen" in decay.skipped[f"{prefix}base_layer.weight"]
            assert [target.name for target in decay.targets] == ["second.weight"]
        else:
            with pytest.raises(InputError, match="nothing to condition: all 3 matching weights") as caught:
                SelectiveSpectralDecay(model, optimizer)
            assert "\n" not in str(caught.value)


def test_weights_that_are_no_single_matrix_are_left_out_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = sgd(model)
    with removed(SelectiveSpectralDecay(model, optimizer, preset="paper")) as decay:
        still_step(model, optimizer, torch.randn(2, 4, 9, 9))
        assert "grouped" in decay.skipped["0.weight"] and "channels last" in decay.skipped["2.weight"]
        assert [r["weight"] for r in decay.history] == ["1.weight"]
    words = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 8))
    kinds: Any = ("embedding", "linear")
    decay = SelectiveSpectralDecay(words, sgd(words), metric="weight", mode="coupled", kinds=kinds)
    decay.remove()
    assert "sparse" in decay.skipped["0.weight"]


def test_flat_shards_are_refused() -> None:
    model = Two(nn.Linear(8, 8), nn.Linear(8, 8))
    model.first.weight = nn.Parameter(torch.randn(20))  # what FSDP1 leaves of a weight on one rank
    with pytest.raises(InputError, match=r"first\.weight is sharded"):
        SelectiveSpectralDecay(model, sgd(model))


def test_modules_that_never_run_are_listed() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.attention = normed(), nn.Linear(3, 3), nn.MultiheadAttention(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.attention(x, x, x)[0])

    model = Spare()
    optimizer = sgd(model)
    with warnings.catch_warnings(), deciding(model, optimizer) as decay:
        warnings.simplefilter("error")
        still_step(model, optimizer, X)
        assert "used.first.weight" not in decay.skipped
        for name in ("unused.weight", "attention.out_proj.weight"):
            assert "was not called" in decay.skipped[name]
        assert "attention.in_proj_weight[0:32]" not in decay.skipped


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_attention_is_seen_though_its_projections_are_no_modules(batch_first: bool) -> None:
    block = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", norm_first=True, batch_first=batch_first)
    with torch.no_grad():
        block.norm1.weight[5] = 60.0  # read by the attention's projections alone
        block.self_attn.in_proj_weight[128 + 9] *= 60.0  # a value channel
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-9)  # only the decay moves weights
    decay = SelectiveSpectralDecay(block, optimizer, strength=0.05, outlier_ratio=8.0)
    before = weights(block)
    for _ in range(40):
        block(torch.randn(8, 16, 64)).sum().backward()
        optimizer.step()
    first = {row["weight"]: row["outlier_ratio"] for row in list(decay.history)[:8]}
    decay.remove()
    after = block.state_dict()
    assert first["norm1.weight"] > 8 and first["self_attn.in_proj_weight[128:192]"] > 8
    for name, channel in (("norm1.weight", 5), ("self_attn.in_proj_weight", 128 + 9)):
        shrunk = (after[name] / before[name]).reshape(len(before[name]), -1)[:, 0]
        assert shrunk[channel] < 0.5
        others = torch.arange(len(shrunk)) != channel
        torch.testing.assert_close(shrunk[others], torch.ones(len(shrunk) - 1), atol=0.05, rtol=0)


def test_a_model_that_does_not_run_at_all_is_warned_about() -> None:
    model, other = normed(), normed()
    optimizer = sgd(model)
    with deciding(model, optimizer) as decay, pytest.warns(UserWarning, match="no forward pass of the conditioned"):
        for _ in range(2):
            other(X).sum().backward()
            optimizer.step()
    assert decay.selected == {}


# -- wrappers ----------------------------------------------------------------------------------------------------------


def stance() -> str:
    import torch._dynamo.eval_frame as eval_frame

    return eval_frame._stance.stance


@pytest.mark.parametrize("order", ["compiled first", "compiled later", "in place", "in place later", "a part"])
def test_compiled_models_show_their_refreshes(order: str) -> None:
    torch._dynamo.reset()
    model = normed()
    run: nn.Module = torch.compile(model, backend="eager") if order == "compiled first" else model  # type: ignore[assignment]
    if order == "in place":
        model.compile(backend="eager")
    if order == "a part":
        model.second = torch.compile(model.second, backend="eager")  # type: ignore[assignment]
    optimizer = sgd(model)
    with deciding(run, optimizer, refresh_every=3) as decay:
        if order == "compiled later":
            run = torch.compile(model, backend="eager")  # type: ignore[assignment]
        if order == "in place later":
            model.compile(backend="eager")
        for step in range(8):
            still_step(run, optimizer, X)
            # Armed: after each third step; once more where the first look came to nothing but compiled code.
            assert (stance() == "force_eager") is ((step + 1) % 3 == 0 or (step == 0 and "later" in order))
        assert decay.selected == {"first.weight": 1} and decay.step_count == 8
        looks = 7 if "later" in order else 8
        assert gain(model) == pytest.approx(40 * math.exp(-0.05 * looks), rel=1e-5)
        still_step(run, optimizer, X)
        assert stance() == "force_eager"
    assert stance() == "default"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_activation_checkpointing_changes_nothing(way: dict[str, Any], pre: bool, reentrant: bool) -> None:
    seen = []
    for saves_memory in (False, True):
        model = fresh(lambda: Encoder(pre=pre, dropout=0.1))
        if saves_memory:
            for block in model.get_submodule("blocks"):  # type: ignore[attr-defined]
                forward = block.forward
                block.forward = lambda x, mask=None, forward=forward: checkpoint(
                    forward, x, mask, use_reentrant=reentrant
                )
        optimizer = sgd(model, lr=0.01)
        way = {**way, "threshold": 0.1, "strength": 0.01, "refresh_every": 1}
        with removed(SelectiveSpectralDecay(model, optimizer, **way)) as decay:
            for step in range(2):
                torch.manual_seed(step)
                optimizer.zero_grad()
                F.cross_entropy(model(tokens(step)), torch.tensor([0, 1, 2, 3])).backward()
                optimizer.step()
            seen.append((decay.selected, {(r["step"], r["weight"]): r["outlier_ratio"] for r in decay.history}))
    assert seen[0][0] == seen[1][0]
    plain, again = seen[0][1], seen[1][1]
    for (step, name), ratio in plain.items():
        # The recomputed pass knows attention's operands already, which are first shrunk a refresh later otherwise.
        assert again[step, name] == pytest.approx(ratio, rel=1e-3 if step == 0 else 0.02), name
