"""Learning-rate schedules. A weight's learning rate, as a share of its peak, is the factor on the decay's strength."""

from __future__ import annotations

import copy
import functools
import gc
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

# Steps of a schedule that are searched for its peak, and the limit while it still rises.
_AHEAD = 10_000
_RISING = 100_000


class PeakRates:
    """The largest learning rate of every group of some optimizers, and which group trains a parameter."""

    def __init__(self, optimizers: Sequence[Optimizer], steps: int = 0) -> None:
        """Remember who trains what; the run has so many steps (0: not known)."""
        self._optimizers, self._steps = list(optimizers), steps
        self._sums: dict[tuple[int, int], float] = {}
        self._place: dict[int, tuple[Optimizer, int]] = {}
        self._followers: list[nn.Parameter] = []
        self._peak: dict[tuple[int, int], float] = {}
        self._scheduled: dict[int, tuple[float, ...]] = {}
        self._whole: set[int] = set()  # whose schedules were seen from their first step
        # The rate that the optimizer was built with counts as well: a warm-up, by hand or its own, begins below it.
        self._built = {key: float(group["lr"]) for key, group in self._groups()}
        self.look()

    def _groups(self) -> Iterable[tuple[tuple[int, int], dict[str, Any]]]:
        for number, optimizer in enumerate(self._optimizers):
            for index, group in enumerate(optimizer.param_groups):
                yield (number, index), group

    def __contains__(self, identity: object) -> bool:
        """Whether an optimizer holds, or follows for, the parameter of this ``id``."""
        return identity in self._place

    def look(self) -> None:
        """Look up again which optimizer trains which parameter; followers are forgotten."""
        self._followers = []
        self._place = {
            id(parameter): (self._optimizers[number], index)
            for (number, index), group in self._groups()
            for parameter in group["params"]
        }

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give untrained parameters the schedule of the first group."""
        self._followers = list(parameters)  # held, as another object could get the same id
        self._place.update({id(parameter): (self._optimizers[0], 0) for parameter in self._followers})

    def trainer(self, parameter: nn.Parameter) -> Optimizer | None:
        """The optimizer that holds a parameter; None for a replacement of the trained weight."""
        return self._place.get(id(parameter), (None, 0))[0]

    def note(self, optimizer: Optimizer) -> None:
        """Read an optimizer's present learning rates and the peaks of its schedule."""
        number = self._optimizers.index(optimizer)
        starts = tuple(float(group["initial_lr"]) for group in optimizer.param_groups if "initial_lr" in group)
        begun = len(starts) == len(optimizer.param_groups) and self._scheduled.get(number) != starts
        if begun:  # since the last step
            self._scheduled[number] = starts
            peaks, whole, sums = _peaks_ahead(optimizer, self._steps)
            self._whole = self._whole - {number} | ({number} if whole else set())
            for index, peak in enumerate(peaks):
                known = float(optimizer.param_groups[index]["initial_lr"])
                self._peak[number, index] = peak if whole or peak > known * (1 + 1e-6) else known
                self._sums.setdefault((number, index), sums[index])
        for index, group in enumerate(optimizer.param_groups):
            key = number, index
            announced = max(float(group.get("max_lr", group.get("initial_lr", 0.0))), self._built.get(key, 0.0))
            named = 0.0 if number in self._whole else announced
            self._peak[key] = max(self._peak.get(key, 0.0), named, _rate(group))

    def share(self, parameter: nn.Parameter) -> float:
        """The parameter's learning rate as a share of its peak, between 0 and 1. Call `note` first."""
        optimizer, index = self._place[id(parameter)]
        peak = self._peak[self._optimizers.index(optimizer), index]
        return _rate(optimizer.param_groups[index]) / peak if peak > 0 else 0.0

    def whole(self, parameter: nn.Parameter) -> float:
        """The sum of `share` over all steps of the run; without a schedule that can be run ahead, the steps."""
        optimizer, index = self._place[id(parameter)]
        key = self._optimizers.index(optimizer), index
        return self._sums[key] / self._peak[key] if key in self._sums and self._peak[key] > 0 else float(self._steps)

    def state(self) -> list[list[Any]]:
        """The peaks, and the sums that are known, as plain data."""
        return [[*key, value, *([self._sums[key]] if key in self._sums else [])] for key, value in self._peak.items()]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        """Restore the peaks and sums from `state`."""
        self._peak = {(a, b): value for a, b, value, *_ in state}
        self._sums = {(a, b): rest[0] for a, b, _, *rest in state if rest}


def _rate(group: dict[str, Any]) -> float:
    """The learning rate of a group; schedule-free optimizers store the rate of their own warm-up separately."""
    return min(float(group["lr"]), float(group.get("scheduled_lr", group["lr"])))


def _peaks_ahead(optimizer: Optimizer, steps: int) -> tuple[list[float], bool, list[float]]:
    """The largest rate that an optimizer's schedule will reach in each group; empty where that is not known.

    The schedule is copied and run on an optimizer without weights. A schedule that still rises at the end of the search
    has no peak, which a warning says.

    Returns:
        The rates, whether they cover the whole schedule, and the sum of each group's rates over the first ``steps``.
        A schedule of factors is run from its first step, so that a rate that it never reaches (Noam is given 1) is
        ignored.
    """
    found = [each for each in _schedulers(optimizer) if type(each).__name__ != "ReduceLROnPlateau"]
    if len(found) != 1:  # several schedulers are stepped in an unknown order
        return [], False, []
    empty = torch.optim.SGD([_without_weights(group) for group in optimizer.param_groups], lr=0.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ahead = _on(empty, found[0])
            if whole := isinstance(ahead, LambdaLR):
                ahead.last_epoch = 0
                for group, rate in zip(empty.param_groups, ahead.get_lr(), strict=True):
                    group["lr"] = float(rate)
            peaks, at, step = [_rate(group) for group in empty.param_groups], 0, 0
            sums = list(peaks) if steps else [0.0] * len(peaks)
            while step < max(_AHEAD, steps) or (at > 0.9 * step and step < _RISING):
                step += 1
                ahead.step()
                rates = [_rate(group) for group in empty.param_groups]
                if step < steps:
                    sums = [total + rate for total, rate in zip(sums, rates, strict=True)]
                if any(rate > peak * (1 + 1e-6) for rate, peak in zip(rates, peaks, strict=True)):
                    at = step
                peaks = [max(pair) for pair in zip(rates, peaks, strict=True)]
    except Exception:  # a third-party schedule may end, or need more than a step
        return [], False, []
    if at > 0.9 * step:
        warnings.warn(
            f"the learning rate still rises after {step:,} steps of its schedule, so its peak is unknown: the decay's "
            "strength is relative to the largest rate so far; let the schedule end its rise, as min(factor, 1) does",
            stacklevel=2,
        )
        return [], False, []
    # A schedule whose first rate is its largest may depend on a clock or be truncated: the optimizer's own rate counts.
    return peaks, whole and at > 0, sums


def _without_weights(group: dict[str, Any]) -> dict[str, Any]:
    # Schedulers write into rates that are tensors.
    copied = {name: each.clone() if isinstance(each, Tensor) else each for name, each in group.items()}
    return {**copied, "params": [nn.Parameter(torch.zeros(0, device="cpu"))]}


def _on(optimizer: Optimizer, scheduler: Any) -> Any:
    """A copy of a scheduler for another optimizer. The copy is shallow, as a schedule may be a method of a trainer."""
    new = object.__new__(type(scheduler))
    new.__dict__.update(scheduler.__dict__)
    new.optimizer = optimizer
    if "_schedulers" in vars(new):
        new._schedulers = [_on(optimizer, part) for part in new._schedulers]
    if "lr_lambdas" in vars(new):  # objects may count their calls
        plain = types.FunctionType | types.MethodType | functools.partial
        new.lr_lambdas = [each if isinstance(each, plain) else copy.copy(each) for each in new.lr_lambdas]
    return new


def _schedulers(optimizer: Optimizer) -> list[Any]:
    """The schedulers that set an optimizer's rates, without those that another scheduler steps."""
    holders = [each for each in gc.get_referrers(optimizer) if isinstance(each, dict)]
    objects = [o for o in gc.get_referrers(*holders) if isinstance(o, LRScheduler)] if holders else []
    objects += [o for o in gc.get_referrers(optimizer) if isinstance(o, LRScheduler)]
    found = list({id(o): o for o in objects if getattr(o, "optimizer", None) is optimizer}.values())
    inner = {id(part) for o in found for part in getattr(o, "_schedulers", [])}
    return [o for o in found if id(o) not in inner]
