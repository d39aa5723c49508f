"""Splits and batches, shared by all readers of data."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor

from s2d.errors import InputError

Batch: TypeAlias = dict[str, Tensor]


Split: TypeAlias = Literal["train", "validation", "test"]


SPLITS: tuple[Split, ...] = get_args(Split)


def check_split(split: str) -> Split:
    """The split, or InputError."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    return split


def check_batch_size(batch_size: int) -> int:
    """The batch size, or InputError."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"the batch size must be a positive whole number, not {batch_size!r}")
    return batch_size
