"""Observers: a range by min-max, percentile, the best of a few percentiles, or the range of least squared error.

Activation observers stream: they see a batch, keep a summary of fixed size, and forget the batch. Percentile and MSE
keep one counter for every bfloat16 value (65,536 counters, 512 KB a site while calibrating): the whole distribution at
a relative error of 2**-9, for any range and any number of batches, without bins, sampling or randomness.

Weight ranges are found from the weight itself, all rows at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from s2d.distributed.sharding import Groups, all_reduce
from s2d.errors import InputError
from s2d.quant.numerics.formats import Format, IntFormat
from s2d.quant.numerics.quantizer import affine_parameters, fake_quantize

# Rounds values to what a range can hold: (values, lo, hi) -> values, the ends broadcast against the values.
Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]

DEFAULT_PERCENT = 99.9
# The list that RepQ-ViT (arXiv 2212.08254, released code) picks from.
DEFAULT_PERCENTS = (99.9, 99.99, 99.999)
CANDIDATES = 100
# Activations can hold outliers of 100 times the best threshold, hence a geometric grid to 1 %; weights clip mildly.
ACTIVATION_SHRINK = torch.logspace(0, -2, CANDIDATES)
WEIGHT_SHRINK = torch.linspace(1.0, 0.2, CANDIDATES)
# How many numbers the weight search may hold at once: 4 MB of float32 stay in a core's cache, which halves its time.
WEIGHT_SEARCH_NUMBERS = 2**20


@dataclass(frozen=True)
class ObserverSpec:
    """A parsed observer: ``"minmax"``, ``"mse"``, ``"percentile[:99.99]"`` or ``"percentiles[:99,99.9,100]"``."""

    kind: Literal["minmax", "percentile", "percentiles", "mse"]
    percents: tuple[float, ...] = ()

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
        if kind in ("percentile", "percentiles"):
            percents = (DEFAULT_PERCENT,) if kind == "percentile" else DEFAULT_PERCENTS
            try:
                percents = tuple(float(part) for part in argument.split(",")) if colon else percents
            except ValueError:
                percents = ()
            if percents and all(50.0 < percent <= 100.0 for percent in percents):
                if kind == "percentiles":
                    return ObserverSpec("percentiles", percents)
                if len(percents) == 1:
                    return ObserverSpec("percentile", percents)
            raise InputError(f"observer {text!r}: a percentile must be in (50, 100], for example percentile:99.99")
        raise InputError(f"unknown observer {text!r}; use minmax, percentile, percentile:99.99, percentiles or mse")


def affine_rounding(format: Format) -> Rounding:
    """Fake quantization of that format as a `Rounding`."""

    def rounding(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return fake_quantize(x, *affine_parameters(lo, hi, format, format.symmetric), format)

    return rounding


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

    def add_up(self, groups: Groups) -> None:
        """Merge the observers of this site on all ranks; every rank ends with exactly the same state.

        Every rank must have seen values.
        """
        assert self.lo is not None and self.hi is not None
        ends = all_reduce(torch.stack([-self.lo, self.hi]), groups, "max")
        self.lo, self.hi = -ends[0], ends[1]

    def range(self, format: Format, rounding: Rounding | None = None) -> tuple[Tensor, Tensor]:
        """The range ``(lo, hi)`` to quantize with, two scalars.

        Args:
            format: The number format.
            rounding: How a range rounds, for quantizers that are not the plain ones of ``format``.
        """
        if self.lo is None or self.hi is None:
            raise InputError(
                f"the calibration data never reached {self.name}; feed data that does, or override it with keep"
            )
        return self._range(self.lo.float(), self.hi.float(), format if rounding is None else rounding)

    @abstractmethod
    def _count(self, x: Tensor) -> None: ...

    @abstractmethod
    def _range(self, lo: Tensor, hi: Tensor, rounding: Format | Rounding) -> tuple[Tensor, Tensor]:
        """The range, for the plain rounding of a format, or for another."""


class MinMax(Observer):
    """The smallest and the largest value."""

    def _count(self, x: Tensor) -> None:
        pass

    def _range(self, lo: Tensor, hi: Tensor, rounding: Format | Rounding) -> tuple[Tensor, Tensor]:
        return lo, hi


class _Counting(Observer):
    """Counts how often every bfloat16 value occurred."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.counts: Tensor | None = None

    def _count(self, x: Tensor) -> None:
        counts = torch.bincount(value_codes(x), minlength=2**16)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def add_up(self, groups: Groups) -> None:
        super().add_up(groups)
        assert self.counts is not None
        all_reduce(self.counts, groups)

    def distribution(self) -> tuple[Tensor, Tensor]:
        """The distinct values, ascending (float32), and how often each occurred (int64)."""
        assert self.counts is not None
        return coded_distribution(self.counts)

    def quantiles(self, percents: tuple[float, ...], lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper quantile for each percentile, as in ``torch.quantile``, kept inside ``[lo, hi]``."""
        values, counts = self.distribution()
        cumulative = counts.cumsum(0)
        last = int(cumulative[-1]) - 1
        # Each fraction is formed as the weight search forms it, so that both agree to the last digit.
        upper = torch.tensor([percent / 100.0 for percent in percents], dtype=torch.float64) * last
        lower = torch.tensor([1.0 - percent / 100.0 for percent in percents], dtype=torch.float64) * last

        def at(position: Tensor) -> Tensor:
            below = position.long()
            ranks = torch.stack([below, (below + 1).clamp(max=last)]).to(cumulative.device)
            left, right = values[torch.searchsorted(cumulative, ranks, right=True)]
            return torch.lerp(left, right, (position - below).to(left))

        # Counted values are rounded to bfloat16, which may step over the true ends.
        return at(lower).clamp(lo, hi), at(upper).clamp(lo, hi)

    def best(self, los: Tensor, his: Tensor, rounding: Format | Rounding) -> tuple[Tensor, Tensor]:
        """The candidate range (``[candidates]`` each) of least squared error over all that was counted."""
        values, counts = self.distribution()
        if isinstance(rounding, IntFormat) and rounding.qmax - rounding.qmin < len(values):
            index = affine_errors(values, counts, los, his, rounding).argmin()
            return los[index], his[index]
        rounds = rounding if callable(rounding) else affine_rounding(rounding)
        error = rounds(values.expand(len(los), -1), los[:, None], his[:, None]) - values
        index = (error.double().square() @ counts.double()).argmin()
        return los[index], his[index]


def affine_errors(values: Tensor, counts: Tensor, los: Tensor, his: Tensor, format: IntFormat) -> Tensor:
    """The squared error of rounding to each range's integers, from sums over the values that share a code.

    No value is rounded one by one. All values between two midpoints of neighbouring levels share a level; their squared
    error follows from their count, their sum and the sum of their squares.

    Args:
        values: ``[V]``, ascending.
        counts: How often each occurs, ``[V]``.
        los: Smallest value of each range, ``[R]``.
        his: Largest value of each range, ``[R]``.
        format: The integers.

    Returns:
        Sums of squared errors, ``[R]`` float64.
    """
    scale_R, zero_R = affine_parameters(los, his, format, format.symmetric)
    codes_L = torch.arange(format.qmin, format.qmax + 1, device=values.device)
    levels_RL = (codes_L - zero_R[:, None]).double() * scale_R[:, None].double()
    values, counts = values.double(), counts.double()
    first = torch.searchsorted(values, (levels_RL[:, 1:] + levels_RL[:, :-1]) / 2)
    ends = F.pad(F.pad(first, (1, 0)), (0, 1), value=len(values))
    count, total, squares = (
        F.pad(sums.cumsum(0), (1, 0))[ends].diff(dim=1) for sums in (counts, counts * values, counts * values.square())
    )
    return (squares - 2 * levels_RL * total + levels_RL.square() * count).sum(1)


def value_codes(x: Tensor) -> Tensor:
    """Values rounded to bfloat16, as indices 0..65535 (int32, flat): the bins in which observers count."""
    return x.to(torch.bfloat16).view(torch.int16).flatten().to(torch.int32).add_(2**15)


def coded_distribution(counts: Tensor) -> tuple[Tensor, Tensor]:
    """From counts (or sums of weights) by `value_codes`, ``[65536]``: the values found, ascending, and theirs."""
    codes = counts.nonzero().squeeze(1)
    values = (codes - 2**15).to(torch.int16).view(torch.bfloat16).float()
    order = values.argsort()
    return values[order], counts[codes[order]]


class Percentile(_Counting):
    """Two-sided percentile: ``lo = Q(1 - p)``, ``hi = Q(p)``, with linear interpolation as in ``torch.quantile``."""

    def __init__(self, name: str, percent: float = DEFAULT_PERCENT) -> None:
        """Start empty; ``percent`` is in (50, 100]."""
        super().__init__(name)
        self.percent = percent

    def _range(self, lo: Tensor, hi: Tensor, rounding: Format | Rounding) -> tuple[Tensor, Tensor]:
        los, his = self.quantiles((self.percent,), lo, hi)
        return los[0], his[0]


class BestPercentile(_Counting):
    """The percentile of least squared error out of a short list."""

    def __init__(self, name: str, percents: tuple[float, ...] = DEFAULT_PERCENTS) -> None:
        """Start empty; every one of ``percents`` is in (50, 100]."""
        super().__init__(name)
        self.percents = percents

    def _range(self, lo: Tensor, hi: Tensor, rounding: Format | Rounding) -> tuple[Tensor, Tensor]:
        return self.best(*self.quantiles(self.percents, lo, hi), rounding)


class MeanSquaredError(_Counting):
    """The clipping threshold of least mean squared error, out of 100.

    A candidate clips ``[lo, hi]`` to ``[-t, t]``, t shrinking geometrically from the largest magnitude to 1 % of it. So
    a short side of the range (the negative tail of GELU) is not clipped until t reaches it.
    """

    def _range(self, lo: Tensor, hi: Tensor, rounding: Format | Rounding) -> tuple[Tensor, Tensor]:
        threshold = torch.maximum(-lo, hi) * ACTIVATION_SHRINK.to(lo.device)
        return self.best(torch.maximum(lo, -threshold), torch.minimum(hi, threshold), rounding)


def make_observer(text: str, name: str) -> Observer:
    """The streaming observer that a text names, for the activations of site ``name``.

    Raises:
        InputError: There is no such observer.
    """
    spec = ObserverSpec.parse(text)
    if spec.kind == "minmax":
        return MinMax(name)
    if spec.kind == "mse":
        return MeanSquaredError(name)
    return Percentile(name, *spec.percents) if spec.kind == "percentile" else BestPercentile(name, spec.percents)


def weight_range(weight: Tensor, observer: str, format: Format, *, name: str) -> tuple[Tensor, Tensor]:
    """The range of every row of a weight.

    Args:
        weight: ``[rows, columns]``; pass one row for one range per tensor.
        observer: ``"minmax"``, ``"percentile[:p]"``, ``"percentiles[:p,q,...]"`` or ``"mse"`` (100 candidates, each
            shrinks the min-max range).
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
        (los, his) = row_quantiles(weight, spec.percents)
        return los[0], his[0]
    if spec.kind == "percentiles":
        return best_percentiles(weight, spec.percents, affine_rounding(format))
    if spec.kind == "mse":
        return _mse_rows(weight, lo, hi, format)
    return lo, hi


def row_quantiles(rows: Tensor, percents: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Lower and upper quantile of every row for each percentile, linearly interpolated as in ``torch.quantile``.

    Only the tails that the percentiles cut off are put in order, not the rows.

    Args:
        rows: ``[rows, columns]`` float32.
        percents: Each in (50, 100].

    Returns:
        ``los`` and ``his``, each ``[percents, rows]``.
    """
    last = rows.shape[1] - 1
    tail = min(last + 1, math.ceil((1.0 - min(percents) / 100.0) * last) + 2)
    # ordered[0] is the extreme, ordered[i] the i-th from that end. Beyond a quarter a full sort is faster than topk.
    if tail * 4 > last:
        ordered = rows.sort(dim=1).values.T
        bottom, top = ordered, ordered.flip(0)
    else:
        bottom, top = (rows.topk(tail, dim=1, largest=largest).values.T for largest in (False, True))

    def at(ordered: Tensor, position: float) -> Tensor:
        below = int(position)
        return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], position - below)

    positions = [(1.0 - percent / 100.0) * last for percent in percents]
    return torch.stack([at(bottom, p) for p in positions]), torch.stack([at(top, p) for p in positions])


def best_percentiles(rows: Tensor, percents: tuple[float, ...], rounding: Rounding) -> tuple[Tensor, Tensor]:
    """For every row the percentile range of least squared error, all rows at once.

    Args:
        rows: ``[rows, columns]`` float32: output channels of a weight, or channels of an activation (tokens along the
            columns).
        percents: The list to pick from, each in (50, 100].
        rounding: How a range rounds.

    Returns:
        ``lo`` and ``hi``, each ``[rows]``.
    """
    los, his = row_quantiles(rows, percents)
    errors = [
        (rounding(rows, lo[:, None], hi[:, None]) - rows).square_().sum(1) for lo, hi in zip(los, his, strict=True)
    ]
    best = torch.stack(errors).argmin(0, keepdim=True)
    return los.gather(0, best)[0], his.gather(0, best)[0]


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
