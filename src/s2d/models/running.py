"""One forward of any model: the call, the real tokens of an activation, the main output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d.errors import InputError, first_line

What = Literal["weight", "input", "q", "k", "probs", "v"]
OPERANDS: tuple[What, ...] = ("q", "k", "probs", "v")


def run(model: nn.Module, batch: Any, index: int = 0) -> None:
    """One forward of a batch: ``model(**dict)``, ``model(tensor)`` or ``model(*tuple)``, without gradients.

    Raises:
        InputError: The batch does not fit the model; the model's own words are passed on.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {str(key): move(value) for key, value in batch.items()}
    elif isinstance(batch, Tensor):
        args = (move(batch),)
    elif isinstance(batch, (tuple, list)):
        args = tuple(move(value) for value in batch)
    else:
        raise InputError(f"calibration batch {index} is a {type(batch).__name__}; give a dict, a tensor or a tuple")
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise InputError(
            f"calibration batch {index} does not fit {type(model).__name__}: {first_line(error)}"
        ) from error


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors made here are ordinary ones, which may be trained later, though the caller is in inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The whole model in evaluation mode; afterwards every module is back in its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def real_tokens(x: Tensor, mask: Tensor | None, what: What) -> Tensor:
    """The vectors of ``x`` that belong to real tokens; all of ``x`` when the mask's layout is not found in it.

    Args:
        x: Inputs ``[B, T, D]``, ``[T, B, D]`` or ``[B*T, D]``; attention operands ``[B, H, T, D]``, ``[B*H, T, D]`` or
            ``[B, T, D]`` (the probabilities have keys for D; columns of padded keys are zero and need no mask).
        mask: ``[B, T]`` boolean, or None.
        what: The site's kind, which says how to read the shape.
    """
    if mask is None:
        return x
    batch, tokens = mask.shape
    if what in OPERANDS:
        if x.ndim == 4 and (x.shape[0], x.shape[2]) == (batch, tokens):
            return x.transpose(1, 2)[mask]
        if x.ndim == 3 and x.shape[1] == tokens and x.shape[0] % batch == 0:
            return x[mask.repeat_interleave(x.shape[0] // batch, dim=0)]
        return x
    if x.shape[:2] == (batch, tokens):
        return x[mask]
    if x.shape[:2] == (tokens, batch):
        return x.transpose(0, 1)[mask]
    if x.ndim == 2 and x.shape[0] == batch * tokens:
        return x[mask.flatten()]
    return x


_OUTPUTS = ("logits", "last_hidden_state", "pooler_output")


def main_output(output: Any) -> Tensor:
    """The main tensor of a module's output."""
    for name in _OUTPUTS:
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output
