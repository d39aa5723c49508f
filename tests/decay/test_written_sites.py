"""Which weight writes each site, for every wiring of a transformer block; and that it is shrunk wherever it stands."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.blocks import HEADS, WIDTH, Encoder, fresh, removed, sgd, still_step, tokens
from torch import Tensor, nn

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.decay.written_sites import Sites, sites_of
from s2d.models.tracing import trace
from s2d.targets.weights import find_targets


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def known(model: nn.Module, batch: Any) -> Sites:
    return sites_of(trace(model, batch), find_targets(model, kinds=("linear", "norm")))


def writers(model: nn.Module, batch: Any) -> dict[str, str]:
    """The writer of the site that each weight is the first to read."""
    return {name: u[0].read.writer for name, u in known(model, batch).uses.items() if u[0].read is not None}


def operands(model: nn.Module, batch: Any) -> set[str]:
    return {site.writer for uses in known(model, batch).uses.values() for each in uses for site in each.written}


def true_writers(pre: bool, fused: bool, gated: str | None, depth: int) -> dict[str, str]:
    """By the wiring: of every site, named by the first weight that reads it."""
    truth = {}
    for i in range(depth):
        block = f"blocks.{i}"
        before = f"{block}.norm1" if pre else ("norm0" if i == 0 else f"blocks.{i - 1}.norm2")
        middle = f"{block}.norm2" if pre else f"{block}.norm1"
        q, v = ("qkv.weight[0:32]", "qkv.weight[64:96]") if fused else ("q.weight", "v.weight")
        truth[f"{block}.attn.{q}"] = f"{before}.weight"
        truth[f"{block}.attn.proj.weight"] = f"{block}.attn.{v}"
        up, down, reads = ("up", "down", "gate" if gated == "gate first" else "up") if gated else ("fc1", "fc2", "fc1")
        truth[f"{block}.mlp.{reads}.weight"] = f"{middle}.weight"
        truth[f"{block}.mlp.{down}.weight"] = f"{block}.mlp.{up}.weight"
    truth["head.weight"] = "norm.weight" if pre else f"blocks.{depth - 1}.norm2.weight"
    return truth


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("gated", [None, "gate first", "up first"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pre", [True, False])
def test_every_linear_reads_what_its_true_writer_wrote(
    pre: bool, fused: bool, gated: str | None, dropout: float
) -> None:
    model = fresh(lambda: Encoder(pre, fused, gated, dropout))
    assert writers(model, tokens(0)) == true_writers(pre, fused, gated, depth=2)
    q, k = ("qkv.weight[0:32]", "qkv.weight[32:64]") if fused else ("q.weight", "k.weight")
    assert operands(model, tokens(0)) == {f"blocks.{i}.attn.{name}" for i in range(2) for name in (q, k)}


class Between(nn.Module):
    """Some operations between two linear layers."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.other, self.first, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x), self.other(x), x))


@pytest.mark.parametrize(
    "between",
    [
        lambda y, other, x: y,
        lambda y, other, x: F.gelu(y),
        lambda y, other, x: F.relu(y),
        lambda y, other, x: F.silu(y),
        lambda y, other, x: F.dropout(y, 0.1),
        lambda y, other, x: 3 * y,
        lambda y, other, x: y.square().relu(),
        lambda y, other, x: y * torch.sigmoid(1.7 * y),
        lambda y, other, x: y * other.tanh(),
        lambda y, other, x: y.unflatten(-1, (4, -1)).transpose(1, 2).transpose(1, 2).flatten(-2),
    ],
)
def test_traces_of_the_operations_between(between: Callable[..., Tensor]) -> None:
    assert writers(Between(between), torch.randn(8, 20, WIDTH)) == {"second.weight": "first.weight"}


@pytest.mark.parametrize(
    "between",
    [
        lambda y, other, x: x + y + other,
        lambda y, other, x: y + other,
        lambda y, other, x: F.layer_norm(y, (WIDTH,)),
        lambda y, other, x: x,
        lambda y, other, x: torch.zeros_like(y),
        lambda y, other, x: torch.cat([y[..., :16], other[..., 16:]], -1),
        lambda y, other, x: y.mT @ other @ x.mT @ x / 9,
    ],
)
def test_a_sum_has_no_single_writer(between: Callable[..., Tensor]) -> None:
    assert writers(Between(between), torch.randn(8, 20, WIDTH)) == {}


def test_an_in_place_sum_is_a_sum() -> None:
    class Block(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.fc1, self.fc2, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc2(torch.relu(self.fc1(x)))
            if self.in_place:
                y += x
            else:
                y = y + x
            return self.head(y)

    for in_place in (False, True):
        assert writers(Block(in_place), torch.randn(600, WIDTH)) == {"fc2.weight": "fc1.weight"}


class Grouped(nn.Module):
    """Two heads of keys and values for four of queries, fused in one matrix or not."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.fused, self.norm, self.proj = fused, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        if fused:
            self.mixed = nn.Linear(WIDTH, 2 * WIDTH)
        else:
            self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * size), nn.Linear(WIDTH, 2 * size)

    def forward(self, x: Tensor) -> Tensor:
        x, half = self.norm(x), WIDTH // 2
        q, k, v = self.mixed(x).split([WIDTH, half, half], -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        y = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
def test_repeated_values_are_shrunk_in_the_rows_that_write_them(fused: bool) -> None:
    model = fresh(lambda: Grouped(fused))
    name, row = ("mixed.weight", WIDTH + WIDTH // 2 + 11) if fused else ("v.weight", 11)
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter[row] *= 60
    before, optimizer = parameter.detach().clone(), sgd(model, 1e-30)
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.1, outlier_ratio=5.0)):
        for step in range(12):
            still_step(model, optimizer, torch.randn(8, 20, WIDTH, generator=torch.Generator().manual_seed(step)))
    shrunk = (parameter / before).mean(1)
    assert shrunk[row] < 0.35
    rest = torch.arange(len(shrunk)) != row
    assert torch.equal(parameter[rest], before[rest])


class Functional(nn.Module):
    """A weight of a module that is never called, as in timm's EVA and BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(F.linear(self.norm(x), self.fc1.weight, self.fc1.bias)))


def test_a_weight_that_is_used_without_its_module_has_its_sites_too() -> None:
    model = fresh(Functional)
    with torch.no_grad():
        model.get_parameter("norm.weight")[3] = 50
        model.get_parameter("fc1.weight")[7] *= 80
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = sgd(model, 1e-30)
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.1, outlier_ratio=5.0)):
        for step in range(10):
            still_step(model, optimizer, torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(step)))
    for name, row in (("norm.weight", 3), ("fc1.weight", 7)):
        shrunk = (model.get_parameter(name) / before[name]).reshape(WIDTH, -1)[:, 0]
        assert shrunk[row] < 0.5 and (shrunk[torch.arange(WIDTH) != row] == 1).all()


class Shared(nn.Module):
    """One block that runs several times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(3):
            x = self.norm(x + self.fc(x))
        return x


def test_a_shared_weight_is_shrunk_once_a_step_and_what_wrote_another_call_is_not() -> None:
    model = fresh(Shared)
    with torch.no_grad():
        model.get_parameter("norm.weight")[5] = 60
    before, optimizer = model.get_parameter("enter.weight").detach().clone(), sgd(model, 1e-30)
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.1, outlier_ratio=6.0)) as decay:
        for _ in range(5):
            still_step(model, optimizer, torch.randn(64, WIDTH))
        assert decay.selected == {"norm.weight": 1}
    assert model.get_parameter("norm.weight")[5].item() == pytest.approx(60 * 2.718281828**-0.5, rel=1e-5)
    assert torch.equal(model.get_parameter("enter.weight"), before)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.more = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.deep = False

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc1(x))
        return self.fc2(self.more(y) if self.deep else y)


def test_parts_that_run_later_are_traced_then_and_a_model_that_was_rebuilt_anew() -> None:
    model = fresh(Branching)
    optimizer = sgd(model, 1e-30)
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.0, refresh_every=1)) as decay:
        still_step(model, optimizer, torch.randn(64, WIDTH))
        assert {row["weight"] for row in decay.history} == {"fc1.weight"} and "more.weight" in decay.skipped
        model.deep = True  # type: ignore[assignment]
        for _ in range(2):
            still_step(model, optimizer, torch.randn(64, WIDTH))
        assert "more.weight" not in decay.skipped
        before = decay._structure._known[model]
        for _ in range(2):
            still_step(model, optimizer, torch.randn(64, WIDTH))
        assert decay._structure._known[model] is before
        model.new = nn.Identity()
        for _ in range(2):
            still_step(model, optimizer, torch.randn(64, WIDTH))
        assert decay._structure._known[model] is not before


def test_a_model_that_cannot_be_traced_says_so_in_one_line() -> None:
    class Once(nn.Module):
        """Refuses to run but for its own training step."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise ValueError("only for training")
            return self.fc(self.norm(x))

    model = Once()
    optimizer = sgd(model)
    with removed(SelectiveSpectralDecay(model, optimizer)) as decay, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            still_step(model, optimizer, torch.randn(64, WIDTH))
    texts = [str(each.message) for each in said if "traced" in str(each.message)]
    assert len(texts) == 1 and "only for training" in texts[0] and "x [64, 32]" in texts[0]
    assert not decay.selected


# -- padding -----------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Two inputs with as many tokens; the mask is that of the first."""

    def __init__(self) -> None:
        super().__init__()
        layer = dict(d_model=WIDTH, nhead=4, dim_feedforward=48, dropout=0.0, batch_first=True)
        self.text, self.image = (nn.TransformerEncoderLayer(**layer) for _ in range(2))  # type: ignore[arg-type]

    def forward(self, words: Tensor, patches: Tensor, hidden: Tensor) -> Tensor:
        return self.text(words, src_key_padding_mask=hidden).mean(1) + self.image(patches).mean(1)


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_a_mask_is_laid_on_its_own_tokens_only(form: str) -> None:
    torch.manual_seed(1)
    words, patches, hidden = torch.randn(6, 10, WIDTH), torch.randn(6, 10, WIDTH), torch.zeros(6, 10, dtype=torch.bool)
    hidden[:3, 6:] = True
    mask = hidden if form == "bool" else torch.zeros(6, 10).masked_fill(hidden, -torch.inf)

    def seen(spoilt: Tensor, which: int) -> dict[str, float]:
        model = fresh(Towers)
        given = [words, patches]
        given[which] = given[which] + spoilt
        settings: dict[str, Any] = {"metric": "weight", "mode": "decoupled", "outlier_ratio": 0.0, "strength": 0.0}
        optimizer = sgd(model)
        with removed(SelectiveSpectralDecay(model, optimizer, **settings)) as decay:
            still_step(model, optimizer, *given, mask)
            return {row["weight"]: row["outlier_max"] for row in decay.history}

    nothing, padding = torch.zeros(()), 1000.0 * hidden[..., None]
    clean = seen(nothing, 0)
    assert seen(padding, 0) == pytest.approx(clean, rel=1e-4)  # padding of the text is no token
    spoilt = seen(padding, 1)  # the image has none
    assert all(spoilt[name] > 10 * clean[name] for name in clean if name.startswith("image.self_attn.in_proj"))


@pytest.mark.parametrize("by_parts", [False, True])
def test_a_loop_that_calls_the_parts_one_by_one_conditions_the_same_weights(by_parts: bool) -> None:
    """Lightning's `training_step` may never call the model itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Dropout(0.1), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    with torch.no_grad():
        model.get_parameter("0.weight")[3], model.get_parameter("2.weight")[5] = 40.0, 200.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    decay = SelectiveSpectralDecay(model, optimizer, strength=0.1, refresh_every=1)
    for step in range(3):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        parts = [model[0], lambda y: F.dropout(y, 0.1), model[2], F.gelu, model[4]] if by_parts else [model]
        functools.reduce(lambda y, part: part(y), parts, x).sum().backward()
        optimizer.step()
    decay.remove()
    assert {record["weight"] for record in decay.history if record["selected"]} == {"0.weight", "2.weight"}
    assert model.get_parameter("0.weight")[3].item() == pytest.approx(40 * math.exp(-0.3), rel=1e-4)


class Several(nn.Module):
    """Weights of all kinds that write no site alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.conv = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(16),
            nn.Linear(16, 24),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
        )
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.bn(self.stem(x)))).flatten(2).mT
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x))


def test_what_writes_no_site_is_listed_with_the_reason() -> None:
    model = fresh(Several)
    optimizer = sgd(model)
    with removed(SelectiveSpectralDecay(model, optimizer)) as decay:
        assert decay.without_site == {}  # nothing has run
        still_step(model, optimizer, torch.randn(2, 3, 4, 4))
        reasons = {name.removesuffix(".weight"): why for name, why in decay.without_site.items()}
        assert {row["weight"].removesuffix(".weight") for row in decay.history} == {"norm", "up", "last"}
    assert reasons.keys() == {"bn", "gate", "down", "head"}
    wanted = {"bn": "convolutions", "gate": "other factor", "down": "part of a sum", "head": "the model's output"}
    assert all(told in reasons[name] for name, told in wanted.items())
