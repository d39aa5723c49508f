"""Selection: which components of a model's weights make outliers.

Three metrics define the components in different ways. All see the same forward passes and return `Components`, which
`s2d.decay` then shrinks.

- ``"weight"``: singular components of W, selected by PCDR (the selection rule of the paper, arXiv 2602.14432).
- ``"data"``: components of W C^(1/2), C the second moment of the inputs: principal directions u of the outputs.
- ``"site"``: where a quantizer will sit (inputs of linear layers, attention's operands), the channels whose maximum
  exceeds a multiple of the site's RMS. Single channels stretch a per-tensor grid, so the directions are the coordinate
  axes e_j. The decay shrinks what *writes* channel j: a row of the linear layer before, or a norm's gain (diag(gamma)
  has the singular values |gamma_j| and the singular vectors e_j).

Norm gains have coordinate components in every metric. Ranks may see different data or hold different parts of a weight.
Each metric sums over ranks, so all ranks select the same components.
"""

from __future__ import annotations

from s2d.decay.selection.base import Components, Finding, Metric
from s2d.decay.selection.data import DataMetric
from s2d.decay.selection.site import SiteMetric
from s2d.decay.selection.weight import WeightMetric

__all__ = [
    "METRICS",
    "Components",
    "DataMetric",
    "Finding",
    "Metric",
    "SiteMetric",
    "WeightMetric",
]

METRICS: dict[str, type[Metric]] = {"site": SiteMetric, "data": DataMetric, "weight": WeightMetric}
