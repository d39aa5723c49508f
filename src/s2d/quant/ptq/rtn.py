"""Round to nearest: ranges from observers, weights rounded as they are. The baseline of every comparison."""

from __future__ import annotations

from torch import Tensor

from s2d.quant.calibration import Job, observe
from s2d.quant.observers import weight_range
from s2d.quant.ptq import register
from s2d.quant.quantizer import Quantizer
from s2d.quant.sites import Site


@register("rtn", "round to nearest: ranges by min-max, percentile or MSE, weights rounded as they are", shares=True)
def rtn(job: Job) -> None:
    """Activation ranges from one pass of the full-precision model, weight ranges from the weights."""
    observe(job)
    set_weight_ranges(job)


def least_error(job: Job) -> None:
    """For transforms, and GPTQ: ranges whose observer nobody named are those of least squared error.

    Their papers leave activations whole or round to ranges found anew for each token, and most of them search how far
    to clip weights. Min-max over all calibration data, the default of ``rtn``, is no part of them and lets a single
    extreme decide. Not under the unified protocol.
    """
    if job.protocol == "own":
        job.published = "mse"


def set_weight_ranges(job: Job) -> None:
    """Give every weight quantizer the range that its site's observer finds in the weight."""
    for site, quantizer in job.quantizers.items():
        if site.what == "weight":
            set_weight_range(job.observed(site), quantizer, job.weight(site))


def set_weight_range(site: Site, quantizer: Quantizer, weight: Tensor) -> None:
    """Give a weight quantizer the range that its site's observer finds in ``weight`` (``[out, in]`` or a kernel)."""
    if quantizer.dynamic:
        return
    rows = weight.flatten(1)
    if site.granularity == "group":
        rows = rows.reshape(-1, site.group)
    elif site.granularity != "channel":
        rows = rows.reshape(1, -1)
    lo, hi = weight_range(rows, site.observer, quantizer.format, name=site.name)
    quantizer.set_range(lo.reshape(quantizer.scale.shape), hi.reshape(quantizer.scale.shape))
