"""Statistics of activations over the forward passes of a refresh, and over the ranks that see other parts of them.

Shapes: N tokens, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.dominance import channel_sums, row_sums
from s2d.sharding import Groups, Part, all_reduce, all_reduce_many


@dataclass(frozen=True)
class Sums:
    """Statistics of the channels of one activation.

    Attributes:
        channel_max: ``max_n |x_nd|``, ``[D]`` (of the channels that are here).
        channel_squares: ``sum_n x_nd^2``, ``[D]``.
        rows: How many.
        part: Which part of the activation they are of.
    """

    channel_max: Tensor
    channel_squares: Tensor
    rows: int
    part: Part

    def rms(self) -> Tensor:
        """Root mean square of all entries, a scalar."""
        return (self.channel_squares.mean() / self.rows).sqrt()


def add(sums: dict[str, Sums], name: str, x_ND: Tensor, kept: Tensor | None, part: Part) -> None:
    """Take in the rows of index `kept` (None: all).

    Nothing is taken in where there are no rows, or one holds NaN or Inf: half precision overflowed, and the gradient
    scaler will skip the step. Where other ranks may have seen something, that is noted as no rows.
    """
    rows = len(x_ND) if kept is None else len(kept)
    channel_max, channel_squares = channel_sums(x_ND, kept)
    known = sums.get(name)
    if rows == 0 or not math.isfinite(channel_max.max().item()):
        if not part.groups or known is not None:
            return
        channel_max, channel_squares, rows = torch.zeros_like(channel_max), torch.zeros_like(channel_max), 0
    if known is not None:
        channel_max = torch.maximum(known.channel_max, channel_max)
        channel_squares, rows = known.channel_squares + channel_squares, known.rows + rows
    sums[name] = Sums(channel_max, channel_squares, rows, part)


def reduced(sums: dict[str, Sums]) -> dict[str, Sums]:
    """What all ranks saw together; the same on each of them. Activations without any rows are left out."""
    names, groups = list(sums), [each.part.groups for each in sums.values()]
    if not any(groups):
        return sums
    wide = [each.part.widened(each.channel_max) for each in sums.values()]
    maxima = all_reduce_many(wide, groups, "max")
    # Ranks that hold other columns of the same rows count them once.
    rows = [each.rows if each.part.first == 0 else 0 for each in sums.values()]
    with_rows = [
        torch.cat([each.part.widened(each.channel_squares), each.channel_squares.new_tensor([count])])
        for each, count in zip(sums.values(), rows, strict=True)
    ]
    totals = all_reduce_many(with_rows, groups)
    counts = torch.stack([total[-1] for total in totals]).tolist() if totals else []
    return {
        name: Sums(largest, total[:-1], round(count), Part(len(largest)))
        for name, largest, total, count in zip(names, maxima, totals, counts, strict=True)
        if count
    }


@dataclass(frozen=True)
class Peaks:
    """Statistics of one activation as a whole, in one forward pass.

    Attributes:
        row_max: ``max_d |x_nd|`` of all rows that are here, padding included.
        largest: Of the rows that count.
        squares: The sum of their squares.
        entries: How many entries they have.
    """

    row_max: Tensor
    largest: float
    squares: float
    entries: int

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.entries)


def peaks(x_ND: Tensor, kept: Tensor | None, groups: Groups = ()) -> Peaks | None:
    """Look at the rows of index `kept` (None: all), together with the ranks of `groups`.

    Returns:
        None where `add` would take nothing in, on any rank.
    """
    row_max, row_squares = row_sums(x_ND)
    among, squares = (row_max, row_squares) if kept is None else (row_max[kept], row_squares[kept])
    entries = len(among) * x_ND.shape[1]
    if not groups:
        if entries == 0:
            return None
        largest, total = torch.stack([among.max(), squares.sum()]).tolist()
        return Peaks(row_max, largest, total, entries) if math.isfinite(largest) else None
    top = among.max() if entries else row_max.new_zeros(())
    # NaN, which not every backend orders, counts as infinite.
    largest = all_reduce(torch.nan_to_num(top, nan=math.inf, posinf=math.inf), groups, "max").item()
    total, count = all_reduce(
        torch.stack([squares.sum(), squares.new_tensor(float(entries))]).double(), groups
    ).tolist()
    return Peaks(row_max, largest, total, round(count)) if count and math.isfinite(largest) else None
