"""Learning-rate schedules: a weight's learning rate as a share of its peak, the factor on the decay's strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


class PeakRates:
    """The largest learning rate of every group of some optimizers, and which group trains a parameter."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """Remember who trains what."""
        self._optimizers = list(optimizers)
        self._place: dict[int, tuple[Optimizer, int]] = {}
        self._peak: dict[tuple[int, int], float] = {}
        for optimizer in self._optimizers:
            for index, group in enumerate(optimizer.param_groups):
                self._place.update({id(parameter): (optimizer, index) for parameter in group["params"]})

    def __contains__(self, identity: object) -> bool:
        """Whether an optimizer holds, or follows for, the parameter of this ``id``."""
        return identity in self._place

    def follow(self, parameter: nn.Parameter) -> None:
        """Let a parameter that nobody trains have the schedule of the first group."""
        self._place[id(parameter)] = (self._optimizers[0], 0)

    def trainer(self, parameter: nn.Parameter) -> Optimizer | None:
        """The optimizer that holds a parameter; none for one put in the place of the weight trained."""
        return self._place.get(id(parameter), (None, 0))[0]

    def note(self, optimizer: Optimizer) -> None:
        """Look at an optimizer's rates: those of now, and the peaks that its scheduler announces."""
        for index, group in enumerate(optimizer.param_groups):
            key = (self._optimizers.index(optimizer), index)
            announced = float(group.get("max_lr", group.get("initial_lr", 0.0)))
            self._peak[key] = max(self._peak.get(key, 0.0), float(group["lr"]), announced)

    def share(self, parameter: nn.Parameter) -> float:
        """The parameter's learning rate as a share of its peak, between 0 and 1; `note` comes before."""
        optimizer, index = self._place[id(parameter)]
        peak = self._peak[self._optimizers.index(optimizer), index]
        return float(optimizer.param_groups[index]["lr"]) / peak if peak > 0 else 0.0

    def state(self) -> list[list[Any]]:
        """The peaks, as plain data."""
        return [[*key, value] for key, value in self._peak.items()]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        """Take over what `state` gave."""
        self._peak = {(a, b): value for a, b, value in state}
