"""PCDR against a direct computation with the full SVD, and its pieces against brute force."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from tests.blocks import spiked
from torch import Tensor

from s2d.errors import InputError
from s2d.spectral.pcdr import Dominance, outlier_shares, pcdr, principal_components, projections
from s2d.spectral.statistics import (
    FEWEST_OUTLIERS,
    OUTLIER_FRACTION,
    channel_sums,
    kept_rows,
    outlier_entries,
    row_sums,
    token_rows,
)
from s2d.spectral.svd import top_singular


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def direct_pcdr(W: Tensor, X: Tensor, k: int, fraction: float = OUTLIER_FRACTION) -> Tensor:
    """The definition, with every component and every activation written out, in float64."""
    W, X = W.double(), X.double().reshape(-1, X.shape[-1])
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    part_NOR = torch.einsum("r,or,nr->nor", S, U, X @ Vh.mT)
    total_NO = part_NOR.sum(-1)
    torch.testing.assert_close(total_NO, X @ W.mT)
    count = min(max(math.ceil(fraction * total_NO.numel()), FEWEST_OUTLIERS), total_NO.numel())
    outliers = total_NO.abs().flatten().topk(count).indices
    leading = part_NOR.cumsum(-1).flatten(0, 1)[outliers].abs().sum(0)
    return (leading / total_NO.flatten()[outliers].abs().sum())[:k]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (40, 8)])
@pytest.mark.parametrize("sigmas", [[6.0], [3.0, 2.5], [0.0]])
def test_pcdr_is_its_definition(shape: tuple[int, int], sigmas: list[float]) -> None:
    W = spiked(*shape, sigmas, noise=0.1)
    X = torch.randn(50, shape[1], dtype=torch.float64)
    torch.testing.assert_close(pcdr(W, X), direct_pcdr(W, X, 3))
    torch.testing.assert_close(pcdr(W.float(), X.float(), 2).double(), direct_pcdr(W, X, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pcdr(W, X, fraction=0.1), direct_pcdr(W, X, 3, 0.1))


def test_a_spike_dominates_its_outliers_and_noise_does_not() -> None:
    X = torch.randn(64, 48)
    assert pcdr(spiked(96, 48, [20.0]).float(), X)[0] == pytest.approx(1, abs=0.02)
    assert pcdr(torch.randn(96, 48), X)[0] < 0.5


def test_leading_components_may_overshoot() -> None:
    """Two components that cancel on an outlier: the first alone makes more than there is."""
    U = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    W, X = U * torch.tensor([2.0, 1.0]), torch.tensor([[0.5, -0.75]])  # X W^T = u_1 - 0.75 u_2 = (1.25, 0)
    torch.testing.assert_close(pcdr(W, X, 2), torch.tensor([1.4 / 1.25, 1.0]))


def test_leading_dimensions_and_masks() -> None:
    W, X = spiked(12, 8, [4.0], noise=0.2).float(), torch.randn(3, 2, 5, 8)
    flat = pcdr(W, X.reshape(30, 8))
    torch.testing.assert_close(pcdr(W, X), flat)
    torch.testing.assert_close(pcdr(W, X[0, 0, 0]), pcdr(W, X[0, 0, :1]))
    mask = torch.rand(3, 2, 5) > 0.4
    dirty = X.clone()
    dirty[~mask] = 1e6
    torch.testing.assert_close(pcdr(W, dirty, mask=mask), pcdr(W, X[mask]))
    torch.testing.assert_close(pcdr(W, dirty, mask=mask.long()), pcdr(W, X[mask]))
    dirty[~mask] = math.nan  # what padding holds is nobody's business
    torch.testing.assert_close(pcdr(W, dirty, mask=mask), pcdr(W, X[mask]))
    assert pcdr(W, X, mask=torch.zeros(3, 2, 5)).tolist() == [0, 0, 0]


def test_streamed_batches_are_their_concatenation() -> None:
    """Each batch holds 16 outliers far above the rest; together they are the 32 largest entries of 32,000."""
    W = spiked(40, 20, [2.0], noise=0.05).float()
    triplets = top_singular(W)
    batches = []
    for seed in range(2):
        X = torch.randn(400, 20, generator=torch.Generator().manual_seed(seed))
        X[:16] = 0
        X[:16] += 30 * triplets.V[:, 0]
        batches.append(X)
    keep = torch.zeros(40, 20)
    top = int(triplets.U[:, 0].abs().argmax())
    keep[top] = W[top]  # one output per row, so that the 16 largest of a batch are its 16 planted rows
    streamed = Dominance(triplets)
    for X in batches:
        streamed.update(X, X @ keep.mT)
    whole = torch.cat(batches)
    both = Dominance(triplets, fraction=32 / (800 * 40))
    both.update(whole, whole @ keep.mT)
    torch.testing.assert_close(streamed.ratios(), both.ratios())


def test_nothing_of_a_batch_is_kept() -> None:
    W = torch.randn(12, 8)
    dominance = Dominance(top_singular(W))
    held = {name: value.shape for name, value in vars(dominance).items() if isinstance(value, Tensor)}
    X = torch.randn(100, 8)
    Y = X @ W.mT
    watch = weakref.ref(X), weakref.ref(Y)
    dominance.update(X, Y)
    del X, Y
    gc.collect()
    assert [each() for each in watch] == [None, None]
    assert {name: value.shape for name, value in vars(dominance).items() if isinstance(value, Tensor)} == held


def test_zero_activations_have_no_dominance() -> None:
    assert pcdr(torch.randn(6, 5), torch.zeros(4, 5)).tolist() == [0, 0, 0]


def test_known_triplets_are_used() -> None:
    W, X = torch.randn(20, 10), torch.randn(30, 10)
    torch.testing.assert_close(pcdr(W, X, 2, triplets=top_singular(W, 5)), pcdr(W, X, 2))


@pytest.mark.parametrize("shape", [(7, 3), (1, 50), (300, 40), (64, 1)])
@pytest.mark.parametrize("fraction", [OUTLIER_FRACTION, 0.01, 0.5, 1.0])
def test_outliers_are_the_largest_entries(shape: tuple[int, int], fraction: float) -> None:
    Y = torch.randn(shape)
    row, column = outlier_entries(Y, fraction)
    count = min(max(math.ceil(fraction * Y.numel()), 16), Y.numel())
    assert len(row) == len(column) == count
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == count
    torch.testing.assert_close(Y[row, column].abs(), Y.abs().flatten().topk(count).values)
    known = outlier_entries(Y, fraction, row_max=Y.abs().amax(1))
    assert all(torch.equal(a, b) for a, b in zip(known, (row, column), strict=True))


def test_token_rows_is_a_view_where_it_can_be() -> None:
    x = torch.randn(2, 3, 4)
    assert token_rows(x).data_ptr() == x.data_ptr()
    assert token_rows(x, torch.ones(2, 3)).data_ptr() == x.data_ptr()
    assert token_rows(x, torch.ones(2)).shape == (6, 4)  # not a mask of these tokens
    assert torch.equal(token_rows(x, torch.tensor([[1, 0, 0], [0, 1, 1]])), x.reshape(6, 4)[[0, 4, 5]])


def test_principal_components_are_the_left_singular_vectors_in_the_metric_of_the_data() -> None:
    W = spiked(30, 20, [9.0, 5.0, 3.0], noise=0.05)
    X = torch.randn(400, 20, dtype=torch.float64) @ torch.diag(torch.linspace(0.5, 2, 20, dtype=torch.float64))
    C = X.mT @ X / len(X)
    values, vectors = torch.linalg.eigh(C)
    truth = torch.linalg.svd(W @ (vectors * values.sqrt()) @ vectors.mT).U[:, :3]
    Y = X @ W.mT
    cold, sigma = principal_components(Y, 3)
    torch.testing.assert_close((cold.mT.double() @ truth).abs(), torch.eye(3).double(), rtol=0, atol=2e-3)
    warm, sigma = principal_components(Y, 3, warm=cold)
    torch.testing.assert_close(sigma, torch.linalg.vector_norm(Y.float() @ warm, dim=0) / 20, rtol=1e-4, atol=0)
    torch.testing.assert_close(projections(Y, warm), Y.float() @ warm)
    torch.testing.assert_close((warm.mT.double() @ truth).abs(), torch.eye(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(warm.mT @ warm, torch.eye(3), rtol=0, atol=1e-5)
    assert torch.equal(principal_components(Y, 3)[0], cold)


@pytest.mark.parametrize("tokens", [1, 2, 100])
def test_principal_components_of_few_tokens_are_still_a_basis(tokens: int) -> None:
    Y = torch.randn(tokens, 9)
    U = principal_components(Y, 4)[0]
    torch.testing.assert_close(U.mT @ U, torch.eye(4), rtol=0, atol=1e-5)
    sizes = torch.linalg.vector_norm(Y @ U, dim=0)
    assert bool((sizes.diff() <= 1e-5).all())
    again = principal_components(torch.randn(50, 9), 6, warm=U)[0]  # another width: a fresh start
    assert again.shape == (9, 6)


def test_shares_of_a_full_basis_add_up_to_the_outliers() -> None:
    Y = torch.randn(40, 6)
    row, column = outlier_entries(Y)
    U = torch.linalg.qr(torch.randn(6, 6)).Q
    shares = outlier_shares((Y[row] @ U) * U[column], Y[row, column])
    assert shares.sum().item() == pytest.approx(1, abs=1e-5)
    one = U[:, 0]
    by_hand = sum((Y[n] @ one * one[o] * Y[n, o].sign()).item() for n, o in zip(row, column, strict=True))
    assert shares[0].item() == pytest.approx(by_hand / Y[row, column].abs().sum().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("W", "X", "mask", "k", "words"),
    [
        (torch.randn(4, 5), torch.randn(3, 6), None, 3, "width 6"),
        (torch.randn(4, 5), torch.randn(3, 5), torch.ones(4), 3, "mask of shape"),
        (torch.randn(4, 5), torch.full((3, 5), math.inf), None, 3, "NaN or Inf"),
        (torch.full((4, 5), math.nan), torch.randn(3, 5), None, 3, "NaN or Inf"),
        (torch.randn(4, 5), torch.randn(3, 5), None, 9, "k is 9"),
    ],
)
def test_bad_input_is_named(W: Tensor, X: Tensor, mask: Tensor | None, k: int, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        pcdr(W, X, k, mask)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 3000])
def test_channel_sums_are_the_norms_of_the_columns(dtype: torch.dtype, tokens: int) -> None:
    x = (torch.randn(tokens, 200) * 10).to(dtype)[:, :151]  # several pieces, not contiguous
    kept = torch.arange(0, tokens, 3)
    for rows, largest, squares in ((x, *channel_sums(x)), (x[kept], *channel_sums(x, kept))):
        assert torch.equal(largest, rows.float().abs().amax(0))
        torch.testing.assert_close(squares, rows.double().square().sum(0).float(), rtol=1e-5, atol=0)
    assert not torch.isfinite(channel_sums(torch.tensor([[1.0, math.inf], [math.nan, 0.0]]))[0]).any()
    assert torch.equal(channel_sums(x, kept[:0])[0], torch.zeros(151))


def test_padding_is_left_out_by_index_as_by_copy() -> None:
    Y, mask = torch.randn(500, 40), torch.rand(10, 50) < 0.7
    Y[~mask.flatten()] = math.nan
    bias, kept = torch.randn(40), kept_rows(mask)
    assert kept is not None and kept_rows(torch.ones(2, 3)) is None
    copied = token_rows(Y, mask)
    row, column = outlier_entries(Y, kept=kept)
    assert torch.equal(Y[row, column], copied[outlier_entries(copied)])
    U, sigma = principal_components(copied - bias, 4)
    for found, expected in zip(principal_components(Y, 4, bias=bias, kept=kept), (U, sigma), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(projections(Y, U, bias, kept), (copied - bias) @ U)


def test_row_sums_are_the_norms_of_the_rows() -> None:
    x = torch.randn(30, 50).bfloat16()
    largest, squares = row_sums(x)
    assert torch.equal(largest, x.float().abs().amax(1))
    torch.testing.assert_close(squares, x.float().square().sum(1))


def test_equal_entries_are_all_outliers() -> None:
    Y = torch.zeros(300, 200)
    Y[torch.arange(20) * 13, torch.arange(20) * 7] = 5.0  # more equal ones than are asked for
    row, column = outlier_entries(Y)
    assert len(row) == 16 and torch.equal(Y[row, column], torch.full((16,), 5.0))
