"""The activations of a training step, with their graph, for penalties on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.blocks import blocks_of
from s2d.models.masks import token_mask
from s2d.models.running import main_output, real_tokens
from s2d.models.tracing import trace_call
from s2d.targets.weights import find_targets

Place: TypeAlias = Literal["blocks", "inputs"]
PLACES: tuple[Place, ...] = ("blocks", "inputs")


class Activations:
    """Records the activations at some places of a model in training mode, without padding.

    Places are ``"blocks"``, the outputs of the transformer blocks, or ``"inputs"``, the inputs of the Linears inside
    blocks, where quantizers will act. Modules that read the same tensor share a place. Blocks and masks are those of a
    traced forward: the first one of the training.
    """

    def __init__(self, model: nn.Module, place: Place) -> None:
        """Wait for the first forward, which raises InputError if nothing in the model repeats.

        Raises:
            InputError: No weight of the model is trained.
        """
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(f"no weight of {type(model).__name__} is trained, so a penalty would change none")
        self._place: Place = place
        self._seen: list[Tensor] = []
        self._last: Tensor | None = None
        self._stack = ExitStack()
        # This hook comes before those of the masks, which read the batch with what the graph says.
        look: Any = torch.compiler.disable(self._look)  # torch's types take it for a decorator with arguments
        self._begin = model.register_forward_pre_hook(look, with_kwargs=True)
        self._stack.callback(self._begin.remove)
        self._mask = self._stack.enter_context(token_mask(model))

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace the coming forward and put hooks in."""
        self._begin.remove()
        graph = trace_call(model, args, kwargs)
        blocks = blocks_of(model, graph)
        if not blocks:
            raise InputError(f"{type(model).__name__} has no blocks that repeat, whose activations could be watched")
        self._mask.learn(graph)
        if self._place == "blocks":
            for name, block in blocks.items():
                self._keep(block.register_forward_hook(partial(self._output, name)))
            return
        inside = tuple(f"{name}." for name in blocks)
        for target in find_targets(model, kinds=("linear",)):
            if target.module_name.startswith(inside) and isinstance(target.module, nn.Linear):
                self._keep(target.module.register_forward_pre_hook(partial(self._input, target.module_name)))

    def _keep(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._stack.callback(handle.remove)

    def _output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._note(module, main_output(output), self._mask(name, "output"))

    def _input(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0] is not self._last:  # q, k and v read the same
            self._note(module, args[0], self._mask(name))

    def _note(self, module: nn.Module, x: Tensor, real: Tensor | None) -> None:
        if module.training and torch.is_grad_enabled():
            self._last = x
            self._seen.append(real_tokens(x, real, "input").flatten(0, -2))

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
