"""Where the outliers of a site begin, when no fixed ratio is given: out of its own tail, or cheap for what they cost.

No fixed ratio is right for two sites. Behind GELU hundreds of channels of every block stand above 8 times the RMS: a
heavy tail, which is function. In front of it one channel stands at twice the next. m_1, m_2, ... are the D channel
maxima of a site, largest first.

- *Out of its tail.* Two ranks a < b below the very top give the index of the tail, ``xi = ln(m_a / m_b) / ln(b / a)``,
  and it foretells the largest of them, ``m_a a^xi`` (a Pareto tail's quantile 1/D; Hill, Annals of Statistics 1975;
  Weissman, JASA 1978). What exceeds it is none of this tail.
- *Cheap for what it costs.* Lowering the range from R to R' takes ``(R^2 - R'^2) s^2 / 12`` of rounding noise off every
  channel (steps of s = 2/15 of the range at 4 bits), and ``(1 - R'/m_c)^2 E[x_c^2]`` of function out of each channel
  above R'. The noise of S sites adds up in power; what is always missing adds up in amplitude, S times as fast at
  worst, and counts S times. The best R' is in closed form, ``S sum m_c d_c / (D s^2 / 12 + S sum d_c)`` over the
  channels above it, with ``d_c = E[x_c^2] / m_c^2``. The columns of the readers are taken as equally long: with their
  true lengths the choice differs little, on DINOv2 and on MiniLM.

The limit is the lower of both, but no lower than noise reaches, behind GELU as well: a site that looks like it has no
outliers. The scale of a site and the order of its channels make no difference, and nothing here was fitted to a model;
what was measured is in docs/results/vision.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2d.channels import Sums

# The price is asked at 4 bits, the fewest that activations are usually given.
LEVELS = 15
# The tail's ranks: 0.4 and 2 times the root of the channels (8 and 40 of 384). A root of them is usual for Hill's
# estimate; the upper rank leaves the outliers themselves out.
UPPER, WIDTH = 0.4, 5
# Root mean square of GELU(z) for a standard normal z: noise behind GELU reaches so much further, in shares of its RMS.
GELU_RMS = 0.652


def site_ratio(sums: Sums, sites: int, held: float = 0.0) -> tuple[float, float]:
    """The multiple of a site's RMS from which on a channel's maximum is an outlier, and the price's part in it.

    Args:
        sums: Of this refresh.
        sites: How many sites there are.
        held: The price's part at the last refresh. It never falls: what is left after shrinking would be cheap again,
            and again, until nothing is left.

    Returns:
        Both infinite and as held for a silent site.
    """
    rms = sums.rms().item()
    if not rms > 0:
        return math.inf, held
    noise = normal_ratio(sums.rows * len(sums.channel_max)) / GELU_RMS
    priced = max(held, priced_limit(sums.channel_max, sums.channel_squares / sums.rows, sites) / rms)
    return max(noise, min(priced, tail_limit(sums.channel_max) / rms)), priced


def tail_limit(channel_max: Tensor) -> float:
    """The largest maximum that the tail of a site's own channels foretells.

    Args:
        channel_max: ``[D]``, non-negative.

    Returns:
        In the units of `channel_max`; infinite for fewer than three channels, which have no tail.
    """
    channels = len(channel_max)
    if channels < 3:
        return math.inf
    upper = max(2, round(UPPER * math.sqrt(channels)))
    lower = min(WIDTH * upper, channels)
    m_U, m_L = channel_max.topk(lower).values[[upper - 1, lower - 1]].tolist()
    if m_L <= 0:
        return m_U  # nearly all channels are silent: those that are not have no tail around them
    return m_U * upper ** (math.log(m_U / m_L) / math.log(lower / upper))


def priced_limit(channel_max: Tensor, energy: Tensor, sites: int) -> float:
    """The range that a site is best brought to at 4 bits, rounding noise against function.

    Args:
        channel_max: ``[D]``, non-negative.
        energy: ``E[x_c^2]``, ``[D]``.
        sites: How many sites there are, whose losses add up in amplitude.

    Returns:
        In the units of `channel_max`, below its largest; 0 for a silent site.
    """
    m, order = channel_max.float().sort(descending=True)
    E = energy.float()[order][m > 0]
    m = m[m > 0]
    if len(m) == 0:
        return 0.0
    noise = len(channel_max) * (2 / LEVELS) ** 2 / 12
    best = sites * (E / m).cumsum(0) / (noise + sites * (E / m.square()).cumsum(0))  # where just so many are shrunk
    following = torch.cat([m[1:], m.new_zeros(1)])
    return best[(best >= following).int().argmax()].item()


def normal_ratio(entries: int) -> float:
    """Largest magnitude over RMS of so many independent normal numbers, which less than one set in 500 exceeds."""
    return math.sqrt(2 * math.log(100 * max(entries, 1)))
