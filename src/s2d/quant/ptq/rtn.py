"""Round to nearest: ranges from observers, weights rounded as they are. The baseline of every comparison."""

from __future__ import annotations

from s2d.quant.calibration.observe import Job, observe, set_weight_ranges
from s2d.quant.ptq import register


@register("rtn", "round to nearest: ranges by min-max, percentile or MSE, weights rounded as they are", shares=True)
def rtn(job: Job) -> None:
    """Activation ranges from one pass of the full-precision model, weight ranges from the weights."""
    observe(job)
    set_weight_ranges(job)
