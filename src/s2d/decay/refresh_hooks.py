"""Global hooks on module calls, which leave nothing in the modules. Compiled code is switched off meanwhile.

Hooks stored in a module are copied, pickled and averaged with it. Global hooks, which see every module of the process,
are not. Each looks up whether the called module is watched; a copy of a watched module is not.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.modules import module as of_all_modules

Before: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class Watch:
    """Observes the calls of some modules until it is closed. Tracers do not see it."""

    _numbers = itertools.count()

    def __init__(
        self,
        before: Iterable[nn.Module],
        enter: Before,
        after: Mapping[nn.Module, After],
        leave: Callable[[nn.Module], None],
        late: Iterable[nn.Module] = (),
    ) -> None:
        """Begin.

        Args:
            before: Modules whose arguments are passed to `enter` before they run.
            enter: Called with module, positional and named arguments.
            after: Called when a module has run, with its output as well. FSDP2 has not yet freed the gathered weights
                at that time.
            leave: Called with each module of `before` when it has run.
            late: Modules of `after` whose own hooks must run first, as they finish the output (tensor parallelism).
                Each of these gets a hook of its own.
        """
        # The hooks also fire for the wrapper of a compiled module, which is not watched.
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        self._before, self._enter, self._after, self._leave = set(before), enter, dict(after), leave
        # torch passes named arguments only to hooks that the module itself lists. torch's hook numbers could collide
        # once a copy of the module is loaded elsewhere; this key cannot.
        self._key: Any = f"s2d-{next(self._numbers)}"
        for module in self._before:
            module._forward_pre_hooks_with_kwargs[self._key] = True
        of_all_modules._global_forward_pre_hooks[self._key] = self._entering
        own = {module: self._after.pop(module) for module in late}

        def leaving_own(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.compiler.is_compiling() and module in own:
                own[module](module, args, kwargs, output)

        self._leaving_handles = [of_all_modules.register_module_forward_hook(self._leaving, with_kwargs=True)]
        self._leaving_handles += [module.register_forward_hook(leaving_own, with_kwargs=True) for module in own]

    def _entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if not torch.compiler.is_compiling() and kwargs is not None and module in self._before:
            self._enter(module, args, kwargs)

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module in self._after:
            self._after[module](module, args, kwargs, output)
        if module in self._before:
            self._leave(module)

    def close(self) -> None:
        """Remove all hooks."""
        of_all_modules._global_forward_pre_hooks.pop(self._key, None)
        for handle in self._leaving_handles:
            handle.remove()
        for module in self._before:
            module._forward_pre_hooks_with_kwargs.pop(self._key, None)
        self._before, self._after = set(), {}


def is_transformed(*tensors: Tensor) -> bool:
    """Whether tensors have no ordinary values: under ``torch.func``, in inference mode, fake or traced."""
    return (
        torch._C._functorch.maybe_current_level() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch.is_inference_mode_enabled()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or any(tensor.is_inference() or tensor.is_meta or is_fake(tensor) for tensor in tensors)
    )


def is_recomputed() -> bool:
    """Whether this runs inside a backward pass, as the forwards that activation checkpointing repeats do."""
    return torch._C._current_graph_task_id() != -1


class Eager:
    """While any instance is active, compiled code is not used: it would not run hooks that were added later.

    Instances may end in another order than they began, which torch's own stance does not allow.
    """

    _active = 0
    _stance: Any = None

    def __init__(self) -> None:
        """Begin; the earlier setting is restored when the last instance ends."""
        self._on = True
        if Eager._active == 0:
            Eager._stance = torch.compiler.set_stance("force_eager")
        Eager._active += 1

    def close(self) -> None:
        """End; further calls have no effect."""
        if not self._on:
            return
        self._on = False
        Eager._active -= 1
        if Eager._active == 0:
            Eager._stance.__exit__(None, None, None)
            Eager._stance = None
