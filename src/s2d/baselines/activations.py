"""The activations of a training step, with their graph, for penalties on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.blocks import blocks_of
from s2d.models.masks import token_mask
from s2d.models.running import real_tokens
from s2d.targets.weights import find_targets

Place: TypeAlias = Literal["blocks", "inputs"]
PLACES: tuple[Place, ...] = ("blocks", "inputs")


class Activations:
    """Records the activations at some places of a model in training mode, without padding.

    Places are ``"blocks"``, the outputs of the transformer blocks, or ``"inputs"``, the inputs of the Linears inside
    blocks, where quantizers will act. Modules that read the same tensor share a place.
    """

    def __init__(self, model: nn.Module, place: Place) -> None:
        """Put hooks in."""
        self._seen: list[Tensor] = []
        self._last: Tensor | None = None
        self._stack = ExitStack()
        self._mask = self._stack.enter_context(token_mask(model))
        blocks = blocks_of(model)
        if not blocks:
            self.remove()
            raise InputError(f"{type(model).__name__} has no transformer blocks whose activations could be watched")
        if place == "blocks":
            for block in blocks.values():
                self._keep(block.register_forward_hook(self._output))
        else:
            inside = tuple(f"{name}." for name in blocks)
            for target in find_targets(model, kinds=("linear",)):
                if target.module_name.startswith(inside) and isinstance(target.module, nn.Linear):
                    self._keep(target.module.register_forward_pre_hook(self._input))

    def _keep(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._note(module, output if isinstance(output, Tensor) else output[0])

    def _input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0] is not self._last:  # q, k and v read the same
            self._note(module, args[0])

    def _note(self, module: nn.Module, x: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            self._last = x
            self._seen.append(real_tokens(x, self._mask(), "input").flatten(0, -2))

    def mean(self, penalty: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean over places of a penalty of their values ``[N, D]``, in single precision. It clears the records."""
        seen, self._seen, self._last = self._seen, [], None
        if not seen:
            return torch.zeros(())
        with torch.autocast(seen[0].device.type, enabled=False):
            return torch.stack([penalty(x.float()) for x in seen]).mean()

    def remove(self) -> None:
        """Take the hooks out."""
        self._stack.close()
        self._seen, self._last = [], None
