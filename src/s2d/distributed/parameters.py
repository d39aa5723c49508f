"""This rank's part of a parameter and of its gradient, for any kind of sharding."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from s2d.distributed.sharding import Groups, is_dtensor


def stored_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return cast(Any, parameter).to_local() if is_dtensor(parameter) else parameter


def gradient_of(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient, sharded as the parameter. Under tensor parallelism its own sharding may differ."""
    gradient: Any = parameter.grad
    if gradient is None or not is_dtensor(gradient):
        return gradient
    wanted = cast(Any, parameter)
    same = gradient.placements == wanted.placements
    return gradient if same else gradient.redistribute(wanted.device_mesh, wanted.placements)


def shard_groups(parameter: Tensor) -> Groups:
    """The groups over which a parameter is divided, along any dimension; empty where this rank holds all of it."""
    if not is_dtensor(parameter):
        return ()
    whole = cast(Any, parameter)
    divided = [dim for dim, placement in enumerate(whole.placements) if not placement.is_replicate()]
    return tuple(whole.device_mesh.get_group(dim) for dim in divided)
