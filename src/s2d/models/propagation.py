"""How an operation carries dimensions from what it reads to what it makes; see `s2d.models.dimensions`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from s2d.models.dimensions import Digit, Dim, Dims, cut, known, merged, reshaped, selected, size_of, unknown, whole
from s2d.models.graph_parts import Node

Shape = tuple[int, ...]
_MASKS = (torch.bool, torch.uint8)


class Axes:
    """The axes seen so far, and which of them are equal.

    An axis is ``(kind, name, dimension, source)``: a dimension of an input, the output channels of a product
    ("features"), or positions made from another axis ("derived", e.g. patches of pixels). Two axes of inputs that meet
    position by position (a mask is added to scores of tokens) are one.
    """

    def __init__(self) -> None:
        """Begin with axis 0, which stands for nothing known."""
        self.table: list[tuple[str, str, int, int]] = [("", "", 0, 0)]
        self.parent: list[int] = [0]
        self._derived: dict[tuple[str, int], int] = {}

    def new(self, kind: str, name: str, dimension: int = 0, source: int = 0) -> int:
        """A further axis."""
        self.table.append((kind, name, dimension, source))
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def derived(self, how: str, dim: Dim) -> int:
        """The axis of positions made from those of a dimension; the same for the same question."""
        source = next((digit.axis for digit in dim if self.is_position(digit.axis)), 0)
        return self.new("derived", how, 0, source) if source else 0

    def is_position(self, axis: int) -> bool:
        """Whether an axis counts rows or tokens of an input, not channels."""
        return self.table[axis][0] in ("input", "derived")

    def find(self, axis: int) -> int:
        """The first of the axes that are one with this."""
        while self.parent[axis] != axis:
            axis = self.parent[axis]
        return axis

    def meet(self, a: Dim, b: Dim) -> None:
        """Note that two dimensions ran side by side."""
        if len(a) != len(b):
            return
        for x, y in zip(a, b, strict=True):
            if x[1:] == y[1:] and x.axis != y.axis and self.is_position(x.axis) and self.is_position(y.axis):
                first, second = sorted((self.find(x.axis), self.find(y.axis)))
                if first != second:
                    self.parent[second] = first


def placed(axes: Axes, before: Dims, after: Dims) -> Dims:
    """``after``, without the names of channels of which a part is gone since ``before``: which are left is unknown."""

    def counted(dims: Dims) -> dict[int, int]:
        found: dict[int, int] = {}
        for digit in (digit for dim in dims for digit in dim if axes.table[digit.axis][0] == "features"):
            found[digit.axis] = found.get(digit.axis, 1) * digit.size
        return found

    was, now = counted(before), counted(after)
    lost = {axis for axis, count in now.items() if was.get(axis) != count}
    return after if not lost else tuple(merged([d._replace(axis=0) if d.axis in lost else d for d in x]) for x in after)


def broadcast(axes: Axes, inputs: Sequence[Dims], shape: Sequence[int]) -> Dims:
    """Dimensions of an elementwise result: aligned from the right, the first operand that knows one names it."""
    out: list[Dim] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        found: Dim | None = None
        for dims in inputs:
            if len(dims) < back or size_of(dims[-back]) != size or not known(dims[-back]):
                continue
            if found is None:
                found = dims[-back]
            else:
                axes.meet(found, dims[-back])
        out.append(unknown(size) if found is None else found)
    return tuple(out)


def same_sizes(axes: Axes, name: str, dims: Dims, shape: Sequence[int]) -> Dims:
    """Of as many dimensions those whose size stayed; a changed one that counted tokens counts derived ones."""
    if len(dims) != len(shape):
        return tuple(unknown(n) for n in shape)
    made = tuple(
        dim if size_of(dim) == size else whole(axes.derived(name, dim), size) if known(dim) else unknown(size)
        for dim, size in zip(dims, shape, strict=True)
    )
    return placed(axes, dims, made)


def matrix_product(axes: Axes, a: Dims, b: Dims, shape: Sequence[int]) -> Dims:
    """``[*, M, K] x [*, K, N]``; what both count in the leading dimensions is named by the right operand."""
    columns = b[-1] if len(b) > 1 else ()
    out: list[Dim] = list(broadcast(axes, (b[:-2], a[:-2]), shape[:-2])) if len(shape) > 2 else []
    ends = [a[-2], columns] if len(a) > 1 and len(b) > 1 else [a[-2]] if len(a) > 1 else [columns]
    ends = ends[len(ends) - min(len(shape), len(ends)) :]
    result = (*out, *ends)
    return tuple(dim if size_of(dim) == n else unknown(n) for dim, n in zip(result, shape, strict=False))


def attention(axes: Axes, q: Dims, k: Dims, v: Dims, mask: Dims | None, shape: Sequence[int]) -> Dims:
    """Fused attention ``[B, H, L, D]``: rows of q, channels of v; heads are named by v, repeated where q has more."""
    heads = v[-3] if len(v) > 2 else ()
    if len(shape) > 2 and size_of(heads) != shape[-3]:
        more = shape[-3] // max(size_of(heads), 1)
        heads = (*heads, Digit(0, more)) if more * size_of(heads) == shape[-3] else unknown(shape[-3])
    if len(shape) > 3:
        for other in (k[0], v[0]):  # pyright: ignore[reportGeneralTypeIssues]
            axes.meet(q[0], other)
    axes.meet(k[-2], v[-2])  # pyright: ignore[reportGeneralTypeIssues]
    if mask is not None:
        scores = (q[0], unknown(shape[1]) if len(shape) > 3 else (), q[-2], k[-2])
        broadcast(axes, (scores, mask), tuple(size_of(dim) for dim in scores))
    batch = () if len(shape) < 4 else (q[0] if known(q[0]) else v[0],)  # pyright: ignore[reportGeneralTypeIssues]
    result = (*batch, *((heads,) if len(shape) > 2 else ()), q[-2], v[-1])  # pyright: ignore[reportGeneralTypeIssues]
    return tuple(dim if size_of(dim) == n else unknown(n) for dim, n in zip(result, shape, strict=False))


def convolution(axes: Axes, x: Dims, shape: Sequence[int], features: int, same: bool) -> Dims:
    """``[B, C, *S]``: positions stay where nothing is strided or cut off, else they are derived ones."""
    spatial = [
        dim if same and size_of(dim) == n else whole(axes.derived("convolution", dim), n) if known(dim) else unknown(n)
        for dim, n in zip(x[-len(shape) + 2 :], shape[2:], strict=True)
    ]
    return (x[0] if len(x) == len(shape) else unknown(shape[0]), whole(features, shape[1]), *spatial)


def view(axes: Axes, name: str, args: Sequence[Any], x: Dims, given: Shape, out: Tensor, part: int) -> Dims:
    """A view or copy of ``x``; ``part`` is which of several results."""
    shape = out.shape
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "squeeze_copy",
                "unsqueeze", "view_copy"):  # fmt: skip
        if out.numel() != math.prod(given):
            return tuple(unknown(n) for n in shape)
        return placed(axes, x, reshaped(x, shape))
    if name == "permute":
        return tuple(x[d] for d in args[1])
    if name == "transpose":
        order = list(range(len(x)))
        a, b = args[1] % len(x), args[2] % len(x)
        order[a], order[b] = order[b], order[a]
        return tuple(x[d] for d in order)
    if name == "t":
        return tuple(reversed(x))
    if name in ("expand", "broadcast_to", "expand_copy", "copy"):
        return broadcast(axes, (x,), shape)
    if name == "select":
        dim = args[1] % len(x)
        return selected(x, dim, args[2] % given[dim])
    if name == "unbind":
        return selected(x, (args[1] if len(args) > 1 else 0) % len(x), part)
    if name in ("slice", "split", "split_with_sizes", "unsafe_split", "narrow", "split_with_sizes_copy", "tensor_split",
                "chunk"):  # fmt: skip
        return _cut(axes, name, args, x, given, shape, part)
    if name in ("flip", "roll"):
        turned = {d % len(x) for d in (args[1] if name == "flip" else args[2] if len(args) > 2 else range(len(x)))}
        return tuple(
            whole(axes.derived(name, dim), size_of(dim)) if i in turned and known(dim) else dim
            for i, dim in enumerate(x)
        )
    if name == "repeat" and len(shape) == len(x):
        return tuple(
            dim if size_of(dim) == n else (Digit(0, n // size_of(dim)), *dim) for dim, n in zip(x, shape, strict=True)
        )
    return same_sizes(axes, name, x, shape)


def _cut(axes: Axes, name: str, args: Sequence[Any], x: Dims, given: Shape, shape: Sequence[int], part: int) -> Dims:
    step, start = 1, None
    if name == "slice":
        dim = (args[1] if len(args) > 1 else 0) % len(x)
        start = args[2] if len(args) > 2 and args[2] is not None else 0
        step = args[4] if len(args) > 4 else 1
    elif name == "narrow":
        dim, start = args[1] % len(x), args[2]
    else:
        dim = (args[2] if len(args) > 2 else 0) % len(x)
        sizes = args[1]
        if isinstance(sizes, int):
            start = part * (sizes if name != "chunk" else -(-given[dim] // sizes))
        elif name == "tensor_split":
            start = None
        else:
            start = sum(sizes[:part])
    if start is None:
        return same_sizes(axes, name, x, shape)
    start = min(max(start + given[dim] if start < 0 else start, 0), given[dim])
    part_of = cut(x, dim, start, shape[dim], step)
    return same_sizes(axes, "slice", x, shape) if part_of is None else part_of


def joined(axes: Axes, dim: int, inputs: Sequence[Dims], shapes: Sequence[Shape], shape: Sequence[int]) -> Dims:
    """Concatenation; neighbouring parts of one axis are put together again."""
    several = [(d, s) for d, s in zip(inputs, shapes, strict=True) if len(d) == len(shape)]
    if not several:
        return tuple(unknown(n) for n in shape)
    dim %= len(shape)
    rest = broadcast(axes, [d[:dim] + ((),) + d[dim + 1 :] for d, _ in several],
                     [1 if i == dim else n for i, n in enumerate(shape)])  # fmt: skip
    parts = [d[dim] for d, _ in several]
    first = parts[0][0] if parts[0] else None
    if first is not None and all(len(part) == 1 and part[0].axis == first.axis for part in parts) and first.axis:
        at = first.offset
        follows = True
        for (digit,) in parts:
            follows &= digit.offset == at and digit.stride == first.stride
            at += digit.size * digit.stride
        if follows:
            return (*rest[:dim], (first._replace(size=shape[dim]),), *rest[dim + 1 :])
    source = next((part for part in parts if any(axes.is_position(d.axis) for d in part)), None)
    changed = whole(axes.derived("cat", source), shape[dim]) if source is not None else unknown(shape[dim])
    return placed(axes, several[0][0], (*rest[:dim], changed, *rest[dim + 1 :]))


def reduced(axes: Axes, name: str, args: Sequence[Any], x: Dims, shape: Sequence[int]) -> Dims:
    """A reduction over the dimensions that ``args`` names."""
    if len(shape) == len(x):
        return same_sizes(axes, name, x, shape)
    over = args[1] if len(args) > 1 else None
    gone = [over] if isinstance(over, int) else list(over) if isinstance(over, (list, tuple)) else []
    kept = [dim for i, dim in enumerate(x) if i not in {d % len(x) for d in gone}]
    return placed(axes, x, tuple(kept)) if len(kept) == len(shape) else tuple(unknown(n) for n in shape)


def looked_up(
    axes: Axes, name: str, args: Sequence[Any], x: Dims, shape: Sequence[int], node: Callable[[Tensor], Node]
) -> Dims:
    """Rows taken by number. A constant list of numbers in even steps is a slice.

    One that the data made (tokens of an expert) is in order by chance only.
    """
    if name in ("index_select", "take_along_dim", "gather"):
        return same_sizes(axes, name, x, shape)
    if name not in ("index", "_unsafe_index"):
        return tuple(unknown(n) for n in shape)
    used = [(d, i) for d, i in enumerate(args[1]) if i is not None]
    if not used or any(i.dtype in _MASKS for _, i in used):
        return tuple(unknown(n) for n in shape)
    together = [d for d, _ in used] == list(range(used[0][0], used[0][0] + len(used)))
    wide = max(i.ndim for _, i in used)
    lead = used[0][0] if together else 0
    places = {d: [i + wide - index.ndim for i, n in enumerate(index.shape) if n > 1] for d, index in used}
    beside = [at for each in places.values() for at in each]  # two lists in one place pick pairs
    slices = set()
    for d, index in used:
        alone = len(places[d]) < 2 and all(beside.count(at) == 1 for at in places[d])
        steps = _even_steps(index, size_of(x[d])) if alone and node(index).state == "constant" else None
        part_of = None if steps is None else cut(x, d, *steps)
        if part_of is not None:
            x = part_of
            slices.add(d)
    taken: list[Dim] = [unknown(n) for n in shape[lead : lead + wide]]
    for d, index in used:
        for at in places[d]:
            if len(places[d]) > 1:
                named = node(index).dims[at - wide + index.ndim]
                taken[at] = named if known(named) and not known(taken[at]) else taken[at]
            elif d in slices:
                taken[at] = x[d]
            elif known(x[d]):
                taken[at] = whole(axes.derived("index", x[d]), index.numel())
    rest = [dim for d, dim in enumerate(x) if d not in {d for d, _ in used}]
    result = (*rest[:lead], *taken, *rest[lead:])
    return placed(axes, x, tuple(d if size_of(d) == n else unknown(n) for d, n in zip(result, shape, strict=True)))


def _even_steps(index: Tensor, size: int) -> tuple[int, int, int] | None:
    """First, number and step of a list of positions; None for one that goes back or leaves some out unevenly."""
    flat = index.flatten() % max(size, 1)
    steps = flat.diff()
    if len(steps) and (int(steps[0]) < 1 or bool((steps != steps[0]).any())):
        return None
    return int(flat[0]), len(flat), int(steps[0]) if len(steps) else 1
