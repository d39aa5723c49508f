"""Accumulators of one weight over batches. Their size does not depend on the number of batches.

The first pass fills `Survey`. The second pass fills `Judgement`; it uses the directions and quantizers that the first
pass found.

Shapes: N tokens (rows), O outputs, I inputs, K components, E outlier entries, S sampled rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from s2d.errors import InputError
from s2d.io.files import JSON
from s2d.quant.numerics.formats import MAX_BITS, IntFormat
from s2d.quant.numerics.observers import Percentile, make_observer, weight_range
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.spec import QuantSpec, TensorSpec
from s2d.spectral.pcdr import Dominance
from s2d.spectral.statistics import outlier_entries
from s2d.spectral.svd import top_singular
from s2d.spectral.triplets import Triplets
from s2d.targets.weights import Target

# Rows on which the quantization error is measured, spread over all of the data.
SAMPLE_ROWS = 4096
# A histogram has narrow bins over this share of the values.
_BULK = 0.999


class Survey:
    """Extremes, energies and the second moment of one weight's inputs and outputs.

    Attributes:
        rows: Rows seen.
        input_max: Largest magnitude of an input.
        output_max: Largest magnitude of an output.
        quantizer: Quantizer of the inputs; `observer` finds its range. None where the inputs are not quantized.
        observer: Range observer of the inputs. None where no range has to be found beforehand.
    """

    def __init__(self, target: Target, spec: QuantSpec) -> None:
        self.target, self.spec = target, spec
        self.outputs, self.inputs = target.matrix().shape
        self.rows = 0
        self.input_max = self.output_max = 0.0
        self._input_squares = self._output_squares = 0.0
        self._moment: Tensor | None = None
        self.quantizer = self.observer = None
        if spec.activation is not None:
            self.quantizer = Quantizer(spec.activation.format, spec.activation.granularity, name=target.name)
            self.quantizer.to(target.parameter.device)
            if not self.quantizer.dynamic:
                self.observer = make_observer(spec.activation.observer, target.name)

    def add(self, x_NI: Tensor, A_NO: Tensor) -> None:
        """Take in rows.

        Raises:
            InputError: NaN or Inf; the module is named.
        """
        self.rows += len(x_NI)
        self.input_max = max(self.input_max, self._peak(x_NI, "input"))
        self.output_max = max(self.output_max, self._peak(A_NO, "output"))
        self._input_squares += torch.linalg.vector_norm(x_NI).item() ** 2
        self._output_squares += torch.linalg.vector_norm(A_NO).item() ** 2
        # The second moment is taken on the narrower side, so all of them together are never larger than the weights.
        side = A_NO if self.outputs <= self.inputs else x_NI
        moment = side.mT @ side
        self._moment = moment if self._moment is None else self._moment.add_(moment)
        if self.observer is not None:
            self.observer.update(x_NI)

    def _peak(self, values: Tensor, side: str) -> float:
        low, high = (end.item() for end in torch.aminmax(values))
        peak = max(-low, high)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"the {side} of {self.target.module_name or 'the model'} holds NaN or Inf; look at what comes before "
                "it: a damaged weight, inputs out of range, or half precision that overflows"
            )
        return peak

    @property
    def input_ratio(self) -> float:
        """Largest input over the RMS of all inputs."""
        return _over_rms(self.input_max, self._input_squares, self.rows * self.inputs)

    @property
    def output_ratio(self) -> float:
        """Largest output over the RMS of all outputs."""
        return _over_rms(self.output_max, self._output_squares, self.rows * self.outputs)

    def directions(self, k: int) -> Triplets:
        """Principal directions of the outputs, in ``U [O, K]``: left singular vectors of ``W C^(1/2)``.

        C is the second moment of the inputs, ``W C W^T`` that of the outputs. The call frees the stored moment.
        """
        assert self._moment is not None
        moment, self._moment = self._moment, None
        k = min(k, self.outputs, self.inputs)
        if self.outputs <= self.inputs:
            return top_singular(moment, k, name=self.target.name)
        wide = torch.float32 if moment.device.type == "mps" else torch.float64
        values, vectors = torch.linalg.eigh(moment.to(wide))
        # C = R R^T, and W R has the left singular vectors of W C^(1/2).
        R = (vectors * values.clamp_min(0).sqrt()).float()
        return top_singular(self.target.matrix().float() @ R, k, name=self.target.name)


class Judgement:
    """Dominance over the outliers, the error of quantizing, and a histogram of the inputs."""

    def __init__(self, survey: Survey, triplets: Triplets, k: int, pictured: bool) -> None:
        self.target, self.spec = survey.target, survey.spec
        self._weight = Dominance(triplets)
        found = survey.directions(k)
        # The part of A along directions U is U U^T A: of the form U diag(S) V^T x with S = 1, V = U, x = A.
        self._data = Dominance(replace(found, S=torch.ones_like(found.S), V=found.U))
        self._picture = Percentile(self.target.name) if pictured else None
        self._positions = sample_positions(survey.rows, SAMPLE_ROWS)
        self._offset = 0
        self._noise_O = self._signal_O = torch.zeros((), dtype=torch.float64)
        spec = self.spec.weight
        self._weight_quantizer = None if spec is None else _weight_quantizer(self.target, spec)
        self._quantizer = survey.quantizer
        if survey.quantizer is not None:
            if survey.observer is not None:
                survey.quantizer.set_range(*survey.observer.range(survey.quantizer.format))
            survey.quantizer.enabled = True

    def add(self, x_NI: Tensor, A_NO: Tensor) -> None:
        """Take in rows."""
        row_E, column_E = outlier_entries(A_NO)
        value_E = A_NO[row_E, column_E]
        self._weight.add(x_NI[row_E], value_E, column_E)
        self._data.add(A_NO[row_E], value_E, column_E)
        if self._picture is not None:
            self._picture.update(x_NI)
        ends = torch.tensor([self._offset, self._offset + len(x_NI)])
        first, last = torch.searchsorted(self._positions, ends).tolist()
        if first < last:
            sampled = (self._positions[first:last] - self._offset).to(x_NI.device)
            whole = len(sampled) == len(x_NI)  # nothing is copied then
            self._add_error(x_NI if whole else x_NI[sampled], A_NO if whole else A_NO[sampled])
        self._offset += len(x_NI)

    def _add_error(self, x_SI: Tensor, A_SO: Tensor) -> None:
        W = self.target.matrix()
        # The output of a half-precision module is itself rounded.
        exact_SO = A_SO if W.dtype == torch.float32 else x_SI @ W.float().mT
        W = W.float()
        if self._weight_quantizer is not None:
            W = self._weight_quantizer(W)
        if self._quantizer is not None:
            x_SI = self._quantizer(x_SI)
        self._signal_O = self._signal_O + exact_SO.square().sum(0).double().cpu()
        self._noise_O = self._noise_O + (x_SI @ W.mT).sub_(exact_SO).square_().sum(0).double().cpu()

    @property
    def pcdr(self) -> list[float]:
        """PCDR_1..K of the weight's singular components."""
        return self._weight.ratios().tolist()

    @property
    def pcdr_data(self) -> list[float]:
        """PCDR_1..K of the outputs' principal directions."""
        return self._data.ratios().tolist()

    @property
    def error(self) -> float:
        """``||Q(x) Q(w)^T - x w^T|| / ||x w^T||`` of the typical row w of W (the median); 0 where all outputs are 0.

        Taken over all outputs at once, the few outlier channels would dominate the denominator. A layer whose other
        channels are noise would then look harmless.
        """
        alive_O = self._signal_O > 0
        if not bool(alive_O.any()):
            return 0.0
        return (self._noise_O[alive_O] / self._signal_O[alive_O]).sqrt().quantile(0.5).item()

    @property
    def histogram(self) -> JSON | None:
        """Histogram of the inputs. None where none was asked for, or where no uniform grid holds for all tokens."""
        quantizer = self._quantizer
        if self._picture is None or quantizer is None or quantizer.granularity != "tensor":
            return None
        format = quantizer.format
        if not isinstance(format, IntFormat):
            return None
        # Levels of 16 bits are closer together than a bin is wide.
        codes = torch.arange(format.qmin, format.qmax + 1 if format.bits <= MAX_BITS else format.qmin)
        levels = (codes - quantizer.zero_point.cpu()) * quantizer.scale.cpu()
        assert self._picture.lo is not None and self._picture.hi is not None
        ends = self._picture.lo.item(), self._picture.hi.item()
        return binned(*self._picture.distribution(), ends, levels.tolist())


def _weight_quantizer(target: Target, spec: TensorSpec) -> Quantizer:
    W = target.matrix().float()
    rows = W if spec.granularity == "channel" else W.reshape(1, -1)
    quantizer = Quantizer(spec.format, spec.granularity, name=target.name, channels=len(W)).to(W.device)
    if not quantizer.dynamic:
        lo, hi = weight_range(rows, spec.observer, spec.format, name=target.name)
        quantizer.set_range(lo.reshape(quantizer.scale.shape), hi.reshape(quantizer.scale.shape))
    quantizer.enabled = True
    return quantizer


def sample_positions(rows: int, most: int) -> Tensor:
    """Which rows are sampled: all, or one at random out of each of `most` equal parts; sorted, the same every time.

    Evenly spaced rows could coincide with the sequence length, and the first tokens would be sampled too often.
    """
    if rows <= most:
        return torch.arange(rows)
    ends = torch.arange(most + 1) * rows // most
    jitter = torch.rand(most, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ends[:-1] + (jitter * ends.diff()).long()


def binned(values: Tensor, counts: Tensor, ends: tuple[float, float], levels: list[float]) -> JSON:
    """A distribution as a histogram: narrow bins over the middle 99.9 % of the values, wide ones over the tails.

    Args:
        values: Distinct values ``[n]``, ascending.
        counts: How often each occurred, ``[n]``.
        ends: The smallest and the largest value; counted values are rounded and may lie beyond.
        levels: Values that the quantizer's codes represent, ascending.

    Returns:
        ``edges`` (one more than bins, increasing), ``counts``, ``grid`` (the levels) and ``of``.
    """
    values, counts = values.double().cpu().clamp(*ends), counts.cpu()
    cumulative = counts.cumsum(0)
    ranks = torch.tensor([(1 - _BULK) / 2, (1 + _BULK) / 2], dtype=torch.float64) * cumulative[-1]
    low, high = values[torch.searchsorted(cumulative, ranks.long()).clamp_max(len(values) - 1)].tolist()
    margin = 1e-9 + 1e-6 * max(map(abs, ends))  # so that both ends lie inside a bin
    first, last = ends[0] - margin, ends[1] + margin
    stretches = ((first, low, 25), (low, high, 97), (high, last, 65))
    edges = torch.unique(torch.cat([torch.linspace(*stretch, dtype=torch.float64) for stretch in stretches]))
    bins = torch.bucketize(values, edges[1:-1], right=True)
    counted = torch.bincount(bins, weights=counts.double(), minlength=len(edges) - 1)
    return {"edges": edges.tolist(), "counts": counted.long().tolist(), "grid": levels, "of": "input"}


def _over_rms(peak: float, squares: float, count: int) -> float:
    return peak / math.sqrt(squares / count) if squares > 0 else 0.0
