"""One forward under a dispatch mode, which sees every operation whoever calls it: `trace(model, batch) -> Graph`.

Left as it was found: state dict, buffers, random state, training modes, caches' settings, torch's own fast path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from s2d.errors import InputError, first_line
from s2d.models.graph import Graph
from s2d.models.recording import Tracer

ROWS = 2


def trace(model: nn.Module, batch: Any) -> Graph:
    """The graph of a model's use of its weights, from one forward of two rows of a batch.

    Wrappers (`DistributedDataParallel`, `torch.compile`) are looked through; names are those of the module inside.

    Args:
        model: Any module. It is left as it was.
        batch: A dict of keyword arguments, a tensor, or a tuple of positional arguments, as the model takes them.

    Raises:
        InputError: The model cannot run this batch; the line names the module and the input.
    """
    model = unwrapped(model)
    return trace_call(model, *_arguments(batch, _device_of(model)))


def trace_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, as_it_trains: bool = False
) -> Graph:
    """As `trace`, for a coming call of a model or of one of its modules.

    Args:
        module: What is called.
        args: Its arguments. They are not changed.
        kwargs: Its named arguments.
        as_it_trains: The whole batch, with all modules in the modes that they are in: what routing and branches of
            training leave out of two rows in evaluation is in it.

    Raises:
        InputError: As `trace`.
    """
    with torch.no_grad():  # the copies made here belong to no autograd graph
        if as_it_trains:
            return _traced(module, *_copied(args, kwargs), training=True)
        short_args, short_kwargs, cut = _two_rows(args, kwargs)
        try:
            return _traced(module, short_args, short_kwargs)
        except InputError:
            # Inputs whose first dimension is not rows (patches of all images in one list) cannot be cut.
            if not cut:
                raise
        return _traced(module, *_copied(args, kwargs))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data parallelism and compilation."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# -- inputs ------------------------------------------------------------------------------------------------------------


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {str(key): move(value) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return (move(batch),), {}
    if isinstance(batch, (tuple, list)):
        return tuple(move(value) for value in batch), {}
    raise InputError(f"a batch to trace is a dict, a tensor or a tuple, not a {type(batch).__name__}")


def _two_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Two rows of everything that has as many rows as the first tensor; a single row is doubled.

    The rows are those with most and least padding. Without padding, one token of the copy is made padding: models skip
    a mask that masks nothing, and then the graph cannot show to which tokens it belongs.
    """
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
    rows = len(tensors[0]) if tensors else 0
    given = {**kwargs, **{str(place): value for place, value in enumerate(args)}}
    masks = {
        key: value
        for key, value in given.items()
        if isinstance(value, Tensor) and value.ndim == 2 and (key.endswith("mask") or value.dtype == torch.bool)
    }
    chosen = list(range(ROWS)) if rows >= ROWS else [0] * ROWS
    for mask in masks.values():
        marked = mask.ne(0).sum(1)
        if len(mask) == rows > ROWS and marked.min() < marked.max():
            chosen = [int(marked.argmax()), int(marked.argmin())]
            break
    picked = torch.tensor(chosen)
    cut = rows > 0 and (rows != ROWS)

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[picked.to(value.device)] if rows and value.ndim > 0 and len(value) == rows else value.clone()

    short, shorter = {k: take(v) for k, v in kwargs.items()}, [take(v) for v in args]
    for key in masks:
        mask = short[key] if key in short else shorter[int(key)]
        first = mask[0, 0] if mask.numel() else None
        if first is None or min(mask.shape) < 2 or bool((mask != first).any()):
            continue
        if mask.dtype == torch.bool or first == 1:
            mask[-1, -1] = ~first if mask.dtype == torch.bool else 0
            cut = True
    return tuple(shorter), short, cut


def inputs_by_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call: by name, by position as text, those of a dict as ``name.key``."""
    found: dict[str, Tensor] = {}
    for key, value in (*((str(i), v) for i, v in enumerate(args)), *kwargs.items()):
        if isinstance(value, Tensor):
            found[key] = value
        elif isinstance(value, Mapping):
            found |= {f"{key}.{k}": v for k, v in value.items() if isinstance(v, Tensor)}
    return found


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return tuple(copy(v) for v in args), {k: copy(v) for k, v in kwargs.items()}


# -- leaving no trace --------------------------------------------------------------------------------------------------


@contextmanager
def _untouched(model: nn.Module, training: bool) -> Iterator[None]:
    """Evaluation without caches, checkpointing, fast paths, compilation and our own quantizers; all restored.

    With `training` modules stay in their modes.
    """
    modules = list(model.modules())
    set_back: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        set_back.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    buffers = [dict(module._buffers) for module in modules]
    persistent = [set(module._non_persistent_buffers_set) for module in modules]
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modules:
            if module.training and not training:
                # Not eval(): some models merge adapters in it.
                put(module, "training", False)
            for name in ("gradient_checkpointing", "grad_checkpointing"):
                if module.__dict__.get(name) is True:
                    put(module, name, False)
            if type(module).__module__.startswith("s2d.") and module.__dict__.get("enabled") is True:
                put(module, "enabled", False)
            config = module.__dict__.get("config")
            if getattr(config, "use_cache", None) is True:
                put(config, "use_cache", False)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for owner, name, value in reversed(set_back):
            setattr(owner, name, value)
        for module, before, kept in zip(modules, buffers, persistent, strict=True):
            if (
                dict(module._buffers) != before
                if len(module._buffers) != len(before)
                else any(module._buffers.get(name) is not value for name, value in before.items())
            ):
                module._buffers.clear()
                module._buffers.update(before)
                module._non_persistent_buffers_set = kept
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool = False) -> Graph:
    from s2d.models.structure import finish

    tracer = Tracer(model)
    given = inputs_by_key(args, kwargs)
    with _untouched(model, training), ExitStack() as stack:
        for key, value in given.items():
            tracer.tell_input(key, value)
        stack.callback(tracer.restore)
        before = sys.exc_info()[1]
        tracer.error_before = before
        hooks = (
            register_module_forward_pre_hook(tracer.enter),
            register_module_forward_hook(tracer.leave, always_call=True),
        )
        for hook in hooks:
            stack.callback(hook.remove)
        try:
            with tracer:
                output = model(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:
            path = tracer.failed_in
            inputs = ", ".join(f"{k} {list(v.shape)}" for k, v in given.items()) or "no tensors"
            where = f"in {path} ({type(tracer.by_path[path]).__name__})" if path else "at the model itself"
            raise InputError(
                f"{type(model).__name__} cannot run the batch to trace ({inputs}): {where}: {first_line(error)}; "
                "give the inputs that its forward takes"
            ) from error
        tracer.tell_output(output)
    return finish(tracer, given)


__all__ = ["inputs_by_key", "trace", "trace_call", "unwrapped"]
