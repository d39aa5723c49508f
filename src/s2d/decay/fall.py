"""The strength with which a selected component falls by a given factor over a run of known length.

The paper's lambda is set for its own run: 12,500 steps take a singular value of 7.9 to 3.9. A shorter run with the same
lambda changes nothing. The factor (here 2) says the same for any length.

Decoupled, the law d sigma / dt = -lambda r(t) sigma^n is solved for lambda, where r is the learning rate as a share of
its peak: the sum of r over the run is known from the schedule. Coupled, the optimizer scales the penalty's gradient by
what it knows of the loss's gradient, so that no formula gives the speed. There every refresh compares the value with
the course that it should take, and doubles or halves lambda. The penalty's gradient never becomes longer than that
of the loss: the weight would no longer learn.
"""

from __future__ import annotations

import math
from typing import Any

# What a refresh multiplies a coupled strength by, or divides it by.
PACE = 2.0


class Fall:
    """The strength of every weight."""

    def __init__(self, factor: float, power: float, start: float) -> None:
        """Nothing is selected yet.

        Args:
            factor: What the largest selected value of a weight is divided by over the whole run, above 1.
            power: n of the penalty.
            start: First strength of the coupled form.
        """
        self.factor, self.power, self._start = factor, power, start
        self._strengths: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._spent: dict[str, float] = {}

    def strength(self, name: str) -> float:
        """The strength of a weight; 0 before it was first selected."""
        return self._strengths.get(name, 0.0)

    def spend(self, name: str, share: float) -> None:
        """A step was made at this share of the peak learning rate."""
        if name in self._spent:
            self._spent[name] += share

    def forget(self, name: str) -> None:
        """Another weight took the place of the one of this name: its course begins anew."""
        for known in (self._strengths, self._first, self._spent):
            known.pop(name, None)

    def solve(self, name: str, sigma: float, whole: float) -> None:
        """Decoupled: set the strength of a weight that has none yet.

        Args:
            name: The weight.
            sigma: Its largest selected value.
            whole: Sum over the run of the learning rate as a share of its peak.
        """
        if sigma <= 0 or whole <= 0:
            return
        n = self.power - 1
        time = math.log(self.factor) if n == 0 else math.expm1(n * math.log(self.factor)) / (n * sigma**n)
        self._strengths[name] = time / whole

    def steer(self, name: str, sigma: float, whole: float, most: float) -> None:
        """Coupled: correct the strength of a weight at a refresh.

        Args:
            name: The weight.
            sigma: Its largest selected value now.
            whole: See `solve`.
            most: The strength at which the penalty's gradient is as long as that of the loss.
        """
        if sigma <= 0 or whole <= 0:
            return
        if name not in self._first:
            self._first[name], self._spent[name], self._strengths[name] = sigma, 0.0, min(self._start, most)
            return
        wanted = -math.log(self.factor) * min(self._spent[name] / whole, 1.0)
        behind = math.log(sigma / self._first[name]) > wanted
        self._strengths[name] = min(self._strengths[name] * (PACE if behind else 1 / PACE), most)

    def state(self) -> dict[str, Any]:
        """Plain data for `load_state`."""
        return {"strengths": dict(self._strengths), "first": dict(self._first), "spent": dict(self._spent)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._strengths, self._first = dict(state["strengths"]), dict(state["first"])
        self._spent = dict(state["spent"])
