"""Copies of a model that hold no second set of weights."""

from __future__ import annotations

import copy

from torch import nn


def shared_copy(model: nn.Module) -> nn.Module:
    """The model's modules again, on the same memory: in evaluation mode, and no parameter wants a gradient.

    Modules of the copy may be replaced, and parameters set anew; writing into one of its tensors would write into the
    model's. Parameters that several modules share are shared in the copy too.
    """
    same: dict[int, object] = {id(each): each for each in model.buffers()}
    same |= {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, same).eval()
