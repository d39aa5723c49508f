"""Where to put the range: min-max, percentile, or the range of least mean squared error.

Activation observers stream: they see a batch, keep a summary of fixed size, and forget the batch. Percentile and MSE
keep one counter for every bfloat16 value (65,536 counters, 512 KB a site while calibrating): the whole distribution at
a relative error of 2**-9, whatever its range and however many batches; no bins to place, no sampling, no randomness.

Weight ranges are found from the weight itself, all rows at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from s2d.errors import InputError
from s2d.quant.formats import Format
from s2d.quant.quantizer import affine_parameters, fake_quantize

DEFAULT_PERCENT = 99.9
CANDIDATES = 100
# Activations can hold outliers of 100 times the best threshold, hence a geometric grid to 1 %; weights clip mildly.
ACTIVATION_SHRINK = torch.logspace(0, -2, CANDIDATES)
WEIGHT_SHRINK = torch.linspace(1.0, 0.2, CANDIDATES)
# How many numbers the weight search may hold at once (float32: 32 MB).
WEIGHT_SEARCH_NUMBERS = 2**23


@dataclass(frozen=True)
class ObserverSpec:
    """A parsed observer: ``"minmax"``, ``"mse"``, ``"percentile"`` or ``"percentile:99.99"``."""

    kind: Literal["minmax", "percentile", "mse"]
    percent: float = DEFAULT_PERCENT

    @staticmethod
    def parse(text: str) -> ObserverSpec:
        """Read the text form.

        Raises:
            InputError: Not an observer, or a percentile outside (50, 100].
        """
        kind, colon, argument = text.partition(":")
        if kind == "minmax" and not colon:
            return ObserverSpec("minmax")
        if kind == "mse" and not colon:
            return ObserverSpec("mse")
        if kind == "percentile":
            try:
                percent = float(argument) if colon else DEFAULT_PERCENT
            except ValueError:
                percent = -1.0
            if 50.0 < percent <= 100.0:
                return ObserverSpec("percentile", percent)
            raise InputError(f"observer {text!r}: the percentile must be in (50, 100], for example percentile:99.99")
        raise InputError(f"unknown observer {text!r}; use minmax, percentile, percentile:99.99 or mse")


class Observer(ABC):
    """Watches the values of one site and ends with one range."""

    def __init__(self, name: str) -> None:
        """Start empty; ``name`` is the site, for messages."""
        self.name = name
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    @property
    def seen(self) -> bool:
        """Whether any value was seen."""
        return self.lo is not None

    def update(self, x: Tensor) -> None:
        """Take in the values of one tensor, any shape.

        Raises:
            InputError: It holds NaN or infinity.
        """
        if x.numel() == 0:
            return
        lo, hi = torch.aminmax(x.detach())
        if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
            raise InputError(f"{self.name} received NaN or infinite values; check the weights and the calibration data")
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)
        self._count(x.detach())

    def range(self, format: Format) -> tuple[Tensor, Tensor]:
        """The range ``(lo, hi)`` to quantize with, two scalars."""
        if self.lo is None or self.hi is None:
            raise InputError(f"the calibration data never reached {self.name}")
        return self._range(self.lo.float(), self.hi.float(), format)

    @abstractmethod
    def _count(self, x: Tensor) -> None: ...

    @abstractmethod
    def _range(self, lo: Tensor, hi: Tensor, format: Format) -> tuple[Tensor, Tensor]: ...


class MinMax(Observer):
    """The smallest and the largest value."""

    def _count(self, x: Tensor) -> None:
        pass

    def _range(self, lo: Tensor, hi: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        return lo, hi


class _Counting(Observer):
    """Counts how often every bfloat16 value occurred."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.counts: Tensor | None = None

    def _count(self, x: Tensor) -> None:
        codes = x.to(torch.bfloat16).view(torch.int16).flatten().to(torch.int32) + 2**15
        counts = torch.bincount(codes, minlength=2**16)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def distribution(self) -> tuple[Tensor, Tensor]:
        """The distinct values, ascending (float32), and how often each occurred (int64)."""
        assert self.counts is not None
        codes = self.counts.nonzero().squeeze(1)
        values = (codes - 2**15).to(torch.int16).view(torch.bfloat16).float()
        order = values.argsort()
        return values[order], self.counts[codes[order]]


class Percentile(_Counting):
    """Two-sided percentile: ``lo = Q(1 - p)``, ``hi = Q(p)``, with linear interpolation as in ``torch.quantile``."""

    def __init__(self, name: str, percent: float = DEFAULT_PERCENT) -> None:
        """Start empty; ``percent`` is in (50, 100]."""
        super().__init__(name)
        self.percent = percent

    def _range(self, lo: Tensor, hi: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        values, counts = self.distribution()
        cumulative = counts.cumsum(0)
        last = int(cumulative[-1]) - 1

        def at(position: float) -> Tensor:
            below = int(position)
            ranks = torch.tensor([below, min(below + 1, last)], device=cumulative.device)
            left, right = values[torch.searchsorted(cumulative, ranks, right=True)]
            return torch.lerp(left, right, position - below)

        fraction = self.percent / 100.0
        # Counted values are rounded to bfloat16, which may step over the true ends.
        return at((1.0 - fraction) * last).clamp(lo, hi), at(fraction * last).clamp(lo, hi)


class MeanSquaredError(_Counting):
    """The clipping threshold of least mean squared error, out of 100.

    A candidate clips ``[lo, hi]`` to ``[-t, t]``, t shrinking geometrically from the largest magnitude to 1 % of it. A
    short side of the range (the negative tail of GELU) is so left whole until t reaches it.
    """

    def _range(self, lo: Tensor, hi: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        values, counts = self.distribution()
        threshold = torch.maximum(-lo, hi) * ACTIVATION_SHRINK.to(lo.device)
        los, his = torch.maximum(lo, -threshold), torch.minimum(hi, threshold)
        scale, zero_point = affine_parameters(los, his, format, format.symmetric)
        error = fake_quantize(values.expand(len(los), -1), scale[:, None], zero_point[:, None], format) - values
        best = (error.double().square() @ counts.double()).argmin()
        return los[best], his[best]


def make_observer(text: str, name: str) -> Observer:
    """The streaming observer that a text names, for the activations of site ``name``.

    Raises:
        InputError: There is no such observer.
    """
    spec = ObserverSpec.parse(text)
    if spec.kind == "minmax":
        return MinMax(name)
    return MeanSquaredError(name) if spec.kind == "mse" else Percentile(name, spec.percent)


def weight_range(weight: Tensor, observer: str, format: Format, *, name: str) -> tuple[Tensor, Tensor]:
    """The range of every row of a weight.

    Args:
        weight: ``[rows, columns]``; pass one row for one range per tensor.
        observer: ``"minmax"``, ``"percentile[:p]"`` or ``"mse"`` (100 candidates, each shrinks the min-max range).
        format: The number format; a symmetric one gets a symmetric range.
        name: The site, for messages.

    Returns:
        ``lo`` and ``hi``, each ``[rows]``, float32.

    Raises:
        InputError: Unknown observer, or NaN or infinity in the weight.
    """
    spec = ObserverSpec.parse(observer)
    weight = weight.detach().float()
    lo, hi = torch.aminmax(weight, dim=1)
    if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
        raise InputError(f"{name} holds NaN or infinite weights; repair the checkpoint first")
    if spec.kind == "percentile":
        ordered = weight.sort(dim=1).values  # torch.quantile refuses rows of more than 2**24 numbers
        fraction = spec.percent / 100.0
        return _at(ordered, 1.0 - fraction), _at(ordered, fraction)
    if spec.kind == "mse":
        return _mse_rows(weight, lo, hi, format)
    return lo, hi


def _at(ordered: Tensor, fraction: float) -> Tensor:
    """The quantile of every sorted row ``[rows, columns]``, linearly interpolated."""
    last = ordered.shape[1] - 1
    below = int(fraction * last)
    return torch.lerp(ordered[:, below], ordered[:, min(below + 1, last)], fraction * last - below)


def _mse_rows(weight: Tensor, lo: Tensor, hi: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    if format.symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    best_error = torch.full_like(lo, torch.inf)
    best = torch.ones_like(lo)
    together = max(1, WEIGHT_SEARCH_NUMBERS // weight.numel())
    for shrink in WEIGHT_SHRINK.to(weight.device).split(together):
        scale, zero_point = affine_parameters(shrink[:, None] * lo, shrink[:, None] * hi, format, format.symmetric)
        rounded = fake_quantize(weight.expand(len(shrink), -1, -1), scale[..., None], zero_point[..., None], format)
        error, index = rounded.sub_(weight).square_().sum(-1).min(dim=0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, shrink[index], best)
    return best * lo, best * hi
