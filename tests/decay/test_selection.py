"""Which components are selected, followed and released, in each metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.blocks import WIDTH, Encoder, fresh, removed, spiked, still_step, tokens
from tests.spectral.test_pcdr import direct_pcdr
from torch import Tensor, nn

from s2d.decay.selection import METRICS, Components, DataMetric, Metric, SiteMetric, WeightMetric
from s2d.decay.selection.base import MOST_CHANNELS, RELEASE, RELEASE_CHANNEL, SPARE
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.targets.calls import bias_of, call_views
from s2d.targets.weights import Target, find_targets

ALL_KINDS = ("linear", "conv", "embedding", "norm")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def metric_of(name: str, targets: list[Target], **settings: Any) -> Metric:
    chosen = {"threshold": 0.5, "max_rank": 3, "outlier_ratio": 0.0, "track": True, "seed": 0, **settings}
    return METRICS[name](targets, **chosen)


def refresh(metric: Metric, *passes: Tensor, mask: Tensor | None = None) -> Components | None:
    """Look at a single target through passes of its module; what is selected in it afterwards."""
    target = metric.targets[0]
    metric.begin()
    with torch.no_grad():
        for x in passes:
            metric.observe(target, *call_views(target, target.module, x, target.module(x)), mask)
        metric.finish()
    return metric.selected.get(target.name)


def linear(W: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None, dtype=W.dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def target_of(module: nn.Module) -> list[Target]:
    return find_targets(module, kinds=ALL_KINDS)


# -- weight metric -----------------------------------------------------------------------------------------------------


def test_the_fewest_leading_components_that_reach_the_threshold_are_selected() -> None:
    W = spiked(40, 30, [9.0, 8.0, 1.0])
    Vh = torch.linalg.svd(W).Vh
    X = torch.randn(60, 30, dtype=torch.float64)
    X[:8] += 9 * Vh[0] + 8 * Vh[1]
    truth = direct_pcdr(W, X, 3)
    assert truth[0] < 0.9 < truth[1]
    metric = metric_of("weight", target_of(linear(W)), threshold=0.9)
    found = refresh(metric, X)
    assert found is not None and found.U is not None and found.V is not None
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(found.S, S[:2])
    torch.testing.assert_close(found.U @ torch.diag(found.S) @ found.V.mT, (U[:, :2] * S[:2]) @ Vh[:2])


def test_the_bias_is_no_part_of_dominance() -> None:
    W, X = spiked(40, 30, [9.0]), torch.randn(60, 30, dtype=torch.float64)
    targets = target_of(linear(W, bias=torch.full((40,), 0.5, dtype=torch.float64)))
    metric = metric_of("weight", targets)
    metric.begin()
    metric.observe(targets[0], X, X @ W.mT + 0.5, None)
    Y = X @ W.mT
    outliers = (Y + 0.5).abs().flatten().topk(16).indices
    U, S, Vh = torch.linalg.svd(W)
    first = (S[0] * (X @ Vh[0])[:, None] * U[:, 0]).flatten()[outliers].abs().sum() / Y.flatten()[outliers].abs().sum()
    assert metric.finish()["weight"].pcdr[0] == pytest.approx(first.item(), rel=1e-4)


def test_a_weight_of_low_rank_does_not_narrow_the_others() -> None:
    """A head with two classes has two components; the other weights keep theirs."""
    encoder, head = linear(spiked(40, 30, [5.0, 4.0, 3.0])), linear(spiked(2, 40, [1.0]))
    model = nn.Sequential(encoder, head)
    metric = metric_of("weight", target_of(model))
    metric.begin()
    X = torch.randn(50, 30, dtype=torch.float64)
    for target, x in zip(metric.targets, (X, encoder(X).detach()), strict=True):
        metric.observe(target, x, target.module(x).detach(), None)
    findings = metric.finish()
    assert len(findings["0.weight"].sigma) == 3 and len(findings["1.weight"].sigma) == 2
    torch.testing.assert_close(
        torch.tensor(findings["0.weight"].sigma), torch.linalg.svdvals(encoder.weight)[:3].float(), rtol=1e-4, atol=0
    )


def _axis_weight(sigma_0: float, others: list[float]) -> Tensor:
    """Component r writes output r alone, so that a batch can be made to put any share of outliers on it."""
    sigmas = [sigma_0, *others]
    basis = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    W = torch.zeros(24, 24, dtype=torch.float64)
    for r, sigma in enumerate(sigmas):
        W[r] = sigma * basis[r]
    return W


def _batch(W: Tensor, on_0: int, on_1: int, size: float = 60.0) -> Tensor:
    """Sixteen outlier entries, so many on output 0 and output 1, above small noise."""
    X = 0.01 * torch.randn(64, 24, dtype=torch.float64)
    for n in range(on_0 + on_1):
        row = W[0] if n < on_0 else W[1]
        X[n] += size * row / row.square().sum()
    return X


SINKING = {"within reach": [5.0, 6.0], "out of reach": [4.0 + 0.1 * r for r in range(10)]}


@pytest.mark.parametrize("others", SINKING.values(), ids=SINKING.keys())
def test_a_component_that_lost_its_rank_is_followed_until_its_outlier_is_gone(others: list[float]) -> None:
    torch.manual_seed(3)
    before = _axis_weight(10.0, others)
    layer = linear(before)
    metric = metric_of("weight", target_of(layer), max_rank=1)
    found = refresh(metric, _batch(before, 16, 0))
    assert found is not None and found.U is not None and len(found) == 1 and found.U[0].abs() > 0.99

    after = before.clone()
    after[0] *= 0.3  # sigma 3, below all others
    with torch.no_grad():
        layer.weight.copy_(after)
    for on_0, held in ((16, True), (6, True), (5, False), (6, False)):
        share = on_0 / 16
        assert (share >= RELEASE * 0.5) is (on_0 >= 6)
        found = refresh(metric, _batch(after, on_0, 16 - on_0))
        if not held:
            assert found is None  # and once released, the share that held it does not select it again
            continue
        assert found is not None and found.U is not None and found.V is not None and len(found) == 1
        assert found.U[0].abs() > 0.99
        assert (found.U[:, 0] @ after @ found.V[:, 0]).item() == pytest.approx(3, rel=1e-3)

    unfollowed = metric_of("weight", target_of(linear(before)), max_rank=1, track=False)
    assert refresh(unfollowed, _batch(before, 16, 0)) is not None
    with torch.no_grad():
        unfollowed.targets[0].matrix().copy_(after)
    assert refresh(unfollowed, _batch(after, 16, 0)) is None


def test_a_followed_component_takes_over_the_refreshed_vectors() -> None:
    before = _axis_weight(10.0, [5.0, 6.0])
    layer = linear(before)
    metric = metric_of("weight", target_of(layer), max_rank=1)
    refresh(metric, _batch(before, 16, 0))
    after = before.clone()
    after[0] = 0.3 * after[0] + 0.4 * after[5 % 3]
    with torch.no_grad():
        layer.weight.copy_(after)
    found = refresh(metric, _batch(after, 16, 0))
    assert found is not None and found.U is not None and len(found) >= 1
    U = torch.linalg.svd(after).U[:, : 1 + SPARE]
    assert (U.mT @ found.U).abs().amax(0).min() > 0.9999


# -- data metric -------------------------------------------------------------------------------------------------------


def _outputs(on_0: int, on_others: int, size: float, background: float) -> Tensor:
    """400 outputs: a loud background on outputs 1 to 8, outlier entries on output 0 and on others of their own."""
    Y = torch.zeros(400, 30, dtype=torch.float64)
    Y[:, 1:9] = background * torch.randn(400, 8, dtype=torch.float64).sign()
    for n in range(on_0 + on_others):
        Y[n] = 0
        Y[n, 0 if n < on_0 else 10 + n] = size
    return Y


def test_a_direction_of_the_data_is_followed_until_its_outlier_is_gone() -> None:
    metric = metric_of("data", target_of(linear(torch.eye(30, dtype=torch.float64))))
    found = refresh(metric, _outputs(16, 0, size=100, background=8))
    assert found is not None and found.U is not None and len(found) == 1
    assert found.U[0].abs() > 0.999
    assert found.S.item() == pytest.approx(100 * (16 / 400) ** 0.5, rel=1e-3)
    for on_0, held in ((16, True), (6, True), (5, False), (6, False)):
        Y = _outputs(on_0, 16 - on_0, size=10, background=8)  # far below the background in energy now
        found = refresh(metric, Y)
        assert (found is not None) is held
        if found is not None:
            assert found.U is not None and len(found) == 1 and found.U[0].abs() > 0.999
            assert found.S.item() == pytest.approx(10 * (on_0 / 400) ** 0.5, rel=0.01)
    unfollowed = metric_of("data", target_of(linear(torch.eye(30, dtype=torch.float64))), track=False)
    refresh(unfollowed, _outputs(16, 0, size=100, background=8))
    for _ in range(20):  # the warm start forgets a direction step by step
        found = refresh(unfollowed, _outputs(16, 0, size=10, background=8))
    assert found is None


@pytest.mark.parametrize("lost", [False, True])
def test_followed_directions_point_where_their_gradient_does(lost: bool) -> None:
    """V = C W^T U, signs included: the coupled form would otherwise grow what it is to shrink."""
    layer = linear(torch.eye(30, dtype=torch.float64))
    metric = metric_of("data", target_of(layer))
    refresh(metric, _outputs(16, 0, size=100, background=8))
    X = _outputs(16, 0, size=10 if lost else 90, background=8)
    found = refresh(metric, X)
    assert found is not None and found.U is not None and found.V is not None
    C = (X.mT @ X / len(X)).float()
    torch.testing.assert_close(found.V, C @ found.U, rtol=1e-4, atol=1e-4)


def test_the_pass_with_the_largest_outlier_is_judged() -> None:
    quiet, loud = torch.randn(50, 30), torch.randn(50, 30)
    loud[3, 7] = 80
    for passes in ((quiet, loud), (loud, quiet)):
        metric = metric_of("data", target_of(linear(torch.eye(30))), outlier_ratio=10.0)
        found = refresh(metric, *passes)
        assert found is not None and found.U is not None
        assert found.U[7].abs() > 0.99
    assert refresh(metric_of("data", target_of(linear(torch.eye(30))), outlier_ratio=10.0), quiet) is None


# -- site metric, norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "data"])
def test_gains_are_selected_by_channel(name: str) -> None:
    norm = nn.LayerNorm(20)
    with torch.no_grad():
        norm.weight[[3, 11]] = torch.tensor([30.0, -40.0])
    found = refresh(metric_of(name, target_of(norm), outlier_ratio=5.0), torch.randn(6, 50, 20))
    assert found is not None and found.channels is not None
    assert found.channels.tolist() == [3, 11] and found.S.tolist() == [30, 40]


def test_a_selected_channel_is_held_a_little_below_its_limit() -> None:
    norm = nn.LayerNorm(400, elementwise_affine=True)
    x = torch.randn(64, 400).clamp(-2, 2)

    def found_at(ratio: float, metric: Metric) -> bool:
        """Set gain 5 so that its channel reaches a ratio; the RMS hardly depends on one channel of 400."""
        y = nn.functional.layer_norm(x, (400,))
        with torch.no_grad():
            norm.weight[5] = ratio / y[:, 5].abs().max()
            for _ in range(5):  # the RMS moves a little with the gain
                norm.weight[5] = ratio * (y * norm.weight).square().mean().sqrt() / y[:, 5].abs().max()
        return refresh(metric, x) is not None

    metric = metric_of("data", target_of(norm), outlier_ratio=6.0)
    held = 6.0 * RELEASE_CHANNEL
    expected = ((6.1, True), (5.9, True), (held + 0.05, True), (held - 0.05, False), (5.9, False))
    for ratio, selected in expected:
        assert found_at(ratio, metric) is selected, ratio


def test_only_the_largest_channels_are_shrunk_at_a_time() -> None:
    norm = nn.LayerNorm(20)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(1, 2, 20))
    found = refresh(metric_of("data", target_of(norm), outlier_ratio=0.0), torch.randn(500, 20))
    assert found is not None and found.channels is not None
    assert len(found) == int(MOST_CHANNELS * 20)
    assert set(found.channels.tolist()) <= set(range(5, 20))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(7), (4, 7, 5, 5)),
        (nn.BatchNorm2d(5), (4, 5, 5, 5)),
        (nn.BatchNorm1d(7), (9, 7)),
        (nn.GroupNorm(2, 8), (4, 8, 3, 3)),
        (nn.LayerNorm(7), (4, 5, 7)),
    ],
    ids=str,
)
def test_the_channels_of_a_norm_are_those_of_its_gain(norm: nn.Module, shape: tuple[int, ...]) -> None:
    (target,) = target_of(norm)
    with torch.no_grad():
        target.parameter[2] = 100
    found = refresh(metric_of("weight", [target], outlier_ratio=3.0), torch.randn(shape))
    assert found is not None and found.channels is not None and found.channels.tolist() == [2]


# -- what a module's call means ----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "patch embedding": (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 16, 16)),
    "padded": (nn.Conv2d(3, 8, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 3, 9, 8)),
    "same": (nn.Conv2d(3, 8, 3, padding="same"), (2, 3, 9, 8)),
    "valid": (nn.Conv2d(3, 8, 3, padding="valid"), (2, 3, 9, 8)),
    "dilated": (nn.Conv2d(3, 8, 3, dilation=2, padding=1), (2, 3, 9, 8)),
    "circular": (nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), (2, 3, 9, 8)),
    "one image": (nn.Conv2d(3, 8, 3), (3, 9, 8)),
    "1-D": (nn.Conv1d(3, 8, 5, stride=2, padding=2), (2, 3, 20)),
    "3-D": (nn.Conv3d(3, 8, (2, 3, 3), stride=(2, 3, 3)), (2, 3, 4, 9, 9)),
}


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_is_its_matrix_on_patches(conv: nn.Module, shape: tuple[int, ...]) -> None:
    (target,) = target_of(conv)
    x = torch.randn(shape)
    with torch.no_grad():
        patches, y = call_views(target, conv, x, conv(x))
        torch.testing.assert_close(patches @ target.matrix().mT + bias_of(target), y, rtol=1e-4, atol=1e-5)


def test_pcdr_of_a_patch_embedding() -> None:
    conv = nn.Conv2d(3, 24, 4, stride=4, bias=False)
    with torch.no_grad():
        conv.weight.copy_(spiked(24, 48, [6.0], noise=0.05).view_as(conv.weight))
    x = torch.randn(3, 3, 16, 16)
    metric = metric_of("weight", target_of(conv))
    found = refresh(metric, x)
    patches = nn.functional.unfold(x, 4, stride=4).mT
    truth = direct_pcdr(conv.weight.detach().flatten(1), patches, 1)[0].item()
    assert truth > 0.5
    assert found is not None and len(found) == 1
    metric.begin()
    metric.observe(metric.targets[0], *call_views(metric.targets[0], conv, x, conv(x).detach()), None)
    assert metric.finish()["weight"].pcdr[0] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("name", ["weight", "data"])
def test_an_embedding_is_a_weight_on_one_hot_tokens(name: str) -> None:
    table = nn.Embedding(30, 16)
    with torch.no_grad():
        table.weight.copy_(spiked(30, 16, [1.0], noise=0.05))
        table.weight[4] = 0
        table.weight[4, 9] = 20  # one entry of one token's row
    ids = torch.randint(30, (5, 40))
    ids[0, 0] = 4
    found = refresh(metric_of(name, target_of(table), max_rank=1), ids)
    one_hot = nn.functional.one_hot(ids.flatten(), 30).double()
    W = table.weight.detach().double().mT
    assert found is not None and found.U is not None and found.V is not None and len(found) == 1
    assert found.U[9].abs() > 0.98 and found.V.shape == (30, 1)
    if name == "weight":
        assert direct_pcdr(W, one_hot, 1)[0] > 0.5 and found.V[4].abs() > 0.98
    else:
        C = one_hot.mT @ one_hot / len(one_hot)
        torch.testing.assert_close(found.V.double(), C @ W.mT @ found.U.double(), rtol=1e-4, atol=1e-6)


# -- robustness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "data"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_pass_that_overflowed_is_not_looked_at(name: str, bad: float) -> None:
    good, broken = torch.randn(50, 30), torch.randn(50, 30)
    good[3, 7] = 80
    broken[1, 1] = bad
    layer = linear(spiked(30, 30, [9.0]).float())
    good += 20 * torch.linalg.svd(layer.weight.detach()).Vh[0]
    clean, mixed = (metric_of(name, target_of(layer)) for _ in range(2))
    a, b = refresh(clean, good), refresh(mixed, broken, good, broken)
    assert a is not None and b is not None and torch.equal(a.S, b.S)
    assert refresh(metric_of(name, target_of(layer)), broken) is None


@pytest.mark.parametrize("name", ["weight", "data"])
@pytest.mark.parametrize("module", [nn.Linear(30, 30), nn.LayerNorm(30)], ids=["linear", "norm"])
def test_a_batch_of_padding_alone_shows_nothing(name: str, module: nn.Module) -> None:
    metric = metric_of(name, target_of(module))
    assert refresh(metric, torch.randn(2, 5, 30), mask=torch.zeros(2, 5)) is None


@pytest.mark.parametrize("name", ["weight", "data"])
def test_zero_activations_select_nothing_that_is_not_finite(name: str) -> None:
    found = refresh(metric_of(name, target_of(linear(torch.eye(30)))), torch.zeros(50, 30))
    assert found is None or bool(torch.isfinite(found.S).all())


# -- padding -----------------------------------------------------------------------------------------------------------


class Reordered(Encoder):
    """The mask is the first argument."""

    def forward(self, attention_mask: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids, attention_mask)


def _seen_with(metric: str, how: str, ids: Tensor, mask: Tensor) -> tuple[dict[str, int], list[float]]:
    model = fresh(lambda: Reordered() if how == "first" else Encoder())
    with torch.no_grad():
        model.get_submodule("tokens").weight[39, 5] = 1e4  # pyright: ignore[reportArgumentType, reportIndexIssue]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"outlier_ratio": 4.9} if metric == "site" else {"outlier_ratio": 0.0}
    if metric != "site":
        settings |= {"threshold": 0.4, "kinds": ("linear", "norm", "embedding")}
    decay = SelectiveSpectralDecay(model, optimizer, metric=metric, mode="decoupled", strength=0.0, **settings)  # type: ignore[arg-type]
    with removed(decay):
        if how == "keyword":
            still_step(model, optimizer, ids, attention_mask=mask)
        elif how == "first":
            still_step(model, optimizer, mask, ids)
        elif how == "second":
            still_step(model, optimizer, ids, mask)
        elif how == "wide":
            still_step(model, optimizer, ids, mask[:, None, None, :].bool())
        else:
            still_step(model, optimizer, ids)
        return decay.selected, [record["outlier_ratio"] for record in decay.history]


@pytest.mark.parametrize("metric", ["site", "data", "weight"])
def test_padding_is_not_looked_at_however_its_mask_is_given(metric: str) -> None:
    ids = tokens(1, batch=6, length=10) % 38
    mask = torch.ones_like(ids)
    mask[:3, 6:] = 0
    garbage = ids.masked_fill(mask == 0, 39)
    clean = _seen_with(metric, "keyword", ids, mask)
    for how in ("keyword", "first", "second"):
        for form in (mask, mask.bool(), mask.float()):
            found = _seen_with(metric, how, garbage, form)
            assert found[0] == clean[0]
            assert found[1] == pytest.approx(clean[1], rel=1e-4)
    unmasked = _seen_with(metric, "not at all", garbage, mask)
    assert unmasked[1] != pytest.approx(clean[1], rel=0.05)
    assert _seen_with(metric, "wide", garbage, mask)[1][0] == pytest.approx(unmasked[1][0])  # says nothing of padding


def test_the_mask_of_an_earlier_pass_is_forgotten() -> None:
    ids = tokens(1, batch=6, length=10)
    model = fresh(Encoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = SelectiveSpectralDecay(model, optimizer, metric="weight", mode="decoupled", strength=0.0, outlier_ratio=0.0)
    with removed(decay):
        model(ids, torch.zeros_like(ids).index_fill(1, torch.tensor([0]), 1))
        still_step(model, optimizer, ids)
        both = [record["outlier_max"] for record in decay.history]
    other = fresh(Encoder)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    decay = SelectiveSpectralDecay(other, optimizer, metric="weight", mode="decoupled", strength=0.0, outlier_ratio=0.0)
    with removed(decay):
        still_step(other, optimizer, ids)
        alone = [record["outlier_max"] for record in decay.history]
    assert all(a >= b * (1 - 1e-6) for a, b in zip(both, alone, strict=True))


def test_the_metrics_by_name() -> None:
    assert {"site": SiteMetric, "data": DataMetric, "weight": WeightMetric} == METRICS
    assert Encoder().head.in_features == WIDTH
