"""Writers: which weight writes the channels of an activation, measured on the activations themselves.

A quantizer sits at the input of a linear layer; its outlier channels are shrunk in the weight that writes them. No
module names are needed to find it, as the operations between the two leave traces:

- identity (a norm before a linear layer): the input equals the norm's output;
- an activation function (fc1 -> fc2): the input agrees with the positive part of the writer's output;
- a gated product (gate, up -> down): it agrees with the positive part of gate times up, and scales with up, which may
  run before or after gate;
- attention averaging (v -> output projection): every channel keeps its mean over the tokens, nearly.

Shapes: N sampled tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.targets.weights import Target

# Correlation from which two activations are taken for one another. The sum of two equal parts has 0.71 with each, which
# is no writer; unrelated ones stay below 0.3 in the models tried. Real writers give 0.85 to 1 entry by entry, and 0.80
# to 0.94 by the means over tokens that attention has weighted.
SAME_ENTRIES = 0.75
SAME_MEANS = 0.75


@dataclass(frozen=True)
class Call:
    """One call of a target's module in a forward pass: sampled rows of its output, and the tensor it read."""

    target: Target
    y_ND: Tensor
    x: Tensor


@dataclass(frozen=True)
class Writer:
    """The weight found, and the calls that read the same tensor when the site averages over tokens (q and k)."""

    target: Target
    operands: tuple[Target, ...] = ()


def find_writer(x_ND: Tensor, calls: list[Call]) -> Writer | None:
    """The latest call whose output accounts for `x`.

    Args:
        x_ND: Sampled rows of a site's activation, the same tokens as in `calls`.
        calls: What ran before, oldest first.

    Returns:
        None where no weight accounts for it: an embedding, a residual sum, grouped-query attention (its values are
        fewer than the channels they write).
    """
    fitting = [i for i, call in enumerate(calls) if call.y_ND.shape == x_ND.shape]
    for i in reversed(fitting):
        y = calls[i].y_ND
        if max(_correlation(x_ND, y), _correlation(x_ND, y.relu())) >= SAME_ENTRIES:
            return Writer(calls[i].target)
        if i - 1 in fitting:
            before = calls[i - 1].y_ND
            products = [(_correlation(x_ND, before.relu() * y), i), (_correlation(x_ND, before * y.relu()), i - 1)]
            fit, linear_factor = max(products)  # the gate may run first or last
            if fit >= SAME_ENTRIES:
                return Writer(calls[linear_factor].target)
    means = [
        (_correlation(x_ND.mean(0), calls[i].y_ND.mean(0)), i) for i in fitting if calls[i].target.kind == "linear"
    ]
    if not means or max(means)[0] < SAME_MEANS:
        return None
    value = calls[max(means)[1]]
    # What reads the tensor that the values are made from, with the same width, is multiplied with or by them.
    operands = tuple(
        c.target for i in fitting if same_tensor((c := calls[i]).x, value.x) and c.target is not value.target
    )
    return Writer(value.target, operands)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Both are one activation. Both must still be held: memory that is free is given to the next tensor."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def version_of(tensor: Tensor) -> int:
    """Grows with every write in place."""
    return 0 if tensor.is_inference() else tensor._version


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return (a @ b / norms).item() if norms > 0 else 0.0
