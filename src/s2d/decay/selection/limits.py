"""Where the outliers of a site begin, when no fixed ratio is given: well above what its own channels do.

No fixed ratio is right for two sites. Behind GELU hundreds of channels of every block stand above 8 times the RMS: a
heavy tail, which is function, and which no training gets over. In front of it one channel stands at twice the next: an
outlier, which training learns to do without. So the limit is relative to the site's own channel maxima. Let q be the
largest of them beyond the top 2 %; a channel is an outlier above 1.5 q, if that is also above 8 times the RMS, which
4 bits still hold. A site without such a channel is left alone, whatever its tail; its scale and the order of its
channels make no difference.

The three numbers were chosen on one bed (DINOv2-small) and confirmed on another (MiniLM); docs/results/vision.md has
what was measured, and two rules without such numbers that did less: a limit foretold by the index of the tail, and a
price of rounding noise against function.
"""

from __future__ import annotations

import math

from s2d.spectral.statistics import Sums

# Largest activation over RMS that needs no shrinking.
LEAST = 8.0
# The share of the channels that may be outliers, and how far one must stand above all others.
SHARE, GAP = 0.02, 1.5


def site_ratio(sums: Sums) -> float:
    """The multiple of a site's RMS from which on a channel's maximum is an outlier; infinite for a silent site."""
    rms = sums.rms().item()
    if not rms > 0:
        return math.inf
    beyond = min(math.ceil(SHARE * len(sums.channel_max)), len(sums.channel_max) - 1)
    return max(LEAST, GAP * sums.channel_max.topk(beyond + 1).values[-1].item() / rms)
