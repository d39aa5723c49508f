"""Block-AP: after a rounding, each block's weights and steps are trained on the grid until its output is what it was.

The first phase of EfficientQAT (arXiv 2407.11062, section 3.2), the successor of block reconstruction by AdaRound
(BRECQ, arXiv 2102.05426): not the choice between two neighbours is learned but the weights themselves, with
straight-through gradients, so a weight may move as far as it has to. Here it begins where another method ends, and each
entry of a block's input is that of the quantized or of the full-precision stream, as in QDrop (arXiv 2203.05740):

    loss = mean over tokens |block(x) - block_fp(x_fp)|^2,    weights Q(W) with the gradient of LSQ

W starts on its grid, in the middle between two changes, so a weight changes its code only where many steps agree.

Differences: `STEPS` steps, each on one calibration batch (EfficientQAT: two epochs over 4,096 texts); norms and biases
stay, and so do weights outside the blocks, ranges of tokens, groups and blocks, and everything that is no integer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2d.quant.calibration.corrections import write
from s2d.quant.calibration.observe import Job
from s2d.quant.calibration.readings import layers_of
from s2d.quant.calibration.walk import Block, walk
from s2d.quant.numerics.lsq import LearnedQuantizer
from s2d.quant.numerics.quantizer import WeightQuantizer
from s2d.quant.ptq import register
from s2d.quant.ptq.adaround import STEP_LR, descend, replaced

STEPS = 50
TRAVEL = 1.0  # how far Adam can move a weight in all steps, in steps of its grid


class TrainedWeight(LearnedQuantizer, WeightQuantizer):
    """Stands for a weight's quantizer while the weight (float32) and its range are trained."""

    def __init__(self, plain: WeightQuantizer, weight: Tensor) -> None:
        """For a quantizer that has its range, and the weight where the training begins."""
        LearnedQuantizer.__init__(self, plain)
        self.enabled = True
        self.weight = nn.Parameter(weight.detach().float().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight; what is passed in does not matter."""
        return self.fake_quantize(self.weight).to(weight.dtype)


@register("block-ap", f"Block-AP: weights and steps trained block by block, {STEPS} steps each", stage="correction")
def block_ap(job: Job) -> None:
    """Train every block that has weights on an integer grid."""
    for block in walk(job, reference=True, kept=True):
        train_block(job, block, STEPS)


def train_block(job: Job, block: Block, steps: int) -> None:
    """Train a block's weights and ranges, in place."""
    layers = [
        layer
        for layer in layers_of(job, block.quantizers)
        if LearnedQuantizer.suits(layer.quantizer) and not layer.shared_with
    ]
    if not layers:
        return
    trained = {layer: TrainedWeight(layer.quantizer, layer.weight) for layer in layers}
    groups = [
        {"params": [module.weight], "lr": 2 * TRAVEL * float(module.scale.mean()) / steps}
        for module in trained.values()
    ]
    own = [p for module in trained.values() for p in (module.log_step, module.offset) if p is not None]
    if job.protocol == "own":
        groups.append({"params": own, "lr": STEP_LR})
    with replaced(job, block, trained) as ranges:
        descend(job, block, groups, ranges, steps)
    for layer, module in trained.items():
        done = module.plain()
        with torch.no_grad():
            layer.quantizer.scale.copy_(done.scale)
            layer.quantizer.zero_point.copy_(done.zero_point)
        write(layer, module.weight.detach())
