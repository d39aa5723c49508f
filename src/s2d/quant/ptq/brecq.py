"""Block reconstruction from ERQ's start: corrected weights, whose rounding is learned with the activations' steps.

BRECQ (arXiv 2102.05426) with QDrop's inputs (arXiv 2203.05740) and AdaRound's soft rounding, as in `adaround`; but
each block starts where ERQ (arXiv 2407.06794) rounds its weights:

1. norms reparametrised, log-sqrt2 behind the softmax, ranges the best of some percentiles (`repq`);
2. weights and biases corrected for the rounding of their inputs (`erq`, Aqer);
3. `STEPS` steps of reconstruction, in place of ERQ's rounding (Wqer).
"""

from __future__ import annotations

from s2d.quant.calibration.observe import Job
from s2d.quant.calibration.walk import walk
from s2d.quant.ptq import register
from s2d.quant.ptq.adaround import learn
from s2d.quant.ptq.erq import corrected_layers, round_outside
from s2d.quant.ptq.repq import begin

STEPS = 100


@register("brecq", f"block reconstruction: rounding and steps learned from ERQ's start, {STEPS} steps a block")
def brecq(job: Job) -> None:
    """Reconstruct every block; weights outside the blocks as in ERQ."""
    begin(job)
    for block in walk(job, reference=True):
        for layer, corrected in corrected_layers(job, block):
            corrected.keep_bias(layer)
        learn(job, block, STEPS)
    round_outside(job)
