"""What a norm multiplies by: its weight w in most models, 1 + w in others (Gemma), found by asking the module.

Shapes: N rows, D channels.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from s2d.targets.weights import Target

# Torch's own norms multiply by the weight.
_PLAIN = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)
_ROWS = 4
_EXACT = 1e-3


def gain_offset(target: Target) -> float:
    """The c of a norm whose output is ``normalized * (c + w) + bias``.

    The module is run on random rows with gains 0, 1 and 2 in place of its own, in a shallow copy.

    Returns:
        0 for other weights and where the module cannot be run alone; NaN where its output is not linear in w.
    """
    if target.kind != "norm" or type(target.module).forward in [plain.forward for plain in _PLAIN]:
        return 0.0
    weight = target.parameter
    shapes = [(_ROWS, weight.numel()), (_ROWS, weight.numel(), 2, 2)]
    for shape in shapes:
        try:
            with torch.no_grad():
                return _offset(target, shape)
        except Exception:  # a module that wants something else than one tensor may fail in any way
            continue
    return 0.0


def _offset(target: Target, shape: tuple[int, ...]) -> float:
    weight = target.parameter
    place = {"device": weight.device, "dtype": weight.dtype}
    # Drawn on the CPU from a generator of its own: the training's random numbers stay what they were.
    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(**place)

    def output(gain: float) -> Tensor:
        probe = copy.copy(target.module)
        probe._parameters = {
            name: None if each is None else nn.Parameter(torch.zeros(each.shape, **place), requires_grad=False)
            for name, each in target.module._parameters.items()
        }
        probe._parameters[target.parameter_name] = nn.Parameter(torch.full(weight.shape, gain, **place))
        object.__setattr__(probe, "training", False)  # no running statistics
        return probe.forward(x).double()

    at_0, at_1, at_2 = output(0.0), output(1.0), output(2.0)
    normalized = at_1 - at_0
    size = torch.linalg.vector_norm(normalized)
    rough = max(_EXACT, 4 * torch.finfo(weight.dtype).eps)
    if size == 0 or not torch.linalg.vector_norm(at_2 - at_1 - normalized) <= rough * size:
        return math.nan
    offset = ((at_0 * normalized).sum() / size.square()).item()
    if not torch.linalg.vector_norm(at_0 - offset * normalized) <= rough * max(1.0, abs(offset)) * size:
        return math.nan
    return float(round(offset)) if abs(offset - round(offset)) <= rough else offset
