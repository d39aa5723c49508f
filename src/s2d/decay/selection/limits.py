"""Where the outliers of a site begin, when no fixed ratio is given: where its own channels stop to foretell them.

A heavy tail of channel maxima is function: behind GELU hundreds of channels of every block stand above 8 times the RMS,
and no training gets over their loss. One channel at twice the next is an outlier, which training learns to do without.
So no fixed ratio is right for both, and the limit is asked of the site itself. Its D channel maxima, largest first, are
m_1, m_2, ...; from two ranks a < b below the very top follows the index of their tail,

    xi = ln(m_a / m_b) / ln(b / a),

and from that what the largest of them should be, ``m_a a^xi`` (a Pareto tail's quantile 1/D; Hill, Annals of Statistics
1975; Weissman, JASA 1978). What exceeds it is none of this tail. It must also exceed what normal numbers do: a site
that looks like noise has no outliers. The scale of a site and the order of its channels make no difference.

Nothing here was fitted to a model; docs/results/vision.md has what was measured, and what was tried and left out.
"""

from __future__ import annotations

import math

from torch import Tensor

from s2d.spectral.statistics import Sums

# The tail's ranks: 0.4 and 2 times the root of the channels (8 and 40 of 384). A root of them is usual for Hill's
# estimate; the upper rank leaves the outliers themselves out.
UPPER, WIDTH = 0.4, 5


def site_ratio(sums: Sums) -> float:
    """The multiple of a site's RMS from which on a channel's maximum is an outlier; infinite for a silent site."""
    rms = sums.rms().item()
    if not rms > 0:
        return math.inf
    return max(normal_ratio(sums.rows * len(sums.channel_max)), tail_limit(sums.channel_max) / rms)


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


def normal_ratio(entries: int) -> float:
    """Largest magnitude over RMS of so many independent normal numbers, which less than one set in 500 exceeds."""
    return math.sqrt(2 * math.log(100 * max(entries, 1)))
