"""Seeing the calls of modules without leaving anything in them, and keeping compiled code off meanwhile.

Hooks that sit in a module are copied, pickled and averaged with it. Those that see every module of the process are not:
each looks up whether the module called is one to watch, and a copy of that module is another one.
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
    """Sees the calls of some modules until it is closed. Tracers do not see it."""

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
            before: Modules whose arguments are shown to `enter` before they run.
            enter: Given module, positional and named arguments.
            after: What to do when a module has run; given its output as well. Wrappers that take gathered weights away
                after a forward (FSDP2) have not done so yet.
            leave: Given each module of `before` when it has run.
            late: Those of `after` whose own hooks come first, as they finish the output (tensor parallelism). These get
                a hook of their own.
        """
        # They fire once more for the wrapper of a compiled module, which is none of those watched.
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        self._before, self._enter, self._after, self._leave = set(before), enter, dict(after), leave
        # torch shows named arguments only to hooks that the module itself lists. A number of torch's could be that of
        # another hook once a copy of the module is loaded elsewhere; this one is nobody's.
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
        """See nothing any more."""
        of_all_modules._global_forward_pre_hooks.pop(self._key, None)
        for handle in self._leaving_handles:
            handle.remove()
        for module in self._before:
            module._forward_pre_hooks_with_kwargs.pop(self._key, None)
        self._before, self._after = set(), {}


def is_transformed(*tensors: Tensor) -> bool:
    """Tensors without values of their own: under ``torch.func``, in inference mode, faked or traced."""
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
    """While any of these is on, compiled code is not used: it would not run hooks that were added later.

    They may end in another order than they began, which torch's own stance does not allow for.
    """

    _active = 0
    _stance: Any = None

    def __init__(self) -> None:
        """Begin; what was set before comes back when the last one ends."""
        self._on = True
        if Eager._active == 0:
            Eager._stance = torch.compiler.set_stance("force_eager")
        Eager._active += 1

    def close(self) -> None:
        """End; once is enough."""
        if not self._on:
            return
        self._on = False
        Eager._active -= 1
        if Eager._active == 0:
            Eager._stance.__exit__(None, None, None)
            Eager._stance = None
