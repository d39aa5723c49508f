"""QwT: a linear layer beside every block makes up for what rounding does to it, by least squares.

Fu et al., "Quantization without Tears", CVPR 2025, arXiv 2411.13918. With X the inputs of a quantized block (with those
before it already compensated), Y its outputs in the full-precision model and Y^ its own, N tokens,

    y = block(x) + C x + c,    [C c]^T = (X^T X + lambda I)^-1 X^T (Y - Y^),    X with a column of ones for c

C and c stay in the model's own precision: D^2 weights a block beside 12 D^2 of its own, and as many products a token.

Where this differs from the paper: lambda is a share of the mean squared input, times N, as in `erq`; with it a
few images are enough. Where a system cannot be solved, or a block's output has another shape than its input (a merging
of tokens), the block gets no layer, and a warning says so.

Cost: three passes of every block in each precision, and a copy of the model while it works. When not to use it: when
nothing may be added at run time; no runtime's file of plain Linears holds it.

Shapes: N tokens, D features.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from s2d.models.running import evaluating, real_tokens
from s2d.quant.calibration.corrections import RIDGE, Moments, ridge_solve
from s2d.quant.calibration.observe import Job
from s2d.quant.calibration.walk import Block, walk
from s2d.quant.modules.online import hidden_states, make_online_block
from s2d.quant.numerics.quantizer import switched_on
from s2d.quant.ptq import register


def with_ones(x_ND: Tensor) -> Tensor:
    """``[N, D + 1]``: the inputs, and a column of ones for the bias."""
    return torch.cat([x_ND, x_ND.new_ones(len(x_ND), 1)], dim=1)


def compensation(moments: Moments, ridge: float = RIDGE) -> tuple[Tensor, Tensor] | None:
    """C ``[D, D]`` and c ``[D]`` (float64) from the sums over tokens; None where the system cannot be solved.

    Args:
        moments: ``square`` of `with_ones` of the inputs, ``cross`` of these with the errors ``Y - Y^``.
        ridge: lambda / N, relative to the mean of the diagonal of the squares.
    """
    moments.settle()
    assert moments.square is not None and moments.cross is not None
    solved = ridge_solve(moments.square / moments.count, moments.cross / moments.count, ridge)
    return None if solved is None else (solved[:-1].T.contiguous(), solved[-1])


@register("qwt", "QwT: a linear layer beside each block makes up for its rounding", stage="correction", passes=2.0)
def qwt(job: Job) -> None:
    """Compensate every block, in order."""
    for block in walk(job, reference=True):
        moments = errors_of(block)
        found = None if moments is None else compensation(moments)
        if found is None:
            warnings.warn(f"qwt: {block.name} {_UNSOLVED if moments else _RESHAPED}", stacklevel=2)
            continue
        like = next(block.module.parameters())
        online = make_online_block(block.module, block.name)
        online.compensation, online.compensation_bias = (value.to(like) for value in found)


_UNSOLVED = "has inputs whose second moment cannot be factored; it gets no compensation"
_RESHAPED = "gives another shape than it takes; it gets no compensation"


def errors_of(block: Block) -> Moments | None:
    """Sums over all real tokens: inputs with themselves, and with the error of the quantized block's output.

    Returns:
        None where the block's output has another shape than its input.
    """
    assert block.outputs is not None
    moments = Moments(block.name)
    with switched_on(block.quantizers.values()), evaluating(block.module):
        for index, output in enumerate(block.stream(block.inputs)):
            call, mask = block.inputs[index], block.mask_of(index)
            hidden = hidden_states(block.module, call.args, call.kwargs)
            if hidden.shape != output.shape:
                return None
            x, wanted, got = (
                real_tokens(y, mask, "input").flatten(0, -2) for y in (hidden, block.outputs[index], output)
            )
            moments.take(with_ones(x.float()), (wanted - got).float())
    return moments
