"""Hooks on the audited weights. They give every call's inputs and outputs as rows while a model runs on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from operator import length_hint
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.masks import Padding, token_mask
from s2d.models.running import evaluating, real_tokens, run
from s2d.models.stack_products import show_products
from s2d.models.tracing import trace
from s2d.quant.modules.attention import AttentionQuantizer, QuantizedAttention
from s2d.quant.modules.linear import swap_in, swap_out
from s2d.spectral.statistics import token_rows
from s2d.targets.calls import bias_of, call_views, projection_input
from s2d.targets.stacked import StackTarget
from s2d.targets.weights import Target

Rows: TypeAlias = Callable[[Target, Tensor, Tensor], None]
MaskOf: TypeAlias = Callable[[Any], Tensor | None]
_Show: TypeAlias = Callable[[Target, Tensor, Tensor | None], None]

# The output of these modules is exactly x W^T + bias.
_PLAIN_FORWARDS = frozenset({nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward})


def batches_twice(batches: Iterable[Any], most: int | None) -> Iterable[Any]:
    """Batches that can be read twice. The items of a generator are held in memory.

    Raises:
        InputError: A single batch, no iterable, or an empty one; `most` is below 1.
    """
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise InputError(f"batches is a list of batches or a DataLoader, not one {type(batches).__name__}; give a list")
    if most is not None and most < 1:
        raise InputError(f"max_batches={most} is out of range; it must be at least 1")
    if isinstance(batches, Iterator):
        batches = list(islice(batches, most))
    if length_hint(batches, 1) == 0:  # a loader over a stream does not know its length
        raise InputError("the audit was given no batches; give at least one")
    return batches


@contextmanager
def watching(
    model: nn.Module, targets: Sequence[Target], see: Rows, mask_of: MaskOf | None, graph: Graph | None = None
) -> Iterator[Callable[[Iterable[Any]], int]]:
    """While active, every call of a target's module is passed to `see`, as ``(target, x [N, I], A [N, O])`` in float32.

    ``A = x W^T``, without the bias; rows are real tokens, image patches, or whatever the leading dimensions are. The
    model is in evaluation mode. All hooks are removed afterwards, also after an error.

    Args:
        model: Holds the targets.
        targets: Targets for which `unreadable` returns an empty text.
        see: Called with the rows.
        mask_of: Gives the mask of a batch; None for its ``attention_mask``.
        graph: That of a batch; the first one is traced if there is none.

    Returns:
        A function that runs the model on batches and returns their number.
    """
    given: list[Tensor | None] = [None]
    masks: list[Padding] = []  # none while the first batch is traced
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        _no_shortcuts(model, stack)

        def rows(target: Target, x: Tensor) -> Tensor:
            mask = masks[0](target.module_name) if mask_of is None else given[0]
            if mask is not None and x.ndim > 2:
                x, mask = real_tokens(x, mask.bool(), "input"), None
            return token_rows(x, mask).float()

        # An input that several weights read one after the other (queries, keys, values) is brought to rows once.
        latest: list[tuple[Tensor, int, Tensor] | None] = [None]

        def input_rows(target: Target, x: Tensor) -> Tensor:
            if x.is_inference():  # has no version counter for in-place changes
                return rows(target, x)
            known = latest[0]
            if known is None or known[0] is not x or known[1] != x._version:
                latest[0] = known = (x, x._version, rows(target, x.detach()))
            return known[2]

        def show(target: Target, x: Tensor, y: Tensor | None) -> None:
            if not masks or again or x.shape[-1] != target.matrix().shape[1]:
                return
            x_NI = input_rows(target, x)
            if len(x_NI) == 0:
                return
            if y is None:
                see(target, x_NI, x_NI @ target.matrix().float().mT)
                return
            A_NO, bias = rows(target, y.detach()), bias_of(target)
            see(target, x_NI, A_NO if bias is None else A_NO - bias.float())

        again: list[nn.Module] = []  # modules that run a second time, for the products with their stacks
        stacks: dict[nn.Module, list[StackTarget]] = {}
        for target in targets:
            if isinstance(target, StackTarget):
                stacks.setdefault(target.module, []).append(target)
        for module, group in stacks.items():
            path = group[0].module_name

            def real(path: str = path) -> Tensor | None:
                return masks[0].of_rows(path) if mask_of is None else given[0]

            before = _before_products(group, see, real, masks, again)
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)

        by_module: dict[nn.Module, list[Target]] = {}
        for target in targets:
            if isinstance(target, StackTarget):
                continue
            by_module.setdefault(target.module, []).append(target)
        for module, group in by_module.items():
            own = [target for target in group if target.parameter_name == "weight"]
            bare = [target for target in group if target.parameter_name != "weight"]
            if own:
                handle = module.register_forward_hook(_after_call(own, show), with_kwargs=True)
                stack.callback(handle.remove)
            if bare:
                handle = module.register_forward_pre_hook(_before_call(bare, show), with_kwargs=True)
                stack.callback(handle.remove)

        def feed(source: Iterable[Any]) -> int:
            count = 0
            for batch in source:
                if not masks:
                    found = graph
                    if found is None:
                        with suppress(InputError):  # the batch's own run reports what is wrong with it
                            found = trace(model, batch)
                    masks.append(stack.enter_context(token_mask(model, found)))
                given[0] = None if mask_of is None else mask_of(batch)
                try:
                    run(model, batch, count)
                except InputError as error:
                    raise InputError(str(error).removeprefix("calibration ")) from error
                finally:
                    latest[0] = None
                count += 1
            return count

        yield feed


def with_progress(source: Iterable[Any], most: int | None, words: str, shown: bool) -> Iterable[Any]:
    """The first `most` items, with a progress bar or without."""
    total = length_hint(source) or None
    total = total if most is None or total is None else min(most, total)
    console = Console(stderr=True)  # standard output is for results
    return track(islice(source, most), words, total=total, disable=not shown, transient=True, console=console)


def unreadable(target: Target) -> str:
    """Why a weight's inputs cannot be brought to rows that it multiplies; empty where they can."""
    if target.kind == "conv" and getattr(target.module, "groups", 1) > 1:
        return "a grouped convolution multiplies each part of its input with other rows"
    return ""


def _after_call(targets: Sequence[Target], show: _Show) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            return
        # The module computes more than a linear map, so the product itself is computed here.
        plain = type(module).forward in _PLAIN_FORWARDS
        for target in targets:
            if isinstance(output, Tensor):
                x_rows, y_rows = call_views(target, module, x, output)
                show(target, x_rows, y_rows if plain or target.transposed else None)
            elif target.kind == "linear":
                show(target, x, None)

    return hook


def _before_call(targets: Sequence[Target], show: _Show) -> Callable[..., None]:
    """For projections that are bare parameters of an attention module: they read the module's own inputs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for target in targets:
            x = projection_input(target, module, args, kwargs)
            if x is not None:
                show(target, x, None)

    return hook


def _before_products(
    targets: Sequence[StackTarget],
    see: Rows,
    real: Callable[[], Tensor | None],
    masks: Sequence[Padding],
    again: list[nn.Module],
) -> Callable[..., None]:
    """For experts: their module runs once more, and each product of a target's matrix is shown."""
    wanted: dict[str, dict[int, StackTarget]] = {}
    for target in targets:
        assert target.expert is not None
        wanted.setdefault(target.parameter_name, {})[target.expert] = target

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not masks or again:
            return

        def show(name: str, experts: Tensor, x: Tensor, y: Tensor, kept: Tensor | None) -> None:
            for expert in experts.unique().tolist():
                here = experts == expert if kept is None else (experts == expert) & kept
                if expert in wanted[name] and bool(here.any()):
                    see(wanted[name][expert], x[here].float(), y[here].float())

        again.append(module)
        try:
            show_products(module, tuple(wanted), args, kwargs, show, real())
        finally:
            again.clear()

    return hook


def _no_shortcuts(model: nn.Module, stack: ExitStack) -> None:
    """Make the model call its modules one by one: no compiled code, no fused encoder layers, no bare out_proj."""
    stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    for name, module in model.named_modules():
        # Torch's own attention multiplies by out_proj's weight without a call of out_proj. The replacement calls it.
        exact = type(module) is nn.MultiheadAttention and "forward" not in vars(module)
        if exact and module.in_proj_weight is not None:
            swap_in(module, QuantizedAttention, {"attention_quantizer": AttentionQuantizer(name, {})}, name)
            stack.callback(swap_out, module, ("attention_quantizer",))
