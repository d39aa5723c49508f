"""Observers against torch.quantile, brute-force searches, and the stream's own promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d.errors import InputError
from s2d.quant.numerics.formats import FORMATS, FP8_E4M3, Format, IntFormat
from s2d.quant.numerics.observers import (
    ACTIVATION_SHRINK,
    CANDIDATES,
    WEIGHT_SHRINK,
    MeanSquaredError,
    MinMax,
    Percentile,
    affine_errors,
    affine_rounding,
    make_observer,
    weight_range,
)
from s2d.quant.numerics.quantizer import affine_parameters, fake_quantize

UINT4, UINT8, INT4 = FORMATS["uint4"], FORMATS["uint8"], FORMATS["int4"]


def heavy_tailed(count: int = 20_000) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(3))
    x[:5] = torch.tensor([80.0, 60.0, -30.0, 90.0, 50.0])
    return x


def error(x: Tensor, lo: Tensor, hi: Tensor, format: Format) -> float:
    rounded = fake_quantize(x, *affine_parameters(lo, hi, format, format.symmetric), format)
    return (rounded - x).double().square().sum().item()


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_minmax_over_batches_is_minmax_of_all(parts: list[list[float]]) -> None:
    observer = MinMax("x")
    for part in parts:
        observer.update(torch.tensor(part, dtype=torch.float32))
    everything = torch.tensor(sum(parts, []), dtype=torch.float32)
    assert observer.range(UINT8) == (everything.min(), everything.max())


@pytest.mark.parametrize("percent", [51.0, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_equals_quantile(percent: float) -> None:
    x = heavy_tailed()
    observer = Percentile("x", percent)
    for part in x.chunk(7):
        observer.update(part)
    lo, hi = observer.range(UINT8)
    # Exactly the quantile of the values as counted, and within the stated error of the values as they were.
    counted = x.bfloat16().double()
    for ours, fraction in ((lo, 1 - percent / 100), (hi, percent / 100)):
        exact = torch.quantile(counted, fraction).clamp(x.min(), x.max())
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, torch.quantile(x, fraction), rtol=2**-8, atol=1e-3)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), st.floats(50.5, 100))
def test_percentile_of_few_values(numbers: list[float], percent: float) -> None:
    x = torch.tensor(numbers, dtype=torch.float32)
    observer = Percentile("x", percent)
    observer.update(x)
    lo, hi = observer.range(UINT8)
    assert x.min() <= lo <= hi <= x.max()
    wanted = torch.quantile(
        x.bfloat16().double(), torch.tensor([1 - percent / 100, percent / 100], dtype=torch.float64)
    )
    torch.testing.assert_close(torch.stack([lo, hi]).double(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "format", [FORMATS["uint3"], UINT4, FORMATS["uint6"], UINT8, INT4, FP8_E4M3], ids=lambda f: f.name
)
def test_mse_equals_a_brute_force_loop(format: Format) -> None:
    x = heavy_tailed()
    observer = MeanSquaredError("x")
    for part in x.chunk(3):
        observer.update(part)
    lo, hi = observer.range(format)
    top = x.abs().max()
    errors = [error(x, x.min().clamp(min=-top * a), x.max().clamp(max=top * a), format) for a in ACTIVATION_SHRINK]
    # The search sees values to 2**-9, so it may take a neighbour that is as good.
    assert error(x, lo, hi, format) <= 1.01 * min(errors)
    assert error(x, lo, hi, format) <= error(x, x.min(), x.max(), format)


@pytest.mark.parametrize("format", [UINT4, UINT8, INT4], ids=lambda f: f.name)
def test_errors_from_sums_are_those_of_rounding_every_value(format: IntFormat) -> None:
    values = heavy_tailed().bfloat16().float().unique()
    counts = torch.arange(1, len(values) + 1)
    los, his = values[0] * ACTIVATION_SHRINK, values[-1] * ACTIVATION_SHRINK.flip(0)
    rounding = affine_rounding(format)
    expected = [
        ((rounding(values, lo, hi).double() - values) ** 2 @ counts.double()) for lo, hi in zip(los, his, strict=True)
    ]
    found = affine_errors(values, counts, los, his, format)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=0.0)


def test_mse_leaves_a_short_side_whole() -> None:
    x = torch.nn.functional.gelu(heavy_tailed(400_000))
    observer = MeanSquaredError("x")
    observer.update(x)
    lo, hi = observer.range(UINT4)
    assert lo == x.min() and hi < 0.5 * x.max()


def test_streams_do_not_depend_on_how_data_is_cut_and_stay_small() -> None:
    x = heavy_tailed()
    for text in ("minmax", "percentile", "mse"):
        whole, parts = make_observer(text, "x"), make_observer(text, "x")
        whole.update(x)
        for part in x.split(97):
            parts.update(part)
        assert whole.range(UINT4) == parts.range(UINT4)
        held = [v for v in vars(parts).values() if isinstance(v, Tensor)]
        assert sum(v.numel() for v in held) <= 2**16 + 2


def test_nan_and_infinity_name_the_site() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="layer.3.input received NaN or infinite"):
            make_observer("minmax", "layer.3.input").update(torch.tensor([1.0, bad]))
        with pytest.raises(InputError, match="layer.3.weight holds NaN or infinite"):
            weight_range(torch.tensor([[1.0, bad]]), "minmax", INT4, name="layer.3.weight")


def test_an_observer_that_saw_nothing_says_so() -> None:
    observer = make_observer("percentile", "layer.3.input")
    observer.update(torch.empty(0, 4))
    assert not observer.seen
    with pytest.raises(InputError, match="never reached layer.3.input"):
        observer.range(UINT4)


@pytest.mark.parametrize("text", ["max", "percentile:", "percentile:x", "percentile:50", "percentile:101", "mse:3", ""])
def test_unknown_observers(text: str) -> None:
    with pytest.raises(InputError, match="observer"):
        make_observer(text, "x")


@pytest.mark.parametrize("format", [FORMATS["int3"], INT4, FORMATS["int8"], UINT4], ids=lambda f: f.name)
def test_weight_mse_equals_a_loop_over_rows_and_candidates(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    # A small budget, so that the candidates are searched in several rounds.
    monkeypatch.setattr("s2d.quant.numerics.observers.WEIGHT_SEARCH_NUMBERS", 7 * 6 * 64)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) ** 3
    lo, hi = weight_range(weight, "mse", format, name="w")
    for row, row_lo, row_hi in zip(weight, lo, hi, strict=True):
        low, high = row.min(), row.max()
        if format.symmetric:
            high = row.abs().max()
            low = -high
        errors = torch.tensor([error(row, a * low, a * high, format) for a in WEIGHT_SHRINK])
        best = int(errors.argmin())
        assert error(row, row_lo, row_hi, format) == pytest.approx(errors[best].item(), rel=1e-5)
    assert len(WEIGHT_SHRINK) == len(ACTIVATION_SHRINK) == CANDIDATES == 100


def test_weight_minmax_and_percentile() -> None:
    weight = torch.randn(5, 4000)
    lo, hi = weight_range(weight, "minmax", INT4, name="w")
    assert torch.equal(lo, weight.amin(1)) and torch.equal(hi, weight.amax(1))
    lo, hi = weight_range(weight, "percentile:99", INT4, name="w")
    assert torch.allclose(lo, torch.quantile(weight, 0.01, dim=1)) and torch.allclose(
        hi, torch.quantile(weight, 0.99, dim=1)
    )
