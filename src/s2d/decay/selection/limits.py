"""The limit above which a channel of a site is an outlier, when no fixed ratio is given.

No fixed ratio fits all sites. After GELU, hundreds of channels of every block exceed 8 times the RMS. This heavy tail
is part of the function, and training cannot remove it. Before GELU, one channel is twice as large as the next. This is
an outlier, and training can remove it. So the limit is relative to the site's own channel maxima. Let q be the largest
of them beyond the top 2 %. A channel is an outlier above 1.5 q, if that is also above 8 times the RMS, which 4 bits can
still represent. A site without such a channel is left unchanged, whatever its tail. The scale of the site and the order
of its channels make no difference.

The three numbers were chosen on one model (DINOv2-small) and confirmed on another (MiniLM). docs/results/vision.md has
the measurements. It also has two rules without such numbers, which did worse: a limit predicted from the tail index,
and a trade-off of rounding noise against function.
"""

from __future__ import annotations

import math

from s2d.spectral.statistics import Sums

# Largest activation over RMS that needs no shrinking.
LEAST = 8.0
# The share of the channels that may be outliers, and the factor by which one must exceed all others.
SHARE, GAP = 0.02, 1.5


def site_ratio(sums: Sums) -> float:
    """The multiple of a site's RMS above which a channel's maximum is an outlier; infinite for an all-zero site."""
    rms = sums.rms().item()
    if not rms > 0:
        return math.inf
    beyond = min(math.ceil(SHARE * len(sums.channel_max)), len(sums.channel_max) - 1)
    return max(LEAST, GAP * sums.channel_max.topk(beyond + 1).values[-1].item() / rms)
