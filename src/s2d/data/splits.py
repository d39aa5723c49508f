"""Splits chosen by content, so they do not depend on the order of the examples.

Labelled examples are taken out of train, the same share of every class. Unlabelled examples are split by their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

from s2d.data.base import SPLITS, Split
from s2d.errors import InputError

Example = TypeVar("Example")

# Shares taken from train for splits that have no data of their own.
CARVED: tuple[tuple[Split, float], ...] = (("test", 0.2), ("validation", 0.1))


def carve(labels: Sequence[str], contents: Sequence[bytes], share: float) -> tuple[list[int], list[int]]:
    """Indices of the examples that stay and of those that are taken, both in the old order.

    Equal contents stay together where possible. No example is taken from a class of one.
    """
    by_class: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    taken: set[int] = set()
    for indices in by_class.values():
        indices.sort(key=lambda index: (hashlib.sha256(contents[index]).digest(), index))
        taken.update(indices[: max(1, round(share * len(indices))) if len(indices) > 1 else 0])
    return [i for i in range(len(labels)) if i not in taken], [i for i in range(len(labels)) if i in taken]


def split_by_content(
    examples: Iterable[tuple[Example, bytes]], train: int, heldout: int, *, what: str, shown: str
) -> dict[Split, list[Example]]:
    """Each distinct content once, in the split that its SHA-256 gives: 5 % validation, 5 % test, 90 % train.

    Args:
        examples: Each with its content; no more of them are asked for once every split is full.
        train: Most examples in the train split.
        heldout: Most examples in the validation and in the test split.
        what: Noun for an example, for messages.
        shown: Source of the examples, for messages.

    Raises:
        InputError: A split would hold nothing.
    """
    if train < 1 or heldout < 1:
        raise InputError(f"train and heldout must be at least 1 {what}, not {train} and {heldout}")
    most: dict[Split, int] = {"train": train, "validation": heldout, "test": heldout}
    found: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    known: set[bytes] = set()
    for example, content in examples:
        mark = hashlib.sha256(content).digest()
        if mark in known:
            continue
        known.add(mark)
        share = int.from_bytes(mark[:4], "big") / 2**32
        split: Split = "validation" if share < 0.05 else "test" if share < 0.1 else "train"
        if len(found[split]) < most[split]:
            found[split].append(example)
            if all(len(found[each]) >= most[each] for each in SPLITS):
                break
    for split in SPLITS:
        if not found[split]:
            raise InputError(
                f"{shown} holds too few different {what}s for a {split} split; give at least a few hundred"
            )
    return found
