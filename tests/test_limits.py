"""Where outliers begin: planted ones are found, heavy tails and noise are left alone, and the price is the best."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2d.channels import Sums
from s2d.selection.limits import LEVELS, normal_ratio, priced_limit, site_ratio, tail_limit
from s2d.sharding import Part

TOKENS, SITES = 2000, 40


def sums_of(x_ND: Tensor) -> Sums:
    return Sums(x_ND.abs().amax(0), x_ND.square().sum(0), len(x_ND), Part(x_ND.shape[1]))


def over(x_ND: Tensor) -> list[int]:
    """Channels above the limit."""
    sums = sums_of(x_ND)
    return (sums.channel_max > site_ratio(sums, SITES)[0] * sums.rms()).nonzero().flatten().tolist()


def noise(channels: int = 384, seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, channels, generator=torch.Generator().manual_seed(seed))


def pareto(channels: int, index: float, seed: int) -> Tensor:
    """Maxima with the tail ``P(m > x) = x^(-1 / index)``."""
    return torch.rand(channels, generator=torch.Generator().manual_seed(seed)).pow(-index)


@pytest.mark.parametrize("channels", [16, 48, 384, 1536])
@pytest.mark.parametrize("seed", range(5))
def test_noise_has_no_outliers(channels: int, seed: int) -> None:
    assert over(noise(channels, seed)) == []


@pytest.mark.parametrize("channels", [16, 48, 384, 1536])
def test_a_planted_channel_is_found(channels: int) -> None:
    x = noise(channels)
    x[::100, 7] *= 15
    assert over(x) == [7]


def test_a_planted_channel_is_found_above_a_heavy_tail() -> None:
    """Maxima as behind GELU, of a steep tail of many channels: none is outside of it but the one that is planted."""
    ranks = torch.arange(1, 1537, dtype=torch.float64)
    m = (ranks / 1536).pow(-0.3)[torch.randperm(1536, generator=torch.Generator().manual_seed(0))]
    assert int((m > 2 * m.median()).sum()) > 50 and int((m > tail_limit(m) * (1 + 1e-9)).sum()) == 0
    m[100] = 3 * m.max()
    assert (m > tail_limit(m) * 1.1).nonzero().flatten().tolist() == [100]


@pytest.mark.parametrize("index", [0.1, 0.3, 0.5])
def test_the_tail_foretells_its_largest(index: float) -> None:
    """Of exact Pareto quantiles the rank-1 value, whatever the index; of drawn ones about, on average of the logs."""
    ranks = torch.arange(1, 1001, dtype=torch.float64)
    exact = (ranks / 1000).pow(-index)
    assert tail_limit(exact[torch.randperm(1000)]) == pytest.approx(float(exact[0]))
    drawn = [math.log(tail_limit(pareto(1000, index, seed)) / 1000**index) for seed in range(200)]
    assert abs(sum(drawn) / len(drawn)) < 0.5 * index


def test_the_price_is_the_best_of_all_ranges() -> None:
    """Brute force over a fine grid."""
    generator = torch.Generator().manual_seed(0)
    for sites in (1, 10, 100):
        m = torch.rand(200, generator=generator, dtype=torch.float64).pow(-0.3)
        energy = m.square() * torch.rand(200, generator=generator, dtype=torch.float64) * 0.2
        tried = torch.linspace(1e-3, 1, 20_001, dtype=torch.float64) * m.max()
        saved = 200 * (2 / LEVELS) ** 2 / 12 * (m.max() ** 2 - tried**2)
        lost = ((1 - tried[:, None] / m).clamp_min(0).square() * energy).sum(1)
        best = tried[(saved - sites * lost).argmax()]
        assert priced_limit(m, energy, sites) == pytest.approx(float(best), rel=2e-4)


def test_rare_peaks_of_many_channels_are_cheap_and_steady_ones_are_not() -> None:
    """The same maxima, in one token or in every tenth: only their share of the function differs."""
    ranks = torch.arange(1, 385, dtype=torch.float32)
    m = 60 * ranks.pow(-0.3)
    rare, steady = (noise().clamp(-3, 3) for _ in range(2))
    rare[7], steady[::10] = m, m
    assert 10 < len(over(rare)) < 384 * 0.25 and len(over(steady)) <= 1


def test_the_price_never_falls() -> None:
    """What is left after shrinking would be cheap again, and again, until nothing is left."""
    x = noise()
    x[::100, 7] *= 12
    _, held = site_ratio(sums_of(x), SITES)
    x[::100, 7] /= 4
    assert site_ratio(sums_of(x), SITES, held)[1] == held > site_ratio(sums_of(x), SITES)[1]


def test_scale_and_order_do_not_matter() -> None:
    x = noise()
    x[::100, 7] *= 12
    x[::70, 9] *= 20
    order = torch.randperm(384, generator=torch.Generator().manual_seed(1))
    plain, scaled, permuted = (site_ratio(sums_of(each), SITES) for each in (x, 1000 * x, x[:, order]))
    assert scaled == pytest.approx(plain, rel=1e-4) and permuted == pytest.approx(plain, rel=1e-4)
    assert over(x) == [7, 9] and {int(order[n]) for n in over(x[:, order])} == {7, 9}


@pytest.mark.parametrize("seed", range(5))
def test_gelu_of_noise_has_none_and_a_row_that_bursts_is_found(seed: int) -> None:
    """What the second layer of an untrained MLP reads."""
    x = torch.nn.functional.gelu(noise(1536, seed))
    sums = sums_of(x)
    assert float(sums.channel_max.max() / sums.rms()) > 7 and over(x) == []
    x[5, 33] = 4 * x.max()
    assert over(x) == [33]


def test_silent_and_narrow_sites() -> None:
    assert site_ratio(sums_of(torch.zeros(10, 5)), SITES, held=3.0) == (math.inf, 3.0)
    assert tail_limit(torch.ones(2)) == math.inf
    assert tail_limit(torch.tensor([5.0, 1.0, 0.0])) == 1.0
    assert priced_limit(torch.zeros(4), torch.zeros(4), SITES) == 0.0
    assert 3 < normal_ratio(1) < normal_ratio(10**6) < 7
