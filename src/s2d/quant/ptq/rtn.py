"""Round to nearest: ranges from observers, weights rounded as they are. The baseline of every comparison."""

from __future__ import annotations

from s2d.quant.calibration import Job, observe
from s2d.quant.observers import weight_range
from s2d.quant.ptq import register
from s2d.quant.sites import weight_name


@register("rtn", "round to nearest: ranges by min-max, percentile or MSE, weights rounded as they are")
def rtn(job: Job) -> None:
    """Activation ranges from one pass of the full-precision model, weight ranges from the weights."""
    observe(job)
    set_weight_ranges(job)


def set_weight_ranges(job: Job) -> None:
    """Give every weight quantizer the range that its site's observer finds in the weight."""
    for site, quantizer in job.quantizers.items():
        if site.what != "weight" or quantizer.dynamic:
            continue
        weight = job.model.get_parameter(weight_name(job.model, site)).detach()
        rows = weight if site.granularity == "channel" else weight.reshape(1, -1)
        lo, hi = weight_range(rows, site.observer, quantizer.format, name=site.name)
        quantizer.set_range(lo.reshape(quantizer.scale.shape), hi.reshape(quantizer.scale.shape))
