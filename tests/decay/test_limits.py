"""Where outliers begin: planted ones are found, heavy tails and noise are left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2d.decay.selection.limits import site_ratio
from s2d.distributed.sharding import Part
from s2d.spectral.statistics import Sums

TOKENS = 2000
WIDTHS = [5, 16, 48, 384, 1536]


def sums_of(x_ND: Tensor) -> Sums:
    return Sums(x_ND.abs().amax(0), x_ND.square().sum(0), len(x_ND), Part(x_ND.shape[1]))


def over(x_ND: Tensor) -> list[int]:
    """Channels above the limit."""
    sums = sums_of(x_ND)
    return (sums.channel_max > site_ratio(sums) * sums.rms()).nonzero().flatten().tolist()


def noise(channels: int = 384, seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("seed", range(3))
def test_noise_has_no_outliers_behind_gelu_neither(channels: int, seed: int) -> None:
    x = noise(channels, seed)
    assert over(x) == [] == over(torch.nn.functional.gelu(x))


@pytest.mark.parametrize("channels", WIDTHS)
def test_a_planted_channel_is_found(channels: int) -> None:
    """However narrow the site is: of five channels one may be an outlier as well."""
    x = noise(channels)
    x[::200, 3] *= 20
    assert over(x) == [3]


def test_a_heavy_tail_is_none_and_what_stands_out_of_it_is() -> None:
    """As behind GELU: hundreds of channels above 8 times the RMS, each with a peak in few tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(noise(1536) * (torch.rand(1536, generator=generator) * 0.4 + 0.1))
    x[torch.arange(400), torch.arange(400)] = x.square().mean().sqrt() * torch.linspace(9, 14, 400)
    sums = sums_of(x)
    assert int((sums.channel_max > 8 * sums.rms()).sum()) > 300 and over(x) == []
    x[7, 1000] = 2 * x.max()
    assert over(x) == [1000]


def test_the_rule_in_closed_form() -> None:
    """1.5 times the largest maximum beyond the top 2 %, the 9th of 384; 8 where that is lower."""
    maxima = torch.linspace(1.0, 20.0, 384)
    squares = torch.ones(384)
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    sums = Sums(maxima[order], squares[order], 1, Part(384))
    assert site_ratio(sums) == pytest.approx(1.5 * float(maxima[-9]))
    assert site_ratio(Sums(maxima / 10, squares, 1, Part(384))) == 8.0


def test_scale_and_order_do_not_matter() -> None:
    x = noise()
    x[::100, 7] *= 12
    x[::70, 9] *= 20
    order = torch.randperm(384, generator=torch.Generator().manual_seed(1))
    plain, scaled, permuted = (site_ratio(sums_of(each)) for each in (x, 1000 * x, x[:, order]))
    assert scaled == pytest.approx(plain, rel=1e-4) and permuted == pytest.approx(plain, rel=1e-4)
    assert over(x) == [7, 9] and {int(order[n]) for n in over(x[:, order])} == {7, 9}


def test_silent_and_narrow_sites() -> None:
    assert site_ratio(sums_of(torch.zeros(10, 5))) == math.inf
    assert site_ratio(Sums(torch.tensor([9.0]), torch.tensor([81.0]), 81, Part(1))) == pytest.approx(13.5)
