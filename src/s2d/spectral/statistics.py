"""Statistics of activations over the forward passes of a refresh, and over the ranks that see other parts of them.

Shapes: N tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.distributed.sharding import Groups, Part, all_reduce, all_reduce_many


@dataclass(frozen=True)
class Sums:
    """Statistics of the channels of one activation.

    Attributes:
        channel_max: ``max_n |x_nd|``, ``[D]`` (of this rank's channels).
        channel_squares: ``sum_n x_nd^2``, ``[D]``.
        rows: Number of rows.
        part: The part of the activation that the statistics cover.
    """

    channel_max: Tensor
    channel_squares: Tensor
    rows: int
    part: Part

    def rms(self) -> Tensor:
        """Root mean square of all entries, a scalar."""
        return (self.channel_squares.mean() / self.rows).sqrt()


def add(sums: dict[str, Sums], name: str, x_ND: Tensor, kept: Tensor | None, part: Part) -> None:
    """Add the rows of index `kept` (None: all).

    Nothing is added where there are no rows, or where one holds NaN or Inf: half precision overflowed, and the gradient
    scaler will skip the step. Where other ranks may have seen rows, zero rows are recorded.
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
    """The statistics of all ranks together, equal on each of them. Activations without any rows are left out."""
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
        row_max: ``max_d |x_nd|`` of all rows of this rank, padding included.
        largest: Largest magnitude of the rows that count.
        squares: The sum of their squares.
        entries: The number of their entries.
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
    """Measure the rows of index `kept` (None: all), together with the ranks of `groups`.

    Returns:
        None where `add` would add nothing, on any rank.
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


def token_rows(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Flatten all leading dimensions and drop padding.

    Args:
        x: Activations ``[..., D]``.
        mask: ``[...]``, true (or non-zero) where a token is real. A mask that covers only the first of the leading
            dimensions is ignored when its size does not fit (pooled outputs have no padding).

    Returns:
        ``[N, D]``; a view of ``x`` where nothing is dropped.
    """
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != len(rows):
        return rows
    kept = kept_rows(mask)
    return rows if kept is None else rows.index_select(0, kept)


def kept_rows(mask: Tensor) -> Tensor | None:
    """Which rows of a flattened activation are real tokens: indices ``[M]``, or None where all are."""
    kept = mask.reshape(-1).nonzero().flatten()
    return None if len(kept) == mask.numel() else kept


def channel_sums(x_ND: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Largest magnitude and sum of squares of every channel, in one pass over the activation.

    torch's norms along the first dimension are ten times slower, and would read it twice. Sampling rows is not offered:
    outliers sit on few tokens, which a sample would miss.

    Args:
        x_ND: Activations of any floating dtype, not modified.
        kept: Indices ``[M]`` of the rows to use, see `kept_rows`; all by default.

    Returns:
        ``max_n |x_nd|`` and ``sum_n x_nd^2``, ``[D]`` each, float32; zeros without rows.
    """
    largest = x_ND.new_zeros(x_ND.shape[1], dtype=torch.float32)
    sums, squares = torch.zeros_like(largest), largest.new_empty(0)
    for piece in _pieces(x_ND, kept):
        squares = torch.mul(piece, piece, out=squares if len(squares) == len(piece) else torch.empty_like(piece))
        torch.maximum(largest, squares.amax(0), out=largest)
        sums += squares.sum(0)
    # The root of a rounded square is the number itself again (binary floating point, no overflow).
    return largest.sqrt_(), sums


def row_sums(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude and sum of squares of every row.

    Along rows torch's own reductions are fast (except the norm of order infinity). Rows of padding can be dropped from
    the sums instead of from the activation.

    Args:
        x_ND: Activations of any floating dtype, not modified.

    Returns:
        ``max_d |x_nd|`` and ``sum_d x_nd^2``, ``[N]`` each, float32 (float64 for float64).
    """
    x_ND = x_ND.detach()
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    largest = torch.maximum(x_ND.amax(1), -x_ND.amin(1)).to(dtype)
    return largest, torch.linalg.vector_norm(x_ND, dim=1, dtype=dtype).square()


def _pieces(x_ND: Tensor, kept: Tensor | None = None, offset_D: Tensor | None = None) -> Iterator[Tensor]:
    """The rows that count, less an offset, in float32 and cache-sized pieces.

    A piece may be a view of the activation, or of memory that the next piece overwrites: do not modify or keep it.
    """
    x_ND = x_ND.detach()
    count, width = len(x_ND) if kept is None else len(kept), x_ND.shape[1]
    rows = max(1, min(count, _PIECE_BYTES_CPU // (4 * width)) if x_ND.device.type == "cpu" else count)
    gathered = None if kept is None else x_ND.new_empty(rows, width)
    shifted = None if offset_D is None else x_ND.new_empty(rows, width, dtype=torch.float32)
    for first in range(0, count, rows):
        last = min(first + rows, count)
        piece = x_ND[first:last]
        if kept is not None and gathered is not None:
            piece = torch.index_select(x_ND, 0, kept[first:last], out=gathered[: last - first])
        piece = piece.float()
        if shifted is None or offset_D is None:
            yield piece
        else:
            yield torch.sub(piece, offset_D, out=shifted[: last - first])


# One pass reduces this many bytes of an activation at a time, so that they stay in the cache. On an accelerator kernel
# launches cost more, so it gets the activation in one piece.
_PIECE_BYTES_CPU = 1 << 20


OUTLIER_FRACTION = 1e-5


FEWEST_OUTLIERS = 16


def outlier_entries(
    Y_NO: Tensor,
    fraction: float = OUTLIER_FRACTION,
    row_max: Tensor | None = None,
    kept: Tensor | None = None,
    among: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The positions of the largest activations.

    The E largest entries lie in the E rows of largest maximum, and there in the E columns of largest maximum. So one
    reduction over the batch and a small top-k replace a top-k over all activations.

    Args:
        Y_NO: Activations.
        fraction: Share of the entries that count as outliers; never fewer than 16 entries.
        row_max: ``max_o |Y|`` of every row ``[N]``, if it is known; see `row_sums`.
        kept: Indices of the rows to use, see `kept_rows`; all by default.
        among: The number of entries that `fraction` refers to, where these are a part; by default that of these.

    Returns:
        Row and column indices into ``Y_NO``, ``[E]`` each, largest first.
    """
    maxima: Tensor = row_sums(Y_NO)[0] if row_max is None else row_max
    maxima = maxima if kept is None else maxima[kept]
    entries = len(maxima) * Y_NO.shape[1]
    count = min(outlier_count(entries if among is None else among, fraction), entries)
    rows = maxima.topk(min(count, len(maxima))).indices
    rows = rows if kept is None else kept[rows]
    block = Y_NO.index_select(0, rows).abs()
    columns = block.amax(0).topk(min(count, Y_NO.shape[1])).indices
    flat = block.index_select(1, columns).flatten().topk(count).indices
    return rows[flat // len(columns)], columns[flat % len(columns)]


def outlier_count(entries: int, fraction: float = OUTLIER_FRACTION) -> int:
    """How many activations count as outliers among a given number of them."""
    return max(math.ceil(fraction * entries), FEWEST_OUTLIERS)
