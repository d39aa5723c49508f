"""Windows over one sequence of tokens, each token scored in one of them."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # torch's cross-entropy skips these labels


def cut_windows(tokens: Tensor, window: int, stride: int, most: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Windows over a token sequence.

    Args:
        tokens: `[tokens]` ids.
        window: Tokens in a window.
        stride: Tokens between starts, at most `window`.
        most: Largest number of windows; None for all.

    Returns:
        Ids (padded with 0), mask and labels, each `[windows, window]`. A window's first token is never a label. Each
        token is a label at most once.
    """
    starts: list[int] = []
    for start in range(0, len(tokens) - 1, stride):
        starts.append(start)
        if start + window >= len(tokens) or len(starts) == most:
            break
    ids = torch.zeros(len(starts), window, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    scored = 0  # tokens before this index are scored already
    for row, start in enumerate(starts):
        part = tokens[start : start + window]
        ids[row, : len(part)] = part
        mask[row, : len(part)] = 1
        first = max(start + 1, scored)
        labels[row, first - start : len(part)] = part[first - start :]
        scored = start + len(part)
    return ids, mask, labels


def with_first(table: tuple[Tensor, Tensor, Tensor], token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows as `cut_windows` gives them, each with one extra first token, which is read and not scored."""
    return tuple(  # pyright: ignore[reportReturnType]
        torch.cat([torch.full_like(part[:, :1], value), part], dim=1)
        for part, value in zip(table, (token, 1, IGNORED), strict=True)
    )
