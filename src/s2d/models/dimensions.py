"""Dimensions tracked by their meaning, not by their size: 4 rows, 4 heads and 4 tokens are not confused.

A dimension is a tuple of digits, the outermost first; its size is the product of theirs. A digit says which positions
of an *axis* (a dimension of an input of the model, or the output channels of one product) it counts through:

    position on the axis = sum over its digits of (offset + digit * stride)

So a view from ``[B, T, 3 H D]`` to ``[B, T, 3, H, D]`` splits one digit into three, and a merge joins them again. A
slice moves the offset. Windows of an image keep their rows and columns. Axis 0 is "nothing known".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Digit(NamedTuple):
    """One factor of a dimension: ``size`` positions of an axis, ``stride`` apart, from ``offset`` on."""

    axis: int
    size: int
    stride: int = 0
    offset: int = 0


Dim = tuple[Digit, ...]
Dims = tuple[Dim, ...]


def size_of(dim: Dim) -> int:
    """How many positions a dimension has."""
    return math.prod(digit.size for digit in dim)


def unknown(size: int) -> Dim:
    """A dimension of which nothing is known."""
    return () if size == 1 else (Digit(0, size),)


def whole(axis: int, size: int) -> Dim:
    """A dimension that is an axis."""
    return () if size == 1 else (Digit(axis, size, 1),)


def known(dim: Dim) -> bool:
    """Whether any of it belongs to an axis."""
    return any(digit.axis for digit in dim)


def merged(digits: Sequence[Digit]) -> Dim:
    """A sequence of digits, with adjacent digits merged where they form one."""
    out: list[Digit] = []
    for digit in digits:
        if digit.size == 1:
            continue
        if out and out[-1].axis == digit.axis and (digit.axis == 0 or out[-1].stride == digit.size * digit.stride):
            last = out.pop()
            digit = Digit(digit.axis, last.size * digit.size, digit.stride, last.offset + digit.offset)
        out.append(digit)
    return tuple(out)


def reshaped(dims: Dims, shape: Sequence[int]) -> Dims:
    """The dimensions after a view; those that cut an axis where it cannot be followed become unknown."""
    left = [digit for dim in reversed(dims) for digit in reversed(dim)]
    out: list[Dim] = []
    for position, size in enumerate(shape):
        need, found = size, []
        while need > 1 and left:
            digit = left.pop()
            if need % digit.size == 0:
                found.append(digit)
                need //= digit.size
            elif digit.size % need == 0:
                inner = digit.size // need
                found.append(Digit(digit.axis, need, digit.stride * inner, digit.offset))
                left.append(Digit(digit.axis, inner, digit.stride, 0))
                need = 1
            else:
                return (*out, *(unknown(n) for n in shape[position:]))
        out.append(merged(found) if need == 1 else unknown(size))
    return tuple(out)


def cut(dims: Dims, position: int, start: int, count: int, step: int = 1) -> Dims | None:
    """The dimensions after a part of one was taken; None where it cannot be described as part of an axis."""
    dim = dims[position]
    if not dim or (start == 0 and count == size_of(dim) and step == 1):
        return dims
    if count == 1:
        rest = selected(dims, position, start)
        return (*rest[:position], (), *rest[position:])
    first, inner = dim[0], size_of(dim[1:])
    if first.axis == 0 and len(dim) == 1:
        return (*dims[:position], unknown(count), *dims[position + 1 :])
    if step != 1 and len(dim) > 1 or start % inner or count % inner:
        return None
    moved = Digit(first.axis, count // inner, first.stride * step, first.offset + start // inner * first.stride)
    kept = dim[1:] if moved.size == 1 else (moved, *dim[1:])
    left = (*dims[:position], kept, *dims[position + 1 :])
    return carried(left, moved.axis, moved.offset) if moved.size == 1 else left


def carried(dims: Dims, axis: int, offset: int) -> Dims:
    """The offset of a removed digit, moved to another digit of the same axis."""
    for i, dim in enumerate(dims):
        for j, digit in enumerate(dim):
            if digit.axis == axis:
                moved = digit._replace(offset=digit.offset + offset)
                return (*dims[:i], (*dim[:j], moved, *dim[j + 1 :]), *dims[i + 1 :])
    return dims


def selected(dims: Dims, position: int, index: int) -> Dims:
    """The dimensions after one position of one of them was taken."""
    rest = (*dims[:position], *dims[position + 1 :])
    for digit in reversed(dims[position]):
        index, at = divmod(index, digit.size)
        if digit.axis:
            rest = carried(rest, digit.axis, digit.offset + at * digit.stride)
    return rest


def positions(dims: Dims, axis: int) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """Where on an axis a tensor's digits count: the offset and ``(size, stride)`` of each; None if they do not."""
    digits = [digit for dim in dims for digit in dim if digit.axis == axis]
    if not digits:
        return None
    return sum(digit.offset for digit in digits), tuple((digit.size, digit.stride) for digit in digits)
