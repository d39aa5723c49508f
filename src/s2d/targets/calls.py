"""The calls of a target in a forward pass: its input, output and bias as rows."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from s2d.distributed.sharding import Groups, Part, Parts, data_groups_of, is_divided_by_rows, is_dtensor, local_part
from s2d.errors import InputError
from s2d.targets.stacked import StackTarget
from s2d.targets.weights import Target

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_ATTENTION = inspect.signature(nn.MultiheadAttention.forward)


def call_views(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a module's input and output to ``[..., I]`` and ``[..., O]`` of the target.

    Channels come last; the input of a convolution is unfolded to the patches that its matrix multiplies.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _patches(module, x.detach()), y.movedim(-1 - len(module.kernel_size), -1)
    if target.kind == "norm" and y.ndim > 2:
        channels_first = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
        if channels_first or y.shape[-1] != target.parameter.numel():
            y = y.movedim(1, -1)
    return x, (y[..., target.rows] if target.rows is not None else y)


def parts_of(target: Target, stored: Tensor, x: Tensor, y: Tensor, data: Groups) -> Parts:
    """Which parts of a call's input and output this rank sees.

    Args:
        target: The target of the module that was called.
        stored: Its parameter as it is between steps.
        x: This rank's part of the input, as `call_views` gives it.
        y: This rank's part of the output.
        data: The ranks with other data, where the weight does not show them; see
            `s2d.distributed.sharding.data_groups`.
    """
    running = target.parameter
    rows = data_groups_of(stored, running, data)
    if not is_dtensor(running):
        return Parts(Part(x.shape[-1], row_groups=rows), Part(y.shape[-1], row_groups=rows))
    embeds = target.kind == "embedding"
    W = target.block().mT if embeds else target.block()
    given = Part(1, row_groups=rows) if embeds else _part(x.shape[-1], W.shape[1], W.columns, rows, W.column_groups)
    return Parts(given, _part(y.shape[-1], W.shape[0], W.rows, rows, W.row_groups))


def _part(here: int, width: int, columns: slice, rows: Groups, divided: Groups) -> Part:
    """The columns of an activation: divided as the weight's, unless the module has gathered them already."""
    return Part(width, columns, rows, divided) if divided and here != width else Part(here, row_groups=rows)


def refuse_unreadable(target: Target, x: Tensor, y: Tensor) -> None:
    """Refuse calls under tensor parallelism whose tokens and channels cannot be matched.

    Raises:
        InputError: Sequence parallelism, or a fused projection.
    """
    if not is_dtensor(target.parameter):
        return
    if target.rows is not None or isinstance(target.module, nn.MultiheadAttention):
        raise InputError(
            f"{target.name} is a fused projection divided by tensor parallelism, whose rows are not those of q, k, v; "
            "use a model with separate projections, exclude it, or shard it with fully_shard only"
        )
    tokens = [local_part(each).shape[:-1].numel() for each in (x, y)]
    moved = target.kind == "linear" and tokens[0] != tokens[1]
    if moved or any(is_divided_by_rows(each) for each in (x, y)):
        raise InputError(
            f"the tokens that {target.name} reads or makes are divided over ranks (sequence parallelism), which is not "
            "supported; keep activations whole between tensor-parallel layers, or exclude it"
        )


def projection_input(target: Target, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input ``[..., I]`` of a projection that is a bare parameter of an attention module.

    Torch's own attention receives queries, keys and values separately; other classes receive one tensor.
    """
    if isinstance(module, nn.MultiheadAttention):
        bound = _ATTENTION.bind(module, *args, **kwargs).arguments
        return (bound["query"], bound["key"], bound["value"])[projection_of(target)]
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def projection_views(
    target: Target, attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """As `call_views`, for a projection of torch's own attention. No module returns its output, so it is computed."""
    x = projection_input(target, attention, args, kwargs)
    assert x is not None  # torch's own attention cannot be called without it
    W = target.matrix()
    return x, nn.functional.linear(x.detach().to(W.dtype), W, bias_of(target))


def projection_of(target: Target) -> int:
    """0, 1 or 2: whether a part of an attention's input projection makes queries, keys or values."""
    if target.parameter_name in _PROJECTIONS:
        return _PROJECTIONS.index(target.parameter_name)
    return 0 if target.rows is None else target.rows.start // (target.rows.stop - target.rows.start)


def bias_parameter(target: Target) -> nn.Parameter | None:
    """The bias that belongs to a target, whole; None where there is none."""
    if isinstance(target, StackTarget):
        return target.owner._parameters.get(target.bias_name)
    name = "in_proj_bias" if target.parameter_name == "in_proj_weight" else "bias"
    return None if target.kind == "embedding" else target.owner._parameters.get(name)


def bias_of(target: Target) -> Tensor | None:
    """The bias that belongs to a target's rows, detached; a view, so writing to it writes to the model."""
    bias = bias_parameter(target)
    if bias is None:
        return None
    return bias.detach()[target.rows] if target.rows is not None else bias.detach()


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """``[..., I, *S]`` to ``[..., *S', I * prod(kernel)]``, in the order of the flattened weight."""
    dims = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    first = x.ndim - dims  # of the spatial dimensions; each unfolded one leaves its window at the end
    for d, (size, stride, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(first + d, gap * (size - 1) + 1, stride)[..., ::gap]
    return x.movedim(first - 1, -1 - dims).flatten(-1 - dims)


def is_compiled(model: nn.Module) -> bool:
    """Whether some of its modules are compiled, as far as the modules show it."""
    return any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules())
