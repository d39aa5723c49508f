"""Copies of a model that hold no second set of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules on the same memory, in evaluation mode and without gradients.

    Modules and parameters of the copy may be replaced; a write into one of its tensors changes the model's. Parameters
    that several modules share are shared in the copy too.
    """
    same: dict[int, object] = {id(each): each for each in model.buffers()}
    same |= {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, same).eval()


def in_float32(
    model: nn.Module, example: Mapping[str, Tensor], notes: Callable[[str], None] = lambda text: None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of half or double precision, and its inputs, in float32, the type in which CPU runtimes compute.

    Weights of half precision are the same numbers in float32, and so are their codes.

    Args:
        model: Left as it is; returned itself if all of it is float32.
        example: A batch of keyword inputs.
        notes: Receives a message if a conversion is needed.

    Returns:
        The model or a copy, and the inputs.
    """
    floats = {each.dtype for each in (*model.parameters(), *model.buffers()) if each.is_floating_point()}
    if floats <= {torch.float32}:
        return model, dict(example)
    names = ", ".join(sorted(str(each).removeprefix("torch.") for each in floats - {torch.float32}))
    notes(f"{names} is written as float32")
    made = copy.deepcopy(model).eval().float()
    return made, {name: value.float() if value.is_floating_point() else value for name, value in example.items()}
