"""What must hold for any weight: of any shape, rank, scale and type, with equal values, stored in any order."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d.decay.closed_forms import shrink_directions, shrink_singular
from s2d.decay.selection import Components
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.quant.numerics.formats import FORMATS, BlockFormat
from s2d.quant.numerics.quantizer import affine_parameters, fake_quantize
from s2d.spectral.pcdr import pcdr
from s2d.spectral.svd import top_singular

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
few = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def weights(draw: Any, types: tuple[torch.dtype, ...] = TYPES) -> Tensor:
    """A matrix: full, of low rank, zero, or with equal singular values; perhaps a transposed or strided view."""
    m, n = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(types))
    kind = draw(st.sampled_from(["full", "low rank", "zero", "equal"]))
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if kind == "low rank":
        W = W[:, :1] @ W[:1]
    elif kind == "zero":
        W = torch.zeros_like(W)
    elif kind == "equal":
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        W = U @ Vh
    # Half types end at 6e-8 and 65504; the others are taken near their ends too.
    exponent = draw(st.integers(-3, 3) if dtype in TYPES[2:] else st.integers(-15, 12))
    W = (W * 10.0**exponent).to(dtype)
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed":
        return W.T.contiguous().T
    if layout == "strided":
        return torch.stack([W, W], dim=-1)[..., 0]
    return W


def rounding(W: Tensor) -> float:
    """What arithmetic in the type of a matrix may change in an entry, generously."""
    eps = torch.finfo(torch.float32 if W.dtype != torch.float64 else W.dtype).eps
    stored = torch.finfo(W.dtype).eps
    return float(W.double().norm()) * (30 * eps + 2 * stored) + 1e-7 * (W.dtype == torch.float16)


@few
@given(W=weights(), k=st.integers(1, 3), amount=st.floats(0, 10), power=st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_shrinking_never_increases_a_value_and_leaves_the_complement(
    W: Tensor, k: int, amount: float, power: float
) -> None:
    before, most = W.clone().double(), rounding(W)
    found = top_singular(W, min(k, *W.shape))
    shrink_singular(W, Components(S=found.S, U=found.U, V=found.V), amount, power)
    after = W.double()
    assert bool(torch.isfinite(after).all())
    if amount == 0:
        assert torch.equal(after, before)
    U, V = torch.linalg.qr(found.U.double()).Q, torch.linalg.qr(found.V.double()).Q
    change = after - before
    assert float((change - U @ (U.mT @ change)).norm()) <= most, "rows outside of the selected directions moved"
    assert float((change - (change @ V) @ V.mT).norm()) <= most
    along = torch.einsum("mk,mn,nk->k", found.U.double(), after, found.V.double())
    assert bool((along <= found.S.double() + most).all() and (along >= -most).all())
    assert float(torch.linalg.matrix_norm(after, 2)) <= float(torch.linalg.matrix_norm(before, 2)) + most


@few
@given(W=weights(), amount=st.floats(0, 10), power=st.sampled_from([1.0, 2.0]), size=st.floats(1e-6, 1e6))
def test_directions_shrink_and_what_is_orthogonal_to_them_stays(
    W: Tensor, amount: float, power: float, size: float
) -> None:
    before, most = W.clone().double(), rounding(W)
    compute = torch.float64 if W.dtype == torch.float64 else torch.float32
    u = torch.linalg.qr(torch.randn(len(W), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    shrink_directions(W, Components(S=torch.tensor([size], dtype=compute), U=u.to(compute)), amount, power, None)
    after = W.double()
    assert float(((after - before) - u @ (u.mT @ (after - before))).norm()) <= most
    assert float((u.mT @ after).norm()) <= float((u.mT @ before).norm()) + most


@few
@given(W=weights(), tokens=st.integers(1, 20), scale=st.sampled_from([1e-6, 1.0, 1e4]), seed=st.integers(0, 99))
def test_dominance_is_finite_and_whole_with_all_components(W: Tensor, tokens: int, scale: float, seed: int) -> None:
    X = torch.randn(tokens, W.shape[1], generator=torch.Generator().manual_seed(seed)) * scale
    shares = pcdr(W, X, min(W.shape))
    assert bool(torch.isfinite(shares).all())
    if bool(W.any()):
        assert abs(float(shares[-1]) - 1) < 2e-2, "all components make the outliers alone"
    else:
        assert not bool(shares.any())


@few
@given(W=weights(), format=st.sampled_from([f for f in FORMATS.values() if not isinstance(f, BlockFormat)]))
def test_rounding_is_finite_of_the_same_type_and_blind_to_strides(W: Tensor, format: Any) -> None:
    scale, zero_point = affine_parameters(W.min().float(), W.max().float(), format, format.symmetric)
    rounded = fake_quantize(W, scale, zero_point, format)
    assert rounded.dtype == W.dtype and rounded.shape == W.shape and bool(torch.isfinite(rounded).all())
    assert torch.equal(rounded, fake_quantize(W.contiguous(), scale, zero_point, format))
    slack = 1 + 4 * torch.finfo(W.dtype).eps + 1e-6
    assert float(rounded.abs().max()) <= slack * float(W.abs().max()) + float(scale)


@settings(max_examples=15, deadline=None)
@given(
    W=weights((torch.float32,)),
    metric=st.sampled_from(["weight", "data"]),
    mode=st.sampled_from(["coupled", "decoupled"]),
    strength=st.sampled_from([0.0, 0.1]),
)
def test_any_weight_trains_with_the_decay(W: Tensor, metric: Any, mode: Any, strength: float) -> None:
    """Finite weights stay finite; without strength the steps are those of the optimizer alone, bit for bit."""

    def trained(decay: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0]), nn.Linear(W.shape[0], 2))
        with torch.no_grad():
            model[0].weight.copy_(W)
        model[1].requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        keywords: dict[str, Any] = {"metric": metric, "mode": mode, "strength": strength, "threshold": 0.0}
        if decay:
            SelectiveSpectralDecay(model, optimizer, max_rank=1, refresh_every=1, **keywords)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, W.shape[1])).abs().mean().backward()
            optimizer.step()
        return model[0].weight.detach().clone()

    with_decay = trained(True)
    assert bool(torch.isfinite(with_decay).all())
    if strength == 0:
        assert torch.equal(with_decay, trained(False))
