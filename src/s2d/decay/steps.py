"""Nested steps: an optimizer that calls its base class's ``step`` runs torch's hooks in both."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer


class _Running:
    """Lives as long as the step whose arguments hold it, or longer, if the traceback of a failed step is kept."""

    frame: int


class Arguments(tuple[Any, ...]):
    """Arguments of a step, as torch's hooks hand them on."""

    running: _Running


class OutermostSteps:
    """Distinguishes the step that the training loop calls from the steps inside it."""

    def __init__(self) -> None:
        """Begin; no step runs."""
        self._running: dict[int, Callable[[], _Running | None]] = {}
        self._within: dict[int, int] = {}

    def enter(self, optimizer: Optimizer) -> bool:
        """Note that a step begins; return whether it is the outermost. Its arguments must then pass through `hold`."""
        running = self._running.get(id(optimizer), lambda: None)()
        if running is None or running.frame not in map(id, _stack()):
            return True
        self._within[id(optimizer)] += 1
        return False

    def hold(self, optimizer: Optimizer, args: Iterable[Any]) -> Arguments:
        """The arguments for the outermost step."""
        held = Arguments(args)
        held.running = _Running()
        held.running.frame = id(sys._getframe(2))  # of torch's step, behind the hook that calls this
        self._running[id(optimizer)], self._within[id(optimizer)] = weakref.ref(held.running), 0
        return held

    def leave(self, optimizer: Optimizer) -> bool:
        """Note that a step ended; return whether it was the outermost."""
        within = self._within.get(id(optimizer), 0)
        self._within[id(optimizer)] = max(within - 1, 0)
        return within == 0


def _stack() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
