"""Finding attention in a forward pass: which module computes it, and whether it is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from s2d.quant.modules.attention import (
    BADDBMMS,
    MATMULS,
    MULTI_HEAD,
    SDPA,
    SOFTMAXES,
    inside_quantized_attention,
)

_PRODUCTS = frozenset((*MATMULS, *BADDBMMS, torch.einsum))
_SOFTMAXES = frozenset(SOFTMAXES)
_FUSED = frozenset((SDPA, MULTI_HEAD))


class AttentionWatch(TorchFunctionMode):
    """Credits attention calls to the innermost module that is running.

    Attributes:
        found: The modules that computed attention, in order of first call.
        entered: The modules that ran at all.
    """

    def __init__(self, running: list[nn.Module]) -> None:
        """Read who is running from ``running``, the innermost last."""
        super().__init__()
        self.running = running
        self.found: dict[nn.Module, None] = {}
        self.entered: dict[nn.Module, None] = {}
        # Per module, how far it is through product -> softmax -> product.
        self.progress: dict[nn.Module, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.running and not inside_quantized_attention():
            module = self.running[-1]
            if func in _FUSED:
                self.found[module] = None
            elif func in _SOFTMAXES:
                self.progress[module] = 2 if self.progress.get(module) == 1 else 0
            elif func in _PRODUCTS:
                if self.progress.get(module) == 2:
                    self.found[module] = None
                self.progress[module] = 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watch_attention(model: nn.Module) -> Iterator[AttentionWatch]:
    """While active, note which modules of ``model`` run, and which of them compute attention unquantized."""
    members = set(model.modules())
    running: list[nn.Module] = []

    # Leaves of torch.nn (Softmax, Dropout) act for the module that calls them.
    def counts(module: nn.Module) -> bool:
        own = not type(module).__module__.startswith("torch.nn.modules") or isinstance(module, nn.MultiheadAttention)
        return own and module in members

    def enter(module: nn.Module, args: Any) -> None:
        if counts(module):
            watch.entered[module] = None
            running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if counts(module) and running:
            watch.progress.pop(module, None)
            running.pop()

    watch = AttentionWatch(running)
    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()
