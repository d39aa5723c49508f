"""Ranges of stacks of matrices (experts), which no method but rounding to nearest works on."""

from __future__ import annotations

import warnings

from s2d.quant.calibration.observe import Job, set_weight_range


def set_stack_ranges(job: Job) -> None:
    """Give every stack's quantizer its range before the rounding begins: methods work on the layers of modules, and
    stacks are rounded to nearest by all of them, which is said.
    """
    stacks = [site for site in job.quantizers if site.summed and site.what == "weight"]
    for site in stacks:
        set_weight_range(site, job.quantizers[site], job.weight(site))
    if stacks and job.method != "rtn":
        more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
        warnings.warn(
            f"{stacks[0].module}{more} hold the matrices of several experts, which are rounded to nearest as they are: "
            f"{job.method} works on the layers of modules",
            stacklevel=2,
        )
