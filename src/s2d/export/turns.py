"""Timing calls against each other: in turns, so that a busy machine is busy for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


def take_turns(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """The milliseconds of every call of each, sorted, after one turn that does not count."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, times in zip(calls, spent, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                times.append((time.perf_counter() - start) * 1e3)
    return [sorted(times) for times in spent]
