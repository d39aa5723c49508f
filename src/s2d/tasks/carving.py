"""Splits taken out of train: the same share of every class, chosen by content and so independent of the order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from s2d.tasks.base import Split

# Shares taken from train for splits that have no data of their own.
CARVED: tuple[tuple[Split, float], ...] = (("test", 0.2), ("validation", 0.1))


def carve(labels: Sequence[str], contents: Sequence[bytes], share: float) -> tuple[list[int], list[int]]:
    """Indices of what stays and of what is taken, both in the old order.

    Equal contents stay together wherever the cut allows; a class of one example gives nothing.
    """
    by_class: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    taken: set[int] = set()
    for indices in by_class.values():
        indices.sort(key=lambda index: (hashlib.sha256(contents[index]).digest(), index))
        taken.update(indices[: max(1, round(share * len(indices))) if len(indices) > 1 else 0])
    return [i for i in range(len(labels)) if i not in taken], [i for i in range(len(labels)) if i in taken]
