"""The closed forms, against numerical integration, autograd and LAPACK."""

from __future__ import annotations

import math

import pytest
import torch
from tests.blocks import spiked
from torch import Tensor

from s2d.decay.closed_forms import (
    decayed,
    penalty_gradient,
    retained,
    shrink_directions,
    shrink_rows,
    shrink_singular,
)
from s2d.decay.selection import Components

POWERS = (1.0, 1.5, 2.0, 3.0)
SIGMAS = torch.tensor([1e-4, 0.05, 0.7, 3.0, 25.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("amount", [1e-4, 0.03, 1.0])
def test_decay_is_the_solution_of_its_differential_equation(power: float, amount: float) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    solution = integrate.solve_ivp(
        lambda _, s: -(s**power), (0, amount), SIGMAS.numpy(), method="LSODA", rtol=1e-10, atol=1e-14
    )
    torch.testing.assert_close(decayed(SIGMAS, amount, power), torch.from_numpy(solution.y[:, -1]), rtol=1e-6, atol=0)


def test_the_two_forms_of_the_paper_and_of_weight_decay() -> None:
    torch.testing.assert_close(decayed(SIGMAS, 0.3, 2.0), SIGMAS / (1 + 0.3 * SIGMAS))
    torch.testing.assert_close(decayed(SIGMAS, 0.3, 1.0), SIGMAS * math.exp(-0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [*POWERS, 1.0001, 16.0])
@pytest.mark.parametrize("amount", [0.0, 1e-12, 1e-3, 1.0, 1e6, 1e30])
def test_decay_never_overshoots_and_keeps_the_order(power: float, amount: float, dtype: torch.dtype) -> None:
    sigma = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e12, 1e30], dtype=dtype)
    after = decayed(sigma, amount, power)
    assert bool(torch.isfinite(after).all())
    assert bool(((after >= 0) & (after <= sigma)).all())
    if bool((sigma.pow(power - 1) < 1e30).all()):  # beyond, the type itself ends
        assert bool((after.diff() >= -1e-3 * after[1:]).all())
    if amount == 0:
        assert torch.equal(after, sigma)
    share = retained(sigma, amount, power)
    assert bool(((share >= 0) & (share <= 1)).all())


@pytest.mark.parametrize("power", POWERS)
def test_two_short_decays_are_one_long_one(power: float) -> None:
    torch.testing.assert_close(decayed(decayed(SIGMAS, 0.2, power), 0.5, power), decayed(SIGMAS, 0.7, power))


def test_a_power_just_above_one_is_continuous_with_one() -> None:
    sigma = SIGMAS.float()
    torch.testing.assert_close(decayed(sigma, 0.01, 1.0 + 1e-6), decayed(sigma, 0.01, 1.0), rtol=1e-5, atol=0)


def _components(W: Tensor, which: list[int]) -> Components:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return Components(S[which], U[:, which], Vh[which].mT)


@pytest.mark.parametrize("power", POWERS)
def test_singular_components_shrink_and_nothing_else_moves(power: float) -> None:
    W = spiked(20, 14, [4.0, 3.0, 2.0], noise=0.1)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    after = W.clone()
    shrink_singular(after, _components(W, [0, 2]), 0.2, power)
    core = U.mT @ after @ Vh.mT  # in the old bases: diagonal, and only two entries changed
    expected = S.clone()
    expected[[0, 2]] = decayed(S[[0, 2]], 0.2, power)
    torch.testing.assert_close(core, torch.diag(expected), rtol=0, atol=1e-13)
    outside = after - U @ core @ Vh  # of the column space
    assert outside.abs().max() < 1e-13
    now = torch.linalg.svdvals(after)
    torch.testing.assert_close(now, expected.sort(descending=True).values, rtol=1e-12, atol=1e-13)
    assert bool((now <= S + 1e-13).all())


def test_the_order_and_the_signs_of_the_vectors_do_not_matter() -> None:
    W = spiked(16, 12, [5.0, 4.0, 3.0], noise=0.1)
    forward, backward = W.clone(), W.clone()
    shrink_singular(forward, _components(W, [0, 1, 2]), 0.3, 2.0)
    other = _components(W, [2, 0, 1])
    assert other.U is not None and other.V is not None
    shrink_singular(backward, Components(other.S, -other.U, -other.V), 0.3, 2.0)
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-14)


def test_any_basis_of_equal_components_does() -> None:
    U = torch.linalg.qr(torch.randn(10, 2, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64)).Q
    W = 3 * U @ V.mT
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    one, two = W.clone(), W.clone()
    shrink_singular(one, Components(torch.full((2,), 3.0), U, V), 0.5, 2.0)
    shrink_singular(two, Components(torch.full((2,), 3.0), U @ turn, V @ turn), 0.5, 2.0)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-14)
    torch.testing.assert_close(one, W / 2.5)


def test_a_component_that_training_turned_around_is_left_alone() -> None:
    W = spiked(9, 7, [3.0])
    parts = _components(W, [0])
    assert parts.U is not None and parts.V is not None
    after = W.clone()
    shrink_singular(after, Components(parts.S, parts.U, -parts.V), 0.5, 2.0)
    assert torch.equal(after, W)


def test_directions_are_taken_out_by_their_share() -> None:
    W, bias = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    U = torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64)).Q
    S = torch.tensor([4.0, 2.0], dtype=torch.float64)
    parts = Components(S, U)
    W_after, bias_after = W.clone(), bias.clone()
    shrink_directions(W_after, parts, 0.1, 2.0, bias_after)
    project = torch.eye(9, dtype=torch.float64)
    for s, u in zip(S, U.mT, strict=True):
        project -= (1 - 1 / (1 + 0.1 * s)) * torch.outer(u, u)
    torch.testing.assert_close(W_after, project @ W)
    torch.testing.assert_close(bias_after, project @ bias)
    torch.testing.assert_close(parts.S, S / (1 + 0.1 * S))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_rows_and_their_biases_shrink_together(power: float) -> None:
    W, bias = torch.randn(6, 4), torch.randn(6)
    S, rows = torch.tensor([0.0, 5.0]), torch.tensor([1, 4])
    W_after, bias_after = W.clone(), bias.clone()
    shrink_rows(W_after, Components(S, channels=rows), 0.2, power, bias_after)
    kept = torch.tensor([math.exp(-0.2)] * 2) if power == 1 else torch.tensor([1.0, 1 / 2.0])
    torch.testing.assert_close(W_after[rows], W[rows] * kept[:, None])
    torch.testing.assert_close(bias_after[rows], bias[rows] * kept)  # a gain of 0 does not wipe its bias out
    others = [0, 2, 3, 5]
    assert torch.equal(W_after[others], W[others]) and torch.equal(bias_after[others], bias[others])


@pytest.mark.parametrize("power", POWERS)
def test_the_gradient_of_the_penalty_is_autograds(power: float) -> None:
    W = spiked(12, 10, [5.0, 3.0, 2.0], noise=0.1).requires_grad_()
    penalty = 0.01 / (power + 1) * torch.linalg.svdvals(W)[:2].pow(power + 1).sum()  # the paper's, arXiv 2602.14432
    penalty.backward()
    found = 0.01 * penalty_gradient(W.detach(), _components(W.detach(), [0, 1]), power, "weight")
    assert W.grad is not None
    torch.testing.assert_close(found, W.grad, rtol=1e-10, atol=1e-12)


def test_a_stale_component_is_penalised_by_what_it_is_now() -> None:
    W = spiked(12, 10, [5.0])
    parts = _components(W, [0])
    torch.testing.assert_close(
        penalty_gradient(0.5 * W, parts, 2.0, "weight"), 0.25 * penalty_gradient(W, parts, 2.0, "weight")
    )
