"""Where outliers begin: planted ones are found, heavy tails and noise are left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2d.decay.selection.limits import normal_ratio, site_ratio, tail_limit
from s2d.distributed.sharding import Part
from s2d.spectral.statistics import Sums

TOKENS = 2000


def sums_of(x_ND: Tensor) -> Sums:
    return Sums(x_ND.abs().amax(0), x_ND.square().sum(0), len(x_ND), Part(x_ND.shape[1]))


def over(x_ND: Tensor) -> list[int]:
    """Channels above the limit."""
    sums = sums_of(x_ND)
    return (sums.channel_max > site_ratio(sums) * sums.rms()).nonzero().flatten().tolist()


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


def test_scale_and_order_do_not_matter() -> None:
    x = noise()
    x[::100, 7] *= 12
    x[::70, 9] *= 20
    order = torch.randperm(384, generator=torch.Generator().manual_seed(1))
    plain, scaled, permuted = (site_ratio(sums_of(each)) for each in (x, 1000 * x, x[:, order]))
    assert scaled == pytest.approx(plain, rel=1e-4) and permuted == pytest.approx(plain, rel=1e-4)
    assert over(x) == [7, 9] and {int(order[n]) for n in over(x[:, order])} == {7, 9}


def test_gelu_of_noise_has_none_and_a_row_that_bursts_is_found() -> None:
    """What fc2 reads: the widths of its channels differ by a factor of ten."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.rand(1536, generator=generator) * 1.8 + 0.2
    x = torch.nn.functional.gelu(noise(1536) * widths - 1)
    sums = sums_of(x)
    assert float(sums.channel_max.max() / sums.rms()) > 8 and over(x) == []
    x[5, 33] = 4 * x.max()
    assert over(x) == [33]


def test_silent_and_narrow_sites() -> None:
    assert site_ratio(sums_of(torch.zeros(10, 5))) == math.inf
    assert tail_limit(torch.ones(2)) == math.inf
    assert tail_limit(torch.tensor([5.0, 1.0, 0.0])) == 1.0
    assert site_ratio(Sums(torch.tensor([9.0, 9.0]), torch.tensor([81.0, 81.0]), 1, Part(2))) == math.inf
    assert 3 < normal_ratio(1) < normal_ratio(10**6) < 7
