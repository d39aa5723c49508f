"""Sharded matrices and sums over ranks, on tensors and process groups.

A weight that FSDP2 (``fully_shard``) or tensor parallelism has divided is a DTensor. Each rank holds a block of it:
some rows and some columns, perhaps none. Nothing here gathers a whole weight. The decay needs only products of the
weight with a few vectors. Every rank multiplies its block, and a small all-reduce adds the parts.

Sums are bit-identical on every rank of a group, so that decisions based on them agree.

Shapes: O rows and I columns of the whole matrix, o and i of the block of this rank, p vectors, E numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from s2d.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Groups: TypeAlias = "tuple[ProcessGroup, ...]"

# The digits of a non-negative float32: first bit and number of bits of each.
_DIGITS = ((21, 10), (10, 11), (0, 10))


@dataclass(slots=True, eq=False)  # not frozen, which is slower to make: one is made per weight and step
class Block:
    """The part of a matrix ``[O, I]`` that this rank holds; all of it where nothing is sharded.

    Attributes:
        local: ``[o, i]``; shares the memory of the weight.
        shape: ``(O, I)``.
        rows: The rows of the whole matrix that lie here.
        columns: The columns that lie here.
        row_groups: The ranks that hold the other rows.
        column_groups: The ranks that hold the other columns.
    """

    local: Tensor
    shape: tuple[int, int]
    rows: slice
    columns: slice
    row_groups: Groups = ()
    column_groups: Groups = ()

    @staticmethod
    def of(weight: Tensor | Block) -> Block:
        """The block of a weight: all of a plain tensor, this rank's part of a DTensor.

        Args:
            weight: ``[O, I]``, ``[O, I, *kernel]`` (kernels are flattened into the columns), or a vector ``[O]``, which
                becomes one column.

        Raises:
            InputError: The weight is sharded in a way that leaves no block, or still has to be summed.
        """
        if isinstance(weight, Block):
            return weight
        if not is_dtensor(weight):
            local, shape, start, divided = weight, weight.shape, (0,) * weight.ndim, ((), ())
        else:
            local, shape, start, divided = _dtensor_part(weight)
        flat = local.unsqueeze(1) if local.ndim == 1 else local.flatten(1) if local.ndim > 2 else local
        whole = (shape[0], math.prod(shape[1:]))
        first = start[1] if len(shape) == 2 else 0
        rows, columns = slice(start[0], start[0] + len(flat)), slice(first, first + flat.shape[1])
        return Block(flat.detach(), whole, rows, columns, *divided)

    @property
    def mT(self) -> Block:
        """The transposed matrix, as a view."""
        turned = self.shape[1], self.shape[0]
        return Block(self.local.mT, turned, self.columns, self.rows, self.column_groups, self.row_groups)

    @property
    def groups(self) -> Groups:
        """The groups over which the matrix is divided; empty where this block is the whole."""
        return self.row_groups + self.column_groups

    def take(self, rows: slice) -> Block:
        """Some rows of the whole matrix as a matrix of their own."""
        first = min(max(rows.start, self.rows.start), self.rows.stop)
        last = max(first, min(rows.stop, self.rows.stop))
        local = self.local[first - self.rows.start : last - self.rows.start]
        shape = (rows.stop - rows.start, self.shape[1])
        start = max(first - rows.start, 0)
        return replace(self, local=local, shape=shape, rows=slice(start, start + len(local)))

    def between(self, U: Tensor, V: Tensor) -> Tensor:
        """This part's share of ``u_k^T W v_k`` ``[K]`` (U ``[O, K]``, V ``[I, K]``); sum it over `groups`."""
        return ((self.local.to(U.dtype) @ V[self.columns]) * U[self.rows]).sum(0)

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True)
class Part:
    """Which part of an activation ``[N, D]`` this rank sees.

    Attributes:
        width: D of the whole.
        columns: The columns that lie here; None for all.
        row_groups: The ranks with other rows: other data.
        column_groups: The ranks with other columns of the same rows (tensor parallel).
    """

    width: int
    columns: slice | None = None
    row_groups: Groups = ()
    column_groups: Groups = ()

    @property
    def groups(self) -> Groups:
        """The ranks that see any other part."""
        return self.row_groups + self.column_groups

    @property
    def first(self) -> int:
        """Where the columns that are here begin."""
        return 0 if self.columns is None else self.columns.start

    def widened(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's columns, with zeros for all others; the sum over `column_groups` is the whole."""
        if self.columns is None:
            return x
        shape = list(x.shape)
        shape[dim] = self.width
        wide = x.new_zeros(shape)
        wide.narrow(dim, self.first, x.shape[dim]).copy_(x)
        return wide

    def narrowed(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's columns of a whole activation; a view."""
        return x if self.columns is None else x.narrow(dim, self.first, self.columns.stop - self.first)


@dataclass(frozen=True)
class Parts:
    """Which parts of its input and of its output a rank sees of one call of a weight's module."""

    x: Part
    y: Part

    @staticmethod
    def whole(x: Tensor, y: Tensor) -> Parts:
        """One process sees everything."""
        return Parts(Part(x.shape[-1]), Part(y.shape[-1]))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing ``torch.distributed.tensor``, which takes a second."""
    kind = type(tensor)
    return kind is not Tensor and kind is not nn.Parameter and any(b.__name__ == "DTensor" for b in kind.__mro__)


def ranks_in(groups: Groups) -> int:
    """The number of ranks of the groups, this one included."""
    return math.prod(group.size() for group in groups)


def all_reduce(tensor: Tensor, groups: Groups, op: str = "sum") -> Tensor:
    """Sum (or the largest) over ranks, in place; the tensor itself, contiguous. Without groups nothing happens."""
    for group in groups:
        if group.size() > 1:
            kind = torch.distributed.ReduceOp.MAX if op == "max" else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(tensor, kind, group)
    return tensor


def all_reduce_many(tensors: Sequence[Tensor], groups: Sequence[Groups], op: str = "sum") -> list[Tensor]:
    """`all_reduce` of many small tensors, each over its own groups, in as few messages as there are sets of groups.

    Returns:
        The sums, in the order of `tensors`; a tensor without groups is returned as it is.
    """
    results = list(tensors)
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for index, (tensor, among) in enumerate(zip(tensors, groups, strict=True)):
        if ranks_in(among) > 1:
            buckets.setdefault((among, tensor.dtype, tensor.device), []).append(index)
    for (among, *_), members in buckets.items():
        message = torch.cat([tensors[index].reshape(-1) for index in members])
        all_reduce(message, among, op)
        parts = message.split([tensors[index].numel() for index in members])
        for index, part in zip(members, parts, strict=True):
            results[index] = part.view(tensors[index].shape)
    return results


def all_reduce_floats(
    values: Sequence[float], groups: Sequence[Groups], devices: Sequence[torch.device]
) -> list[float]:
    """`all_reduce_many` of numbers, each sent through its device."""
    if not any(groups):
        return list(values)
    told = [
        torch.tensor(value, dtype=torch.float64, device=device) for value, device in zip(values, devices, strict=True)
    ]
    return [float(each) for each in all_reduce_many(told, groups)]


def whole_vector(vector: Tensor) -> Tensor:
    """All entries of a vector (a gain, a bias), gathered from all ranks."""
    if not is_dtensor(vector):
        return vector.detach()
    block = Block.of(vector)
    return all_reduce(Part(len(block), block.rows).widened(block.local[:, 0].contiguous()), block.row_groups)


def kth_largest(values: Sequence[Tensor], counts: Sequence[int], groups: Groups) -> list[Tensor]:
    """The k-th largest number of each of many sets that are spread over ranks, without gathering the numbers.

    Non-negative floats are ordered like their bits, so the k-th is found digit by digit from histograms. Only the sums
    of the histograms are exchanged: three messages for any number of sets and any number of ranks.

    Args:
        values: For each set the non-negative finite numbers of this rank ``[E]``, any number of them.
        counts: For each set, k. If k exceeds the number of values, the smallest value is returned.
        groups: The ranks.

    Returns:
        A float32 scalar for each set.
    """
    if not values:
        return []
    device = values[0].device
    bits = [value.detach().float().contiguous().view(torch.int32).long() for value in values]
    left = torch.tensor(counts, device=device, dtype=torch.long)
    prefix = torch.zeros(len(values), dtype=torch.long, device=device)
    for shift, width in _DIGITS:
        size = 1 << width
        histogram = torch.zeros(len(values), size, dtype=torch.long, device=device)
        for row, number in enumerate(bits):
            alike = number[(number >> shift) // size == prefix[row]]
            histogram[row] = torch.bincount((alike >> shift) % size, minlength=size)
        all_reduce(histogram, groups)
        at_least = histogram.flip(1).cumsum(1).flip(1)  # how many have this digit or a larger one
        reached = at_least >= left.minimum(at_least[:, 0]).clamp_min(1)[:, None]
        digit = (reached.sum(1) - 1).clamp_min(0)
        above = at_least.gather(1, (digit + 1).clamp_max(size - 1)[:, None])[:, 0]
        left = left.minimum(at_least[:, 0]) - torch.where(digit + 1 < size, above, torch.zeros_like(above))
        prefix = prefix * size + digit
    return list(prefix.int().view(torch.float32))


def agreed(numbers: Tensor, groups: Groups) -> Tensor:
    """A mask of the entries ``[E]`` that are equal on all ranks of the groups."""
    both = all_reduce(torch.cat([numbers, -numbers]), groups, "max")
    return both[: len(numbers)] == -both[len(numbers) :]


def require_same(names: Iterable[str], groups: Groups, device: torch.device) -> None:
    """Refuse ranks that have run different modules, before they wait for each other's sums forever.

    Raises:
        InputError: On every rank.
    """
    mine = list(names)
    check = zlib.crc32("\n".join(mine).encode())
    halves = torch.tensor([check >> 16, check & 0xFFFF], dtype=torch.float32, device=device)  # exact in float32
    if groups and not bool(agreed(halves, groups).all()):
        raise InputError(
            f"this rank ran {len(mine)} of the conditioned weights in the step of a refresh, and another one others; "
            "run the same modules on every rank, or exclude those that do not run everywhere"
        )


def from_first(content: Any, groups: Groups) -> Any:
    """The first rank's value of a picklable object."""
    box = [content]
    for group in groups:
        if group.size() > 1:
            torch.distributed.broadcast_object_list(box, src=torch.distributed.get_global_rank(group, 0), group=group)
    return box[0]


def in_common(names: Iterable[str], groups: Groups) -> list[str]:
    """The names that every rank has, in this rank's order, which should be the same on all ranks."""
    mine = list(names)
    for group in groups:
        lists: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(lists, mine, group=group)
        mine = [name for name in mine if all(name in each for each in lists)]
    return mine


def data_groups(model: nn.Module) -> Groups:
    """The ranks that train on other data than this one, for weights whose own sharding does not show it.

    In ``DistributedDataParallel`` these are the ranks of the wrapper. With tensor parallelism they are all ranks that
    hold the same parts as this one. Otherwise all. Empty where nothing is distributed. Every rank has to call it.

    Raises:
        InputError: The weights are sharded as one flat vector (FSDP1, DeepSpeed ZeRO-3), which has no rows.
    """
    _refuse_flat(model)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    mesh = _tensor_parallel_mesh(model)
    if mesh is None:
        return all_ranks(model)
    everyone = torch.distributed.group.WORLD
    assert everyone is not None
    if mesh.size() == everyone.size():
        return ()
    places: list[Any] = [None] * everyone.size()
    torch.distributed.all_gather_object(places, mesh.get_coordinate())
    alike = [[rank for rank, place in enumerate(places) if place == each] for each in _distinct(places)]
    mine: Any = torch.distributed.new_subgroups_by_enumeration(alike)[0]
    return (mine,)


def all_ranks(model: nn.Module) -> Groups:
    """All ranks that train a model together, whatever part they hold; empty where nothing is distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    if isinstance(model, nn.parallel.DistributedDataParallel) and model.process_group is not None:
        return (model.process_group,)
    everyone = torch.distributed.group.WORLD
    assert everyone is not None
    return (everyone,) if everyone.size() > 1 else ()


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def data_groups_of(stored: Tensor, running: Tensor, otherwise: Groups) -> Groups:
    """The ranks that train on other data than this one, derived from a weight.

    Args:
        stored: The parameter as the optimizer holds it.
        running: The parameter in the forward pass. FSDP2 has then gathered it over the ranks with other data, so that
            only dimensions of tensor parallelism remain.
        otherwise: The ranks for the model as a whole, see `data_groups`: for weights that FSDP2 does not manage.
    """
    if not is_dtensor(stored):
        return otherwise
    mesh = _dtensor(stored).device_mesh
    gathered = mesh.ndim - (_dtensor(running).device_mesh.ndim if is_dtensor(running) else 0)
    return tuple(mesh.get_group(dim) for dim in range(gathered)) if gathered else otherwise


def local_part(activation: Tensor) -> Tensor:
    """This rank's part of an activation."""
    if not is_dtensor(activation):
        return activation
    whole = _dtensor(activation)
    if any(placement.is_partial() for placement in whole.placements):
        from torch.distributed.tensor import Replicate

        whole = whole.redistribute(placements=[Replicate() if p.is_partial() else p for p in whole.placements])
    return whole.to_local()


def is_divided_by_rows(activation: Tensor) -> bool:
    """Whether ranks hold different tokens of one activation: sequence parallelism."""
    if not is_dtensor(activation):
        return False
    last = activation.ndim - 1
    return any(not p.is_partial() and _dim_of(p) not in (None, last) for p in _dtensor(activation).placements)


def _dtensor(tensor: Tensor) -> DTensor:
    return tensor  # type: ignore[return-value]


def _dtensor_part(weight: Tensor) -> tuple[Tensor, torch.Size, Sequence[int], tuple[Groups, Groups]]:
    """Local tensor, whole shape, its offset, and the groups that divide its rows and its columns."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole = _dtensor(weight)
    mesh, placements, shape = whole.device_mesh, whole.placements, whole.shape
    row_groups, column_groups = [], []
    for dim, placement in enumerate(placements):
        if placement.is_partial() or getattr(placement, "dim", 0) > 1 or (len(shape) > 2 and _dim_of(placement) == 1):
            raise InputError(
                f"a weight of shape {list(shape)} is placed as {placements}; "
                "shard its first dimension only, or a matrix along rows or columns"
            )
        if _dim_of(placement) == 0:
            row_groups.append(mesh.get_group(dim))
        elif _dim_of(placement) == 1:
            column_groups.append(mesh.get_group(dim))
    local = whole.to_local()
    _, start = compute_local_shape_and_global_offset(shape, mesh, placements)
    return local, shape, start, (tuple(row_groups), tuple(column_groups))


def _dim_of(placement: Any) -> int | None:
    return None if placement.is_replicate() else placement.dim


def _tensor_parallel_mesh(model: nn.Module) -> Any:
    """The mesh of the DTensors that are not FSDP2's, or None."""
    inside: set[int] = set()
    for module in model.modules():
        if is_fsdp_module(module):
            inside.update(id(parameter) for parameter in module.parameters())
    for parameter in model.parameters():
        if is_dtensor(parameter) and id(parameter) not in inside:
            return _dtensor(parameter).device_mesh
    return None


def _refuse_flat(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                "the model is wrapped by FullyShardedDataParallel (FSDP1), which keeps weights as flat vectors without "
                "rows; use torch.distributed.fsdp.fully_shard (FSDP2; accelerate: fsdp_version: 2) or DDP"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise InputError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, which keeps weights as flat vectors without rows; "
                "use ZeRO stage 1 or 2, DDP, or torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _distinct(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found
