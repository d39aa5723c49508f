"""Writers are found from the activations alone, for every wiring of a transformer block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.blocks import WIDTH, Encoder, fresh, removed, still_step, tokens
from torch import Tensor, nn

from s2d.decay.selection import SiteMetric
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.targets.weights import Target, find_targets
from s2d.writers import Call, find_writer, same_tensor


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def found_writers(model: nn.Module, *inputs: Tensor) -> SiteMetric:
    """What the first refresh finds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with removed(SelectiveSpectralDecay(model, optimizer, metric="site", mode="decoupled", strength=0.0)) as decay:
        still_step(model, optimizer, *inputs)
    assert isinstance(decay._metric, SiteMetric)
    return decay._metric


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
    metric = found_writers(model, tokens(0, batch=16, length=24))
    assert metric.writers == true_writers(pre, fused, gated, depth=2)
    q, k = ("qkv.weight[0:32]", "qkv.weight[32:64]") if fused else ("q.weight", "k.weight")
    assert metric.operands == {f"blocks.{i}.attn.{name}" for i in range(2) for name in (q, k)}


def test_long_batches_are_sampled_at_every_position() -> None:
    """As many tokens as would make a stride hit the first position of every text only."""
    model = fresh(lambda: Encoder(depth=1))
    metric = found_writers(model, tokens(0, batch=512, length=16))
    assert metric.writers == true_writers(True, False, None, depth=1)


def test_a_residual_sum_has_no_single_writer() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x + self.a(x) + self.b(x))

    model = fresh(Residual)
    assert found_writers(model, torch.randn(8, 20, WIDTH)).writers == {}


def _targets(count: int) -> list[Target]:
    return find_targets(nn.Sequential(*(nn.Linear(8, 8) for _ in range(count))))


def _calls(*outputs: Tensor, reads: Tensor | None = None) -> list[Call]:
    x = torch.zeros(1) if reads is None else reads
    return [Call(target, y, x) for target, y in zip(_targets(len(outputs)), outputs, strict=True)]


def test_traces_of_the_operations_between() -> None:
    y, other = torch.randn(64, 8), torch.randn(64, 8)
    for after in (y, F.gelu(y), F.relu(y), F.silu(y), F.dropout(y, 0.1), 3 * y):
        calls = _calls(other, y, other.flip(0))
        found = find_writer(after, calls)
        assert found is not None and found.target is calls[1].target and found.operands == ()
    assert find_writer(torch.randn(64, 8), _calls(other, y)) is None
    assert find_writer(torch.zeros(64, 8), _calls(other, y)) is None


def test_the_latest_of_equal_candidates_wins() -> None:
    y = torch.randn(64, 8)
    calls = _calls(y, y.clone())
    found = find_writer(y, calls)
    assert found is not None and found.target is calls[1].target


def test_attention_names_what_reads_with_the_values() -> None:
    x = torch.randn(4, 16, 8)
    q, k, v = (torch.randn(64, 8) + 0.5 * torch.randn(8) for _ in range(3))
    calls = _calls(q, k, v, reads=x)
    averaged = torch.softmax(torch.randn(64, 64), -1) @ v
    found = find_writer(averaged, calls)
    assert found is not None and found.target is calls[2].target
    assert found.operands == (calls[0].target, calls[1].target)


def test_another_width_is_never_a_writer() -> None:
    y = torch.randn(64, 8)
    assert find_writer(y[:, :4], _calls(y)) is None
    assert find_writer(y[:10], _calls(y)) is None


def test_numbers_that_are_none_give_no_writer() -> None:
    y = torch.randn(64, 8)
    y[3, 3] = torch.nan
    assert find_writer(y, _calls(y)) is None


def test_same_tensor_looks_at_memory() -> None:
    x = torch.randn(4, 4)
    assert same_tensor(x, x.detach()) and not same_tensor(x, x.clone()) and not same_tensor(x, x[:2])
