"""Settings, and what one step does to the weights, in every metric and mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.blocks import (
    WAY_NAMES,
    WAYS,
    Encoder,
    Two,
    equal,
    fresh,
    hooks_of,
    removed,
    sgd,
    spiked,
    still_step,
    tokens,
    train,
    weights,
)
from tests.spectral.test_pcdr import direct_pcdr
from torch import Tensor, nn

from s2d.decay.selection.base import RELEASE_CHANNEL
from s2d.decay.spectral_decay import SelectiveSpectralDecay


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def spike_and_noise(bias: bool = False) -> Two:
    """A weight whose outliers one component makes, and a Gaussian one, in float64."""
    model = Two(nn.Linear(20, 24, bias), nn.Linear(24, 16, bias)).double()
    with torch.no_grad():
        model.first.weight.copy_(spiked(24, 20, [5.0, 1.0], noise=0.02))  # type: ignore[operator]
        model.second.weight.copy_(torch.randn(16, 24))  # type: ignore[operator]
    return model


def outlying_inputs(W: Tensor, tokens: int = 80) -> Tensor:
    """Inputs of which a few excite the first right singular vector."""
    X = torch.randn(tokens, W.shape[1], dtype=torch.float64)
    X[:4] += 8 * torch.linalg.svd(W.detach()).Vh[0]
    return X


# -- coupled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_coupled_weight_adds_the_gradient_of_the_papers_loss(power: float) -> None:
    model = spike_and_noise()
    first, second = model.first.weight, model.second.weight
    assert isinstance(first, nn.Parameter) and isinstance(second, nn.Parameter)
    X = outlying_inputs(first)
    assert direct_pcdr(first.detach(), X, 1)[0] >= 0.95
    assert direct_pcdr(second.detach(), model.first(X).detach(), 3).max() < 0.95
    optimizer = sgd(model, lr=0.0)
    settings: dict[str, Any] = {"strength": 0.01, "power": power}
    with removed(SelectiveSpectralDecay(model, optimizer, preset="paper", **settings)) as decay:
        model(X).square().mean().backward()
        assert first.grad is not None and second.grad is not None
        task = first.grad.clone(), second.grad.clone()
        optimizer.step()
        assert decay.selected == {"first.weight": 1}
    twin = first.detach().clone().requires_grad_()
    (0.01 / (power + 1) * torch.linalg.svdvals(twin)[:1].pow(power + 1).sum()).backward()
    assert twin.grad is not None
    torch.testing.assert_close(first.grad - task[0], twin.grad, rtol=1e-8, atol=1e-10)
    assert torch.equal(second.grad, task[1])


def data_metric_truth(W: Tensor, X: Tensor, threshold: float) -> tuple[Tensor, list[int]]:
    """Left singular vectors of W C^(1/2), and which of them make so large a share of the 16 largest outputs."""
    values, vectors = torch.linalg.eigh(X.mT @ X / len(X))
    U = torch.linalg.svd(W @ vectors @ values.clamp_min(0).sqrt().diag() @ vectors.mT, full_matrices=False).U
    Y = X @ W.mT
    outliers = Y.abs().flatten().topk(16).indices
    shares = [
        ((Y @ u)[:, None] * u * Y.sign()).flatten()[outliers].sum() / Y.abs().flatten()[outliers].sum() for u in U.mT
    ]
    return U, [r for r, share in enumerate(shares) if share >= threshold]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_coupled_data_adds_the_gradient_in_the_metric_of_the_inputs(power: float) -> None:
    W, X = spiked(6, 20, [5.0, 2.0], noise=0.3), torch.randn(80, 20, dtype=torch.float64)
    X[:4] += 8 * torch.linalg.svd(W).Vh[0]
    model = nn.Sequential(nn.Linear(20, 6, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(W)
    _, chosen = data_metric_truth(W, X, 0.3)
    assert chosen == [0]
    optimizer = sgd(model, lr=0.0)
    settings: dict[str, Any] = {"metric": "data", "mode": "coupled", "outlier_ratio": 0.0, "threshold": 0.3}
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.01, power=power, **settings)) as decay:
        still_step(model, optimizer, X)
        assert decay.selected == {"0.weight": 1}
    twin = W.clone().requires_grad_()
    values, vectors = torch.linalg.eigh(X.mT @ X / len(X))
    root = vectors @ values.sqrt().diag() @ vectors.mT
    (0.01 / (power + 1) * torch.linalg.svdvals(twin @ root)[0].pow(power + 1)).backward()
    assert twin.grad is not None
    torch.testing.assert_close(model[0].weight.grad, twin.grad, rtol=1e-4, atol=1e-5)


def test_coupled_norm_gains_feel_their_magnitude() -> None:
    model = Two(nn.LayerNorm(20), nn.Linear(20, 4))
    with torch.no_grad():
        model.first.weight[[2, 7]] = torch.tensor([-30.0, 40.0])  # type: ignore[index]
    optimizer = sgd(model, lr=0.0)
    settings: dict[str, Any] = {"metric": "weight", "mode": "coupled", "kinds": ["norm"], "outlier_ratio": 5.0}
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.01, power=2.0, **settings)) as decay:
        still_step(model, optimizer, torch.randn(50, 20))
        assert decay.selected == {"first.weight": 2}
    grad = model.first.weight.grad
    assert isinstance(grad, Tensor)
    expected = torch.zeros(20)
    expected[2], expected[7] = -0.01 * 900, 0.01 * 1600
    torch.testing.assert_close(grad, expected)


# -- decoupled ---------------------------------------------------------------------------------------------------------


def test_decoupled_weight_shrinks_the_selected_singular_values_by_the_closed_form() -> None:
    model = spike_and_noise()
    W = model.first.weight.detach().clone()  # type: ignore[union-attr, operator]
    X = outlying_inputs(W)
    X[4:8] += 40 * torch.linalg.svd(W).Vh[1]
    ratios = direct_pcdr(W, X, 2)
    assert ratios[0] < 0.9 < ratios[1]
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    settings: dict[str, Any] = {"metric": "weight", "mode": "decoupled", "power": 2.0, "outlier_ratio": 0.0}
    before = weights(model)
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.2, threshold=0.9, **settings)) as decay:
        still_step(model, optimizer, X)
        scheduler.step()
        assert decay.selected["first.weight"] == 2
    U, S, Vh = torch.linalg.svd(W)
    expected = S.clone()
    expected[:2] = S[:2] / (1 + 0.2 * 0.5 * S[:2])
    core = U.mT @ model.first.weight.detach() @ Vh.mT  # type: ignore[operator]
    torch.testing.assert_close(core[:20], expected.diag(), rtol=0, atol=1e-10)
    assert core[20:].abs().max() < 1e-10
    if "second.weight" not in decay.selected:
        assert torch.equal(model.second.weight, before["second.weight"])  # type: ignore[arg-type]


def test_decoupled_data_takes_the_direction_out_of_weight_and_bias() -> None:
    model = Two(nn.Linear(20, 6), nn.Identity()).double()
    W, X = spiked(6, 20, [5.0, 2.0], noise=0.3), torch.randn(80, 20, dtype=torch.float64)
    X[:4] += 8 * torch.linalg.svd(W).Vh[0]
    bias = 0.1 * torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.copy_(W)  # type: ignore[operator]
        model.first.bias.copy_(bias)  # type: ignore[operator]
    U, chosen = data_metric_truth(W, X, 0.3)
    assert chosen == [0]
    optimizer = sgd(model)
    settings: dict[str, Any] = {"metric": "data", "mode": "decoupled", "outlier_ratio": 0.0, "threshold": 0.3}
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.3, power=2.0, **settings)):
        still_step(model, optimizer, X)
    sigma = (X @ W.mT @ U[:, 0]).square().mean().sqrt()
    rho = 1 - 1 / (1 + 0.3 * sigma)
    project = torch.eye(6, dtype=torch.float64) - rho * torch.outer(U[:, 0], U[:, 0])
    torch.testing.assert_close(model.first.weight.detach(), project @ W, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    torch.testing.assert_close(model.first.bias.detach(), project @ bias, rtol=1e-4, atol=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("metric", ["weight", "data"])
@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_patch_and_word_embeddings_are_conditioned(metric: Any, mode: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.words = nn.Conv2d(3, 24, 4, stride=4), nn.Embedding(30, 24)

        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            return self.patches(image).flatten(2).mT.mean(1) + self.words(ids).mean(1)

    model = Both()
    with torch.no_grad():
        model.patches.weight.copy_(spiked(24, 48, [6.0], noise=0.02).view_as(model.patches.weight))
        model.words.weight.copy_(0.1 * torch.randn(30, 24))
        model.words.weight[3, 5] = 20
    v = torch.linalg.svd(model.patches.weight.detach().flatten(1)).Vh[0].view(3, 4, 4)
    image = torch.randn(2, 3, 16, 16)
    image[0, :, :4, :4] += 10 * v
    ids = torch.randint(30, (2, 12))
    ids[0, 0] = 3
    optimizer = sgd(model, lr=0.01)
    settings: dict[str, Any] = {"metric": metric, "mode": mode, "kinds": ("conv", "embedding"), "outlier_ratio": 0.0}
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.1, power=2.0, max_rank=1, **settings)) as decay:
        before = torch.linalg.svdvals(model.patches.weight.flatten(1))[0], model.words.weight[3, 5].item()
        for _ in range(3):
            still_step(model, optimizer, image, ids)
        assert set(decay.selected) == {"patches.weight", "words.weight"}
    assert torch.linalg.svdvals(model.patches.weight.flatten(1))[0] < before[0] - 0.005
    assert model.words.weight[3, 5].item() < before[1] - 0.005


# -- site --------------------------------------------------------------------------------------------------------------

KEPT = math.exp(-0.05)


def calm(fused: bool = False) -> Encoder:
    """Outputs of GELU are skewed by nature; pushed into its linear part, none of the sites has an outlier."""
    model = Encoder(fused=fused)
    with torch.no_grad():
        for i in range(2):
            model.get_submodule(f"blocks.{i}.mlp.fc1").bias += 2  # type: ignore[operator]
    return model


def plant_norm(model: Encoder) -> None:
    model.blocks[1].norm2.weight[5] *= 20  # type: ignore[union-attr, index, operator]


def plant_fc1(model: Encoder) -> None:
    model.blocks[0].mlp.fc1.weight[7] *= 40  # type: ignore[union-attr, index, operator]
    model.blocks[0].mlp.fc1.bias[7] = 6.0  # type: ignore[union-attr, index, operator]


def plant_v(model: Encoder) -> None:
    model.blocks[0].attn.v.weight[9] *= 60  # type: ignore[union-attr, index, operator]
    model.blocks[0].attn.v.bias[9] = 6.0  # type: ignore[union-attr, index, operator]


def plant_q(model: Encoder) -> None:
    model.blocks[0].attn.q.weight[9] *= 25  # type: ignore[union-attr, index, operator]
    model.blocks[0].attn.q.bias[9] = 6.0  # type: ignore[union-attr, index, operator]


PLANTED: dict[str, tuple[Callable[[Encoder], None], str, int, str]] = {
    "norm gain": (plant_norm, "blocks.1.norm2", 5, "blocks.1.mlp.fc1"),
    "fc1 row": (plant_fc1, "blocks.0.mlp.fc1", 7, "blocks.0.mlp.fc2"),
    "v row": (plant_v, "blocks.0.attn.v", 9, "blocks.0.attn.proj"),
}


@pytest.mark.parametrize(("plant", "writer", "row", "reader"), PLANTED.values(), ids=PLANTED.keys())
def test_the_writer_of_an_outlier_channel_decays_until_its_site_is_healthy(
    plant: Callable[[Encoder], None], writer: str, row: int, reader: str
) -> None:
    def build() -> Encoder:
        model = calm()
        with torch.no_grad():
            plant(model)
        return model

    model, limit = fresh(build), 5.2
    optimizer = sgd(model)
    ratios: list[float] = []

    def measure(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return  # the trace, which runs hooks once more
        ratios.append((args[0].abs().max() / args[0].square().mean().sqrt()).item())

    handle = model.get_submodule(reader).register_forward_pre_hook(measure)
    ids, start = tokens(3, batch=8, length=16), weights(model)
    settings: dict[str, Any] = {"metric": "site", "mode": "decoupled", "power": 1.0, "outlier_ratio": limit}
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.05, refresh_every=1, **settings)) as decay:
        steps = 0
        while True:
            still_step(model, optimizer, ids)
            if f"{writer}.weight" not in decay.selected:
                break
            steps += 1
            assert decay.selected == {f"{writer}.weight": 1}
            assert ratios[-1] > limit * (RELEASE_CHANNEL if steps > 1 else 1)
            now = weights(model)
            for part in ("weight", "bias"):
                old, new = start[f"{writer}.{part}"], now[f"{writer}.{part}"]
                torch.testing.assert_close(new[row], old[row] * KEPT**steps, rtol=1e-5, atol=0)
                rest = [r for r in range(len(old)) if r != row]
                assert torch.equal(new[rest], old[rest])
            others = {name for name in start if name not in (f"{writer}.weight", f"{writer}.bias")}
            assert equal({name: start[name] for name in others}, {name: now[name] for name in others})
            assert steps < 200
        assert steps > 5
        assert ratios[-1] <= limit * RELEASE_CHANNEL
        quiet = weights(model)
        still_step(model, optimizer, ids)
        assert equal(weights(model), quiet)
        seen = [r["outlier_ratio"] for r in decay.history if r["weight"] == f"{writer}.weight"]
        assert seen == pytest.approx(ratios, rel=1e-4)
    handle.remove()


def test_the_operands_of_attention_are_sites_too() -> None:
    model = fresh(calm)
    with torch.no_grad():
        plant_q(model)  # type: ignore[arg-type]
    optimizer = sgd(model)
    settings: dict[str, Any] = {"metric": "site", "mode": "decoupled", "outlier_ratio": 5.2, "refresh_every": 1}
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.05, **settings)) as decay:
        still_step(model, optimizer, tokens(3, batch=8, length=16))
        assert decay.selected == {"blocks.0.attn.q.weight": 1}


def test_the_v_rows_of_a_fused_weight_decay_alone() -> None:
    model = fresh(lambda: calm(fused=True))
    qkv = model.get_submodule("blocks.0.attn.qkv")
    assert isinstance(qkv, nn.Linear)
    with torch.no_grad():
        qkv.weight[64 + 9] *= 60
        qkv.bias[64 + 9] = 6.0
    optimizer, start = sgd(model), weights(model)
    settings: dict[str, Any] = {"metric": "site", "mode": "decoupled", "power": 1.0, "outlier_ratio": 5.2}
    with removed(SelectiveSpectralDecay(model, optimizer, strength=0.05, **settings)) as decay:
        still_step(model, optimizer, tokens(3, batch=8, length=16))
        assert decay.selected == {"blocks.0.attn.qkv.weight[64:96]": 1}
    for name, old in start.items():
        expected = old.clone()
        if name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"):
            expected[64 + 9] *= KEPT
            torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-6, atol=0)
            expected[64 + 9] = model.state_dict()[name][64 + 9]
        assert torch.equal(model.state_dict()[name], expected), name


# -- leaves no trace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_without_strength_training_is_bit_identical(way: dict[str, Any]) -> None:
    plain, watched = (fresh(lambda: Encoder(dropout=0.1)) for _ in range(2))
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 6)
    optimizer = torch.optim.AdamW(watched.parameters(), lr=1e-2)
    with removed(
        SelectiveSpectralDecay(watched, optimizer, strength=0.0, refresh_every=2, threshold=0.05, **way)
    ) as decay:
        train(watched, optimizer, 6)
        assert decay.selected and decay.step_count == 6
    assert equal(weights(plain), weights(watched))


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_the_model_keeps_its_keys_and_removal_leaves_nothing(way: dict[str, Any]) -> None:
    model = fresh(Encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    keys, before = list(model.state_dict()), hooks_of(model, optimizer)
    decay = SelectiveSpectralDecay(model, optimizer, refresh_every=2, threshold=0.05, strength=0.05, **way)
    for step in range(5):
        armed = step % 2 == 0
        assert (hooks_of(model, optimizer) > before + 2) is armed  # forward hooks on refresh steps only
        train(model, optimizer, 1, first=step)
        assert list(model.state_dict()) == keys
    train(model, optimizer, 1, first=5)
    decay.remove()
    assert hooks_of(model, optimizer) == before
    kept, count = weights(model), decay.step_count
    still_step(model, sgd(model), tokens(0))
    assert equal(weights(model), kept) and decay.step_count == count
    decay.remove()


def test_the_history_tells_what_was_seen() -> None:
    model = spike_and_noise()
    X = outlying_inputs(model.first.weight)  # type: ignore[arg-type]
    optimizer = sgd(model)
    with removed(SelectiveSpectralDecay(model, optimizer, preset="paper", refresh_every=2)) as decay:
        for _ in range(3):
            still_step(model, optimizer, X)
    assert [(r["step"], r["weight"]) for r in decay.history] == [
        (step, name) for step in (0, 2) for name in ("first.weight", "second.weight")
    ]
    record = decay.history[0]
    assert record["selected"] == 1 and decay.history[1]["selected"] == 0
    W = spiked(24, 20, [5.0, 1.0], noise=0.02)
    assert record["sigma"] == pytest.approx(torch.linalg.svdvals(W)[:3].tolist())
    assert record["pcdr"] == pytest.approx(direct_pcdr(W, X, 3).tolist(), rel=1e-4)
    Y = X @ W.mT
    assert record["outlier_max"] == pytest.approx(Y.abs().max().item(), rel=1e-4)
    assert record["outlier_ratio"] == pytest.approx((Y.abs().max() / Y.square().mean().sqrt()).item(), rel=1e-4)
