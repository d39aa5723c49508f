"""Hadamard matrices of many orders, rotations, and the fast transform."""

from __future__ import annotations

import math

import pytest
import torch

from s2d.quant.numerics.hadamard import apply_factors, factors, hadamard, random_rotation

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 72, 76, 80, 96, 192, 384, 576, 768, 1152]


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_signs(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None and matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 8, 64])
def test_powers_of_two_are_those_of_scipy(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert torch.equal(matrix, torch.from_numpy(pytest.importorskip("scipy.linalg").hadamard(n)).double())


def test_a_matrix_handed_out_can_be_changed() -> None:
    first = hadamard(8)
    assert first is not None
    first.zero_()
    again = hadamard(8)
    assert again is not None and bool(again.abs().all())


@pytest.mark.parametrize("n", [0, -4, 3, 6, 10, 14, 172, 4304])
def test_orders_without_a_construction(n: int) -> None:
    assert hadamard(n) is None


@pytest.mark.parametrize("keep_ones", [False, True])
@pytest.mark.parametrize("n", [2, 6, 12, 32, 100, 384, 430])
def test_rotations_are_orthogonal_and_seeded(n: int, keep_ones: bool) -> None:
    Q = random_rotation(n, torch.Generator().manual_seed(3), keep_ones=keep_ones)
    assert torch.allclose(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-13)
    assert torch.equal(Q, random_rotation(n, torch.Generator().manual_seed(3), keep_ones=keep_ones))
    assert not torch.equal(Q, random_rotation(n, torch.Generator().manual_seed(4), keep_ones=keep_ones)) or n < 8
    if keep_ones:
        ones = torch.ones(n, dtype=torch.float64)
        assert torch.allclose(Q @ ones, ones, atol=1e-12) and torch.allclose(ones @ Q, ones, atol=1e-12)


def test_the_global_random_state_is_not_touched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    random_rotation(12, torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("keep_ones", [False, True])
def test_one_channel_is_spread_over_all(keep_ones: bool) -> None:
    Q = random_rotation(384, torch.Generator().manual_seed(0), keep_ones=keep_ones)
    largest = Q.abs().max().item() * math.sqrt(384)
    assert largest <= (2.0 if keep_ones else 1.0 + 1e-9)
    # A dense vector stays below the bound of random signs, sqrt(2 ln d / d) of its length.
    x = torch.randn(64, 384, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 99] = 40.0
    bound = math.sqrt(2 * math.log(384) / 384) * x.norm(dim=1)
    assert bool(((x @ Q).abs().amax(1) < 1.6 * bound).all())


@pytest.mark.parametrize("n", [1, 2, 48, 64, 96, 192, 384, 1152, 430, 30])
def test_the_fast_transform_is_the_product_with_the_whole_matrix(n: int) -> None:
    left, right = factors(n)
    whole = torch.kron(left, right)
    assert whole.shape == (n, n)
    assert torch.allclose(whole @ whole.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    x = torch.randn(3, 2, n, dtype=torch.float64)
    assert torch.allclose(apply_factors(x, left, right), x @ whole, atol=1e-12)
    assert torch.allclose(apply_factors(apply_factors(x, left, right), left.T, right.T), x, atol=1e-12)


def test_the_fast_transform_is_fast_where_a_matrix_is_known() -> None:
    for n in (1536, 3072):
        left, right = factors(n)
        assert left.shape[0] + right.shape[0] < 120
    left, right = factors(4304)  # no matrix of that order: blocks of 16
    assert torch.equal(left, torch.eye(269, dtype=torch.float64)) and right.shape[0] == 16
