"""Each rival does what its paper says: closed forms and small cases, in double precision where it matters."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.blocks import WIDTH, Encoder, Two, X, deciding, fresh, normed, sgd, spiked, still_step, tokens, weights
from torch import Tensor, nn

from s2d.baselines import create
from s2d.baselines.activations import Activations
from s2d.baselines.clipping import clipped
from s2d.baselines.colinearity import decay_pair, pairs_of
from s2d.baselines.kurtosis import kurtosis
from s2d.baselines.nuclear import thresholded
from s2d.baselines.random_directions import RandomDirections, shrink_channels, shrink_span
from s2d.baselines.tweo import tail
from s2d.decay.settings import DecaySettings
from s2d.targets.weights import find_targets


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_l2_shrinks_every_singular_value_by_the_schedule() -> None:
    model = Two(nn.LayerNorm(6), nn.Linear(6, 5))
    optimizer = sgd(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    before = weights(model)
    create("l2", model, optimizer, strength=0.1)
    for _ in range(3):
        still_step(model, optimizer, torch.ones(2, 6))
    after = weights(model)
    expected = torch.linalg.svdvals(before["second.weight"]) * math.exp(-3 * 0.1 * 0.5)
    torch.testing.assert_close(torch.linalg.svdvals(after["second.weight"]), expected)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "second.weight")


def test_l2_of_norms_is_that_of_diag_gamma() -> None:
    model = normed({3: 5.0})
    optimizer = sgd(model)
    create("l2", model, optimizer, strength=0.2, kinds=["norm"])
    still_step(model, optimizer, X)
    expected = torch.ones(WIDTH).index_fill(0, torch.tensor([3]), 5.0) * math.exp(-0.2)
    torch.testing.assert_close(model.first.weight.detach(), expected)


def test_the_spectral_norm_penalty_is_yoshidas() -> None:
    W = spiked(8, 6, [5.0, 2.0]).float()
    model = nn.ModuleDict({"only": nn.Linear(6, 8, bias=False)})
    with torch.no_grad():
        model["only"].weight.copy_(W)
    rival = create("spectral-norm", model, sgd(model), weight=0.3)
    for _ in range(30):  # (2 / 5)^(2 * 30) is below single precision
        loss = rival.loss()
    assert loss is not None
    loss.backward()
    U, S, Vh = torch.linalg.svd(W)
    assert loss.item() == pytest.approx(0.15 * S[0].item() ** 2, rel=1e-5)
    torch.testing.assert_close(model["only"].weight.grad, 0.3 * S[0] * torch.outer(U[:, 0], Vh[0]))


def test_clipping_caps_singular_values_and_keeps_their_vectors() -> None:
    W = draw(9, 6)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    limit = 1.2 * S.median()
    torch.testing.assert_close(clipped(W, 1.2), (U * S.clamp(max=limit)) @ Vh)
    assert S[0] > limit, "nothing would be clipped"
    torch.testing.assert_close(clipped(W, 1e3), W)


def test_clipping_happens_once_and_caps_gains_too() -> None:
    model = normed({5: -40.0, 6: 2.0})
    optimizer = sgd(model)
    create("clip", model, optimizer, limit=3.0)
    gains = model.first.weight.detach().clone()
    assert gains[5] == -3.0 and gains[6] == 2.0 and gains[0] == 1.0
    with torch.no_grad():
        model.first.weight[5] = 40.0
    still_step(model, optimizer, X)
    assert model.first.weight[5].item() == 40.0


def test_thresholding_is_the_proximal_operator_of_the_nuclear_norm() -> None:
    W, amount = draw(5, 4), 0.4

    def objective(A: Tensor) -> float:
        return float((A - W).square().sum() / 2 + amount * torch.linalg.svdvals(A).sum())

    found = thresholded(W, amount)
    best = objective(found)
    for seed in range(50):
        for size in (1e-3, 1e-1):
            assert objective(found + size * draw(5, 4, seed=seed + 1)) > best
    torch.testing.assert_close(torch.linalg.svdvals(found), (torch.linalg.svdvals(W) - amount).clamp_min(0))


def test_nuclear_waits_and_then_takes_what_has_gathered() -> None:
    model = nn.ModuleDict({"only": nn.Linear(6, 8, bias=False)})
    optimizer = sgd(model)
    rival = create("nuclear", model, optimizer, strength=0.01, every=3)
    before = torch.linalg.svdvals(model["only"].weight.detach())

    def step() -> Tensor:
        model["only"].weight.grad = torch.zeros(8, 6)
        optimizer.step()
        return torch.linalg.svdvals(model["only"].weight.detach())

    torch.testing.assert_close(step(), before, rtol=0, atol=0)
    torch.testing.assert_close(step(), before, rtol=0, atol=0)
    torch.testing.assert_close(step(), (before - 0.03).clamp_min(0))
    rival.remove()


def test_a_step_of_colinearity_goes_down_its_gradient() -> None:
    A, B = draw(7, 4, seed=1).requires_grad_(), draw(5, 7, seed=2).requires_grad_()
    energy = (B @ A).square().sum() / 2
    energy.backward()
    a, b = A.detach().clone(), B.detach().clone()
    decay_pair(a, b, 0.01)
    assert A.grad is not None and B.grad is not None
    step_a, step_b = 0.01 * A.grad / B.square().sum(), 0.01 * B.grad / A.square().sum()
    # The step is computed in single precision.
    torch.testing.assert_close(a, (A - step_a).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, (B - step_b).detach(), rtol=1e-5, atol=1e-6)
    decay_pair(a, b, 1.0)
    assert (b @ a).square().sum() / 2 < energy


@pytest.mark.parametrize("fused", [False, True])
def test_pairs_are_those_of_a_block(fused: bool) -> None:
    model = fresh(lambda: Encoder(fused=fused))
    names = [(a.name, b.name) for a, b in pairs_of(model, find_targets(model, kinds=("linear",)))]
    v = f"qkv.weight[{2 * WIDTH}:{3 * WIDTH}]" if fused else "v.weight"
    assert names[:2] == [
        ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"),
        (f"blocks.0.attn.{v}", "blocks.0.attn.proj.weight"),
    ]
    assert len(names) == 4


# -- kurtosis and activations ------------------------------------------------------------------------------------------


def test_kurtosis_of_known_distributions() -> None:
    grid = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    assert kurtosis(grid).item() == pytest.approx(1.8, abs=1e-3)
    assert kurtosis(3 * grid + 7).item() == pytest.approx(1.8, abs=1e-3), "neither place nor scale matters"
    assert kurtosis(torch.erfinv(0.99999 * grid)).item() == pytest.approx(3.0, abs=0.02)


def test_kure_is_the_mean_square_over_weights() -> None:
    model = Two(nn.Linear(6, 6), nn.Linear(6, 4))
    loss = create("kure", model, sgd(model), weight=2.0).loss()
    assert loss is not None
    each = [(kurtosis(layer.weight) - 1.8) ** 2 for layer in (model.first, model.second)]
    assert loss.item() == pytest.approx(2.0 * sum(float(e.detach()) for e in each) / 2, rel=1e-6)


def test_tweo_by_hand() -> None:
    x = torch.tensor([[3.0, -6.0], [0.0, 1.5]])
    assert tail(x, 3.0, 4.0).item() == pytest.approx((1 + 16 + 0 + 1 / 16) / 4, rel=1e-4)


def test_tweo_sees_what_the_blocks_put_out() -> None:
    model = fresh(Encoder)
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, a, y: seen.append(y.detach())) for block in model.blocks]  # type: ignore[union-attr]
    rival = create("tweo", model, sgd(model), weight=0.5, tau=1.0, power=2.0)
    model(tokens(0))
    loss = rival.loss()
    for handle in handles:
        handle.remove()
    del seen[:-2]  # of the forward that was traced first
    assert loss is not None and len(seen) == 2
    expected = 0.5 * sum(float(y.square().mean()) for y in seen) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    again = rival.loss()
    assert again is not None and again.item() == 0.0, "a pass counts once"


def test_padding_is_left_out() -> None:
    model = fresh(Encoder)
    ids, mask = tokens(1), torch.ones(4, 12, dtype=torch.long)
    mask[:, 8:] = 0
    losses = []
    for last in (0, 5):  # what stands in the padding must make no difference
        watched = Activations(model, "inputs")
        model(torch.cat([ids[:, :8], torch.full((4, 4), last)], 1), attention_mask=mask)
        losses.append(watched.mean(lambda x: x.abs().mean()).item())
        watched.remove()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_queries_keys_and_values_read_one_place() -> None:
    model = fresh(Encoder)
    watched = Activations(model, "inputs")
    model(tokens(0))
    places: list[Tensor] = []
    watched.mean(lambda x: places.append(x) or x.mean())  # type: ignore[func-returns-value]
    assert len(places) == 2 * 4, "norm1, proj, fc1 and fc2 of two blocks"
    watched.remove()


# -- the control -------------------------------------------------------------------------------------------------------


def test_the_control_shrinks_as_many_other_channels_by_as_much() -> None:
    one, other = normed({5: 40.0, 9: 30.0}), normed({5: 40.0, 9: 30.0})
    before = one.first.weight.detach().clone()
    first, second = sgd(one), sgd(other)
    with deciding(one, first):
        still_step(one, first, X)
    rival = create("random-directions", other, second, outlier_ratio=5.0, refresh_every=1, strength=0.05)
    still_step(other, second, X)
    decayed, controlled = (before - model.first.weight.detach() for model in (one, other))
    assert set(decayed.nonzero().flatten().tolist()) == {5, 9}
    touched = set(controlled.nonzero().flatten().tolist())
    assert len(touched) == 2 and not touched & {5, 9}
    # Two gains of 1 cannot give what 5 % of 40 and 30 are: both end at zero, and the sums say so.
    assert torch.linalg.vector_norm(controlled).item() == pytest.approx(math.sqrt(2), rel=1e-5)
    rival.remove()
    sums = rival.history[-1]
    assert sums["asked"] == pytest.approx(torch.linalg.vector_norm(decayed).item(), rel=1e-5)
    assert sums["done"] == pytest.approx(math.sqrt(2), rel=1e-5)


def test_the_controls_defaults_are_the_decays() -> None:
    for field in dataclasses.fields(RandomDirections.Settings):
        assert field.default == getattr(DecaySettings(), field.name), field.name


def test_the_control_of_a_weights_components_changes_as_much() -> None:
    def build() -> Two:
        model = Two(nn.Linear(8, 8), nn.Linear(8, 6))
        with torch.no_grad():
            model.first.weight.copy_(spiked(8, 8, [5.0], seed=1).float())
        return model

    settings = {"metric": "weight", "outlier_ratio": 0.0, "refresh_every": 1, "strength": 0.01}
    one, other = fresh(build), fresh(build)
    before = weights(one)
    first, second = sgd(one), sgd(other)
    with deciding(one, first, **settings):
        still_step(one, first, X[:, :8])
    create("random-directions", other, second, **settings)
    still_step(other, second, X[:, :8])
    changed = [weights(model)["first.weight"] - before["first.weight"] for model in (one, other)]
    sizes = [torch.linalg.vector_norm(each).item() for each in changed]
    assert sizes[0] > 0 and sizes[1] == pytest.approx(sizes[0], rel=1e-3)
    assert [int(torch.linalg.matrix_rank(each, rtol=1e-3)) for each in changed] == [1, 1]
    assert not torch.allclose(changed[0], changed[1], atol=1e-4)


def test_shares_give_exactly_what_is_wanted() -> None:
    W, bias = draw(6, 4), draw(6, seed=1)
    rows, U = torch.tensor([1, 4]), torch.linalg.qr(draw(6, 2, seed=2)).Q
    for shrink, what in ((shrink_channels, rows), (shrink_span, U)):
        changed, moved = W.clone(), bias.clone()
        assert shrink(changed, what, 0.3, moved) == pytest.approx(0.3)
        assert torch.linalg.vector_norm(changed - W).item() == pytest.approx(0.3)
        assert not torch.equal(moved, bias)
        gone = shrink(changed, what, 1e6, None)
        assert gone < 1e6 and torch.linalg.vector_norm(changed).item() < torch.linalg.vector_norm(W).item()
