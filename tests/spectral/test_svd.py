"""The leading singular triplets against torch.linalg.svd in float64, closed forms, and while the matrix moves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d.errors import InputError
from s2d.spectral import subspace, svd
from s2d.spectral.svd import singular_values, top_singular, top_singular_many
from s2d.spectral.triplets import Triplets


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """An m x n float64 matrix of these singular values."""
    U = torch.linalg.qr(gaussian(m, len(values), seed=seed, dtype=torch.float64)).Q
    V = torch.linalg.qr(gaussian(n, len(values), seed=seed + 1, dtype=torch.float64)).Q
    return (U * values.double()) @ V.mT


def power_law(r: int, first: tuple[float, ...] = (8.0, 5.0, 4.0)) -> Tensor:
    values = 3.0 * torch.arange(1, r + 1, dtype=torch.float64) ** -0.3
    values[: len(first)] = torch.tensor(first, dtype=torch.float64)
    return values


def true_values(W: Tensor, k: int = 3) -> Tensor:
    return torch.linalg.svdvals(W.double())[..., :k]


def relative_error(found: Triplets, W: Tensor) -> float:
    true = true_values(W, found.S.shape[-1])
    return float(((found.S.double() - true).abs() / true[..., :1]).max())


def angle(A: Tensor, B: Tensor) -> float:
    """Largest principal angle between the spans of two orthonormal bases (columns)."""
    A, B = torch.linalg.qr(A.double()).Q, torch.linalg.qr(B.double()).Q
    return float(torch.linalg.matrix_norm(B - A @ (A.mT @ B), ord=2).clamp_max(1).asin())


def assert_sound(found: Triplets, W: Tensor, tol: float = 2e-4, orthonormal: float = 2e-5) -> None:
    """What must hold for any matrix: shapes, order, orthonormality, residuals, agreement with the oracle."""
    k = found.S.shape[-1]
    m, n = W.shape[-2:]
    assert found.U.shape == (*W.shape[:-2], m, k)
    assert found.V.shape == (*W.shape[:-2], n, k)
    assert found.residual.shape == W.shape[:-2]
    assert found.U.dtype == (torch.float64 if W.dtype == torch.float64 else torch.float32)
    for vectors in (found.U, found.V):
        gram = vectors.double().mT @ vectors.double()
        assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() < orthonormal
    assert bool((found.S[..., 1:] <= found.S[..., :-1] + 1e-6 * found.S[..., :1]).all())
    assert bool((found.S >= 0).all())
    largest = true_values(W, 1).clamp_min(torch.finfo(torch.float64).tiny)
    scaled = W.double() / largest[..., None]
    U, S, V = found.U.double(), found.S.double() / largest, found.V.double()
    assert torch.linalg.vector_norm(scaled @ V - U * S[..., None, :], dim=-2).max() < 2 * tol
    assert torch.linalg.vector_norm(scaled.mT @ U - V * S[..., None, :], dim=-2).max() < 2 * tol
    assert (S - true_values(scaled, k)).abs().max() < 1e-5


class TestAgainstTheOracle:
    @pytest.mark.parametrize("shape", [(384, 384), (600, 200), (200, 600), (150, 149)])
    @pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
    def test_values_vectors_and_spans(self, shape: tuple[int, int], method: str) -> None:
        W = with_spectrum(power_law(min(shape)), *shape).float()
        found = top_singular(W, 3, method=method)
        assert_sound(found, W)
        U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        assert angle(found.U, U[:, :3]) < 1e-3
        assert angle(found.V, Vh[:3].mT) < 1e-3
        assert found.exact == (method == "exact")
        assert found.fallbacks == 0
        assert (found.iterations == 0) == found.exact
        assert float(found.residual) <= 2e-4

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes_are_computed_in_float32_or_better(self, dtype: torch.dtype) -> None:
        W = with_spectrum(power_law(160), 240, 160).to(dtype)
        before = W.clone()
        found = top_singular(W, 3, tol=1e-9 if dtype == torch.float64 else 2e-4)
        assert_sound(found, W)
        assert relative_error(found, W) < (1e-12 if dtype == torch.float64 else 1e-5)
        assert torch.equal(W, before)

    def test_a_pass_in_many_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(subspace, "_PIECE_BYTES_CPU", 4096)
        monkeypatch.setattr(subspace, "_GRAM_COLUMNS", 50)
        for dtype in (torch.float32, torch.bfloat16):
            W = with_spectrum(power_law(150), 170, 150).to(dtype)
            assert_sound(top_singular(W, 3), W)

    def test_gaussian_matrix_has_no_gap_and_still_converges(self) -> None:
        W = gaussian(500, 400)
        found = top_singular(W, 3)
        assert found.fallbacks == 0
        assert_sound(found, W)

    @pytest.mark.parametrize("k", [1, 2, 8])
    @pytest.mark.parametrize("oversample", [0, 1, 12])
    def test_block_sizes(self, k: int, oversample: int) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        found = top_singular(W, k, oversample=oversample)
        assert_sound(found, W)
        assert found.basis.shape == (160, k + oversample)
        assert torch.equal(found.basis[:, :k], found.V)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        m=st.integers(1, 40),
        n=st.integers(1, 40),
        rank=st.integers(0, 40),
        k=st.integers(1, 5),
        exponent=st.integers(-30, 30),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        method=st.sampled_from(["auto", "randomized", "exact"]),
        seed=st.integers(0, 1000),
    )
    def test_any_shape_rank_and_scale(
        self, m: int, n: int, rank: int, k: int, exponent: int, dtype: torch.dtype, method: str, seed: int
    ) -> None:
        k, rank = min(k, m, n), min(rank, m, n)
        W = gaussian(m, rank, seed=seed, dtype=torch.float64) @ gaussian(rank, n, seed=seed + 1, dtype=torch.float64)
        W = (W * 10.0**exponent).to(dtype)
        cold = top_singular(W, k, method=method, seed=seed)
        # A block that is the whole of a small, ill-conditioned space loses orthonormality: eps * (s_1 / s_k)^2.
        assert_sound(cold, W, orthonormal=1e-3)
        assert_sound(top_singular(W, k, warm=cold, method="warm"), W, orthonormal=1e-3)


class TestClosedForms:
    def test_diagonal(self) -> None:
        W = torch.zeros(300, 200)
        W[range(200), range(200)] = torch.arange(200, 0, -1.0)
        found = top_singular(W, 3)
        assert torch.allclose(found.S, torch.tensor([200.0, 199.0, 198.0]), rtol=1e-6)
        assert found.V.abs().argmax(dim=0).tolist() == [0, 1, 2]
        assert bool((found.V.amax(dim=0) > 0.999).all())  # the sign convention
        assert torch.allclose(found.U[:200], found.V, atol=1e-3)

    def test_rank_one_is_an_outer_product(self) -> None:
        u, v = gaussian(180), gaussian(150, seed=1)
        found = top_singular(torch.outer(u, v), 3, method="randomized")
        assert float(found.S[0]) == pytest.approx(float(u.norm() * v.norm()), rel=1e-6)
        assert float(found.S[1]) < 1e-5 * float(found.S[0])
        assert found.fallbacks == 0

    @pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (1, 20), (20, 1)])
    def test_a_vector_is_its_norm(self, shape: tuple[int, int]) -> None:
        W = gaussian(*shape)
        for method in ("auto", "exact", "randomized"):
            assert float(top_singular(W, 1, method=method).S[0]) == pytest.approx(float(W.norm()), rel=1e-6)

    def test_zero_matrix(self) -> None:
        W = torch.zeros(200, 180)
        for found in (cold := top_singular(W, 3), top_singular(W, 3, warm=cold)):
            assert_sound(found, W)
            assert found.fallbacks == 0
            assert float(found.S.abs().max()) == 0

    def test_repeated_singular_values(self) -> None:
        W = with_spectrum(torch.cat([torch.full((5,), 3.0), torch.full((155,), 1.0)]), 190, 160).float()
        found = top_singular(W, 3)
        assert_sound(found, W)
        assert torch.allclose(found.S, torch.full((3,), 3.0), rtol=1e-5)

    def test_orthogonal_matrix_has_every_direction_on_top(self) -> None:
        W = torch.linalg.qr(gaussian(200, 200)).Q
        found = top_singular(W, 3)
        assert_sound(found, W)
        assert found.fallbacks == 0

    def test_steep_spectrum(self) -> None:
        W = with_spectrum(10.0 ** -torch.arange(160, dtype=torch.float64).clamp_max(12), 200, 160)
        found = top_singular(W, 3, tol=1e-10)
        assert torch.allclose(found.S, torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), rtol=1e-9)
        assert_sound(top_singular(W.float(), 3), W.float())

    @pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e35])
    def test_extreme_scales(self, scale: float) -> None:
        base = with_spectrum(power_law(150), 180, 150)
        W = (base * scale).float()
        found = top_singular(W, 3)
        assert torch.allclose(found.S.double(), true_values(W), rtol=1e-5 if scale > 1e-37 else 1e-3)
        assert torch.allclose(top_singular(base * scale**4, 3).S, true_values(base) * scale**4, rtol=1e-6)

    def test_statistics(self) -> None:
        W = with_spectrum(torch.tensor([4.0, 2.0, 2.0, 1.0]), 30, 4)
        assert float(singular_values(W).median()) == pytest.approx(2.0)
        assert singular_values(gaussian(4, 9, 8))[..., 0].shape == (4,)


class TestWarmStart:
    def test_one_step_suffices_after_a_small_move(self) -> None:
        W = with_spectrum(power_law(256), 384, 256).float()
        found = top_singular(W, 3)
        for step in range(5):
            noise = gaussian(384, 256, seed=10 + step)
            W = W + 1e-4 * noise * W.norm() / noise.norm()
            found = top_singular(W, 3, warm=found)
            assert found.iterations == 1
            assert relative_error(found, W) < 1e-6
            U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
            assert angle(found.U, U[:, :3]) < 1e-2
            assert angle(found.V, Vh[:3].mT) < 1e-2

    def test_a_large_move_takes_more_steps_and_stays_right(self) -> None:
        W = with_spectrum(power_law(256), 384, 256).float()
        moved = W + 0.02 * gaussian(384, 256, seed=5) * W.norm() / 384
        found = top_singular(moved, 3, warm=top_singular(W, 3))
        assert found.iterations > 1
        assert_sound(found, moved)

    def test_another_matrix_altogether(self) -> None:
        found = top_singular(gaussian(300, 200, seed=1), 3, warm=top_singular(gaussian(300, 200), 3))
        assert_sound(found, gaussian(300, 200, seed=1))

    @pytest.mark.parametrize("rate", [0.02, 0.2])
    @pytest.mark.parametrize("kind", ["spiked", "gaussian"])
    def test_decay_of_the_leading_direction_down_through_all_others(self, kind: str, rate: float) -> None:
        """sigma_1 sinks below sigma_2, then below what the block holds: the true leaders must be found every time."""
        W = gaussian(200, 160) if kind == "gaussian" else with_spectrum(power_law(160), 200, 160).float()
        found = top_singular(W, 3)
        first = float(found.S[0])
        for step in range(60):
            W = W - rate * found.S[0] * torch.outer(found.U[:, 0], found.V[:, 0])
            W = W + 1e-5 * gaussian(200, 160, seed=step)
            found = top_singular(W, 3, warm=found)
            assert relative_error(found, W) < 1e-3
        assert float(found.S[0]) < 0.9 * first

    def test_a_growing_direction_enters_from_outside_the_block(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        U, _, Vh = torch.linalg.svd(W)
        found = top_singular(W, 3)
        for _ in range(60):
            W = W + 0.2 * torch.outer(U[:, 100], Vh[100])
            found = top_singular(W, 3, warm=found)
        assert relative_error(found, W) < 1e-5
        assert abs(float(found.V[:, 0] @ Vh[100])) > 0.99

    def test_a_sudden_direction_is_found_within_a_few_refreshes(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        U, _, Vh = torch.linalg.svd(W)
        found = top_singular(W, 3)
        W = W + 16 * torch.outer(U[:, 100], Vh[100])
        for _ in range(6):
            found = top_singular(W, 3, warm=found)
        assert relative_error(found, W) < 1e-5

    def test_survives_storage_in_low_precision_and_other_block_sizes(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        found = top_singular(W, 3)
        rough = dataclasses.replace(found, basis=found.basis.bfloat16())
        assert_sound(top_singular(W, 3, warm=rough), W)
        assert_sound(top_singular(W, 5, warm=found, method="warm"), W)
        assert_sound(top_singular(W, 2, warm=found), W)
        assert_sound(top_singular(W.double(), 3, warm=found), W.double())

    def test_a_damaged_warm_start_falls_back(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        found = top_singular(W, 3)
        broken = dataclasses.replace(found, basis=found.basis * torch.nan)
        repaired = top_singular(W, 3, warm=broken)
        assert repaired.exact and repaired.fallbacks == 1
        assert_sound(repaired, W)
        assert_sound(top_singular(W * 0, 3, warm=broken), W * 0)

    def test_exact_results_can_be_continued(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        found = top_singular(W, 3, warm=top_singular(W, 3, method="exact"))
        assert found.iterations == 1 and not found.exact
        assert_sound(found, W)


class TestFallback:
    def test_is_counted_and_right(self) -> None:
        Ws = [gaussian(200, 160, seed=seed) for seed in range(3)]
        found = top_singular_many(Ws, 3, max_iterations=2)
        assert [t.fallbacks for t in found] == [1, 1, 1]
        assert all(t.exact and t.iterations == 2 for t in found)
        for t, W in zip(found, Ws, strict=True):
            assert_sound(t, W)
        batch = top_singular(torch.stack(Ws), 3, max_iterations=2)
        assert batch.fallbacks == 3 and batch.exact

    def test_the_iteration_never_decomposes_the_whole_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        W = with_spectrum(power_law(200), 300, 200).float()
        full = torch.linalg.svd

        def guarded(A: Tensor, *args: object, **kwargs: object) -> object:
            assert min(A.shape[-2:]) <= 8, "a full SVD on the training path"
            return full(A, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, "svd", guarded)
        found = top_singular(W, 3)
        top_singular(W * 1.001, 3, warm=found)
        top_singular(torch.outer(W[:, 0], W[0]), 3)


class TestManyAndBatches:
    def test_any_mix_equals_one_by_one(self) -> None:
        Ws = [
            with_spectrum(power_law(160), *shape, seed=i).to(dtype)
            for i, (shape, dtype) in enumerate(
                [((200, 160), torch.float32), ((160, 200), torch.float32), ((200, 160), torch.float64)] * 2
            )
        ]
        Ws += [gaussian(3, 5), torch.zeros(200, 160), gaussian(200, 160)]
        together = top_singular_many(Ws, 3)
        again = top_singular_many(Ws, 3, warm=together)
        for W, t, r in zip(Ws, together, again, strict=True):
            assert_sound(t, W)
            assert_sound(r, W)
            alone = top_singular(W, 3)
            assert torch.allclose(t.S, alone.S, rtol=1e-5, atol=1e-6)

    def test_more_than_one_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(svd, "_GROUP_SIZE", 2)
        Ws = [with_spectrum(power_law(140), 150, 140, seed=i).float() for i in range(5)]
        for W, t in zip(Ws, top_singular_many(Ws), strict=True):
            assert_sound(t, W)

    def test_some_warm_some_not(self) -> None:
        Ws = [with_spectrum(power_law(140), 150, 140, seed=i).float() for i in range(3)]
        found = top_singular_many(Ws, 3, warm=[top_singular(Ws[0]), None, top_singular(Ws[2])])
        assert found[0].iterations == 1 < found[1].iterations
        assert top_singular_many([], 3) == []

    @pytest.mark.parametrize("batch", [(2,), (2, 3), (1,)])
    def test_batch_dimensions(self, batch: tuple[int, ...]) -> None:
        W = gaussian(*batch, 170, 140)
        found = top_singular(W, 3)
        assert_sound(found, W)
        again = top_singular(W * 0.999, 3, warm=found)
        assert again.iterations == 1
        assert_sound(again, W * 0.999)
        assert again.basis.shape == (*batch, 140, 8)

    def test_layouts(self) -> None:
        W = with_spectrum(power_law(150), 300, 150).float()
        assert_sound(top_singular(W.mT, 3), W.mT)
        assert_sound(top_singular(W[::2], 3), W[::2])
        assert_sound(top_singular(W[:, 5:140], 3), W[:, 5:140])
        assert_sound(top_singular(W.mT.contiguous().mT, 3), W)

    def test_parameters_record_no_gradient(self) -> None:
        W = torch.nn.Parameter(with_spectrum(power_law(150), 200, 150).float())
        for found in (cold := top_singular(W, 3), top_singular(W, 3, warm=cold), top_singular(W, 3, method="exact")):
            assert not (found.U.requires_grad or found.S.requires_grad or found.V.requires_grad)
        assert W.grad is None


class TestDeterminism:
    def test_same_seed_same_bits_and_the_global_generator_is_left_alone(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        state = torch.get_rng_state()
        first = top_singular(W, 3, seed=3)
        second = top_singular(W, 3, seed=3)
        for a, b in ((first, second), (top_singular(W, 3, warm=first), top_singular(W, 3, warm=second))):
            for name in ("U", "S", "V", "basis", "residual", "edge"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(first.basis, top_singular(W, 3, seed=4).basis)

    def test_a_saved_state_continues_bit_by_bit(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        found = top_singular(W, 3)
        fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
        restored = Triplets(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in fields.items()})
        a, b = top_singular(W, 3, warm=found), top_singular(W, 3, warm=restored)
        assert torch.equal(a.basis, b.basis) and torch.equal(a.S, b.S)

    @pytest.mark.parametrize("method", ["exact", "randomized"])
    def test_signs(self, method: str) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        found = top_singular(W, 3, method=method)
        peak = found.V.gather(0, found.V.abs().argmax(dim=0, keepdim=True))
        assert bool((peak > 0).all())
        flipped = top_singular(-W, 3, method=method)
        assert torch.allclose(flipped.V, found.V, atol=1e-3)
        assert torch.allclose(flipped.U, -found.U, atol=1e-3)

    def test_precision_does_not_follow_autocast_or_the_matmul_setting(self) -> None:
        W = with_spectrum(power_law(160), 200, 160).float()
        expected = top_singular(W, 3).S
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = top_singular(W, 3)
                assert torch.is_autocast_enabled("cpu")
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)
        assert torch.equal(found.S, expected)


class TestErrors:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("method", ["auto", "exact", "randomized", "warm"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nan_and_inf_anywhere(self, value: float, method: str, dtype: torch.dtype) -> None:
        W = with_spectrum(power_law(150), 180, 150).to(dtype)
        W[:, 7] = 0  # an unused input: its entries of V are zero, and must not hide the damage
        found = top_singular(W, 3)
        W[33, 7] = value
        with pytest.raises(
            InputError, match=r"^layer\.fc holds 1 NaN or Inf of 27000 values, the first at \[33, 7\]; "
        ):
            top_singular_many([W], 3, warm=[found], method=method, names=["layer.fc"])

    def test_names_the_index(self) -> None:
        Ws = [gaussian(150, 140), gaussian(150, 140)]
        Ws[1][3, 4] = torch.nan
        with pytest.raises(InputError, match=r"^weight 1 holds 1 NaN"):
            top_singular_many(Ws)
        with pytest.raises(InputError, match=r"^W\[1\] holds 1 NaN"):
            top_singular(torch.stack(Ws))
        with pytest.raises(InputError, match="holds 1 NaN"):
            singular_values(Ws[1])

    @pytest.mark.parametrize(
        ("W", "arguments", "message"),
        [
            (
                torch.ones(4, 9),
                {"k": 5},
                r"k is 5, and W of shape \[4, 9\] has 4 singular values; pass k between 1 and 4",
            ),
            (torch.ones(4, 9), {"k": 0}, "k is 0"),
            (torch.ones(0, 9), {"k": 1}, r"W has shape \[0, 9\]; pass a matrix"),
            (torch.ones(9), {"k": 1}, r"W has shape \[9\]; pass a matrix"),
            (torch.ones(0, 3, 3), {"k": 1}, r"W has shape \[0, 3, 3\]"),
            (torch.ones(4, 9, dtype=torch.int64), {"k": 1}, r"W is torch.int64; pass float64"),
            (torch.ones(4, 9, dtype=torch.complex64), {"k": 1}, "W is torch.complex64"),
            (torch.ones(4, 9, device="meta"), {"k": 1}, "on meta; pass a dense one"),
            (torch.ones(4, 9).to_sparse(), {"k": 1}, "torch.sparse_coo"),
            (torch.ones(4, 9), {"method": "lanczos"}, "unknown method 'lanczos'; choose one of auto, exact"),
            (torch.ones(4, 9), {"method": "warm"}, "no earlier triplets"),
            (torch.ones(4, 9), {"tol": 0.0}, "tol=0.0"),
            (torch.ones(4, 9), {"max_iterations": 0}, "max_iterations=0"),
            (torch.ones(4, 9), {"oversample": -1}, "oversample=-1"),
            (torch.ones(4, 9), {"warm": top_singular(torch.ones(9, 4), 1)}, r"has shape \[4, 9\], its warm triplets"),
            (torch.ones(2, 4, 9), {"warm": top_singular(torch.ones(3, 4, 9), 1)}, r"W is a batch of \[2\]"),
        ],
    )
    def test_one_line_that_names_the_input(self, W: Tensor, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            top_singular(W, **{"k": 1, **arguments})
        assert "\n" not in str(caught.value)

    def test_many_needs_one_of_each(self) -> None:
        with pytest.raises(InputError, match="1 matrices, 2 warm starts and 1 names"):
            top_singular_many([torch.ones(3, 3)], 1, warm=[None, None])
        with pytest.raises(InputError, match=r"weight 0 has shape \[2, 3, 3\]"):
            top_singular_many([torch.ones(2, 3, 3)], 1)

    def test_median_of_a_vector(self) -> None:
        with pytest.raises(InputError, match="pass a matrix"):
            singular_values(torch.ones(3))
