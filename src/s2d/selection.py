"""Selection: which components of a model's weights make the outliers that low-bit grids cannot hold.

Three metrics answer the question "component of what?". They see the same forward passes and give the same kind of
answer, :class:`Components`, which :mod:`s2d.decay` then shrinks.

- ``"weight"``: singular components of W, selected by PCDR (the paper, arXiv 2602.14432, its selection rule).
- ``"data"``: components of W C^(1/2), C the second moment of the inputs: principal directions u of the outputs.
- ``"site"``: where a quantizer will sit (inputs of linear layers, attention's operands), the channels whose maximum exceeds a multiple of
  the site's RMS. A per-tensor grid is stretched by channels, so the directions are the coordinate axes e_j; what is
  shrunk is whatever *writes* channel j: a row of the linear layer before, or a norm's gain (diag(gamma) has the
  singular values |gamma_j| and the singular vectors e_j).

Norm gains have coordinate components in every metric.

Shapes: N tokens, O outputs, I inputs, K components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2d.dominance import Dominance, outlier_entries, outlier_shares, principal_directions, token_rows
from s2d.spectrum import Triplets, top_singular_many
from s2d.targets import Target
from s2d.writers import Call, find_writer

# How far a component's share of the outliers, or a site's outlier ratio, must fall below the value that selects it
# before it is released. Without the gap a component at the limit flickers from batch to batch.
RELEASE = 0.7
# Overlap |u.u'| from which a refreshed component counts as the tracked one.
SAME_COMPONENT = 0.7
# A batch's maximum is a noisy statistic: between refreshes the largest value seen leaks by this factor.
LEAK = 0.9
# Extra components looked at beyond max_rank, so that one that lost its rank is still found.
SPARE = 3


@dataclass
class Components:
    """The selected components of one weight, as they are shrunk.

    Attributes:
        S: Their singular values in the metric, ``[K]``.
        U: Output directions ``[O, K]``, orthonormal; None for coordinate components.
        V: ``[I, K]``: right singular vectors (weight metric), or ``C W^T u`` (data metric), of use to a gradient.
        channels: Indices of coordinate components, ``[K]``; None otherwise.
    """

    S: Tensor
    U: Tensor | None = None
    V: Tensor | None = None
    channels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.S)


@dataclass
class Finding:
    """What a refresh saw at one weight: a row of the history, and the selection."""

    sigma: list[float]
    pcdr: list[float]
    outlier_max: float
    outlier_ratio: float
    components: Components | None = None


@dataclass
class _Sums:
    """Streaming statistics of one activation, over the forward passes of a refresh."""

    channel_max: Tensor | None = None
    channel_squares: Tensor | None = None
    rows: int = 0

    def add(self, x_ND: Tensor) -> Tensor:
        """Take in rows; returns the channel maxima ``[D]`` of these rows alone."""
        x = x_ND.detach()
        peak = torch.linalg.vector_norm(x, math.inf, dim=0).float()
        squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
        if self.channel_max is None or self.channel_squares is None:
            self.channel_max, self.channel_squares = peak, squares
        else:
            self.channel_max = torch.maximum(self.channel_max, peak)
            self.channel_squares = self.channel_squares + squares
        self.rows += len(x)
        return peak

    def rms(self) -> Tensor:
        assert self.channel_squares is not None
        return (self.channel_squares.mean() / max(self.rows, 1)).sqrt()


class Metric:
    """A way to find components. One object lives as long as the decay; `observe` is called only on refresh steps."""

    def __init__(
        self, targets: list[Target], *, threshold: float, max_rank: int, outlier_ratio: float, track: bool, seed: int
    ) -> None:
        """Remember the settings; nothing is computed yet.

        Args:
            targets: The weights to look at.
            threshold: Share of the outliers (PCDR) that selects.
            max_rank: At most so many components per weight.
            outlier_ratio: Largest activation over RMS from which an activation is an outlier; 0 for always.
            track: Keep following a selected component until its outlier is gone, whatever its rank.
            seed: Of random starts.
        """
        self.targets = targets
        self.threshold = threshold
        self.max_rank = max_rank
        self.outlier_ratio = outlier_ratio
        self.track = track
        self.seed = seed
        self.selected: dict[str, Components] = {}

    def begin(self) -> None:
        """A refresh starts: forget the last one's sums."""

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """See one call of a target's module: its input ``[..., I]`` and its output ``[..., O]``."""
        raise NotImplementedError

    def finish(self) -> dict[str, Finding]:
        """The refresh is over: findings by target name. `selected` holds the new selection."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs, beside `selected`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""

    def _tracked(self, name: str, fresh: Components | None, share: dict[str, Tensor]) -> Components | None:
        """Merge fresh components with the tracked ones that still make outliers."""
        old = self.selected.get(name)
        if not self.track or old is None or old.U is None:
            return fresh
        keep = share["old"] >= RELEASE * self.threshold
        if fresh is not None and fresh.U is not None:
            overlap = (old.U.mT @ fresh.U).abs()
            keep &= overlap.amax(1) < SAME_COMPONENT  # the refreshed vectors replace the old ones
        if not bool(keep.any()):
            return fresh
        rest = Components(old.S[keep], old.U[:, keep], None if old.V is None else old.V[:, keep])
        if fresh is None or fresh.U is None:
            return rest
        assert rest.U is not None
        joined = torch.cat([fresh.U, rest.U], 1)
        return Components(
            torch.cat([fresh.S, rest.S]),
            joined,
            None if fresh.V is None or rest.V is None else torch.cat([fresh.V, rest.V], 1),
        )


@dataclass
class _Seen:
    """The outlier entries of one weight, held until the end of a refresh; at most a few dozen rows."""

    sums: _Sums = field(default_factory=_Sums)
    inputs: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)


class WeightMetric(Metric):
    """Singular components of the weight itself: the paper's metric."""

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        self.triplets: dict[str, Triplets] = {}
        self.fallbacks = 0
        self._seen: dict[str, _Seen] = {}

    def begin(self) -> None:
        self._seen = {}

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        seen = self._seen.setdefault(target.name, _Seen())
        y_NO = token_rows(y, mask)
        if len(y_NO) == 0:
            return
        channel_max = seen.sums.add(y_NO)
        if target.kind == "norm":
            return
        row_E, column_E = outlier_entries(y_NO, channel_max=channel_max)
        if target.kind == "embedding":
            seen.inputs.append(token_rows(x.unsqueeze(-1), mask)[row_E, 0])
        else:
            seen.inputs.append(token_rows(x, mask)[row_E].float())
        value_E = y_NO[row_E, column_E].float()
        bias = bias_of(target)
        seen.values.append(value_E if bias is None else value_E - bias[column_E].to(value_E))
        seen.columns.append(column_E)

    def finish(self) -> dict[str, Finding]:
        matrices = [t for t in self.targets if t.kind != "norm" and t.name in self._seen]
        limit = {t.name: min(self.max_rank, *_as_linear(t).shape) for t in matrices}
        found = top_singular_many(
            [_as_linear(t) for t in matrices],
            min([self.max_rank + SPARE, *(min(_as_linear(t).shape) for t in matrices)]) if matrices else 1,
            warm=[self.triplets.get(t.name) for t in matrices],
            seed=self.seed,
            names=[t.name for t in matrices],
        )
        findings: dict[str, Finding] = {}
        for target, triplets in zip(matrices, found, strict=True):
            self.triplets[target.name] = triplets
            self.fallbacks += triplets.fallbacks
            findings[target.name] = self._judge(target, triplets, limit[target.name])
        for target in self.targets:
            if target.kind == "norm" and target.name in self._seen:
                findings[target.name] = coordinate_finding(
                    self._seen[target.name].sums, None, target, self.outlier_ratio, self.selected.get(target.name)
                )
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings

    def _judge(self, target: Target, triplets: Triplets, max_rank: int) -> Finding:
        seen = self._seen[target.name]
        x_E, value_E, column_E = torch.cat(seen.inputs), torch.cat(seen.values), torch.cat(seen.columns)

        def projected(V: Tensor) -> Tensor:
            return V[x_E] if target.kind == "embedding" else x_E.to(V.dtype) @ V

        # An embedding's input is one-hot, so its projection on v is one entry of v.
        identity = replace(triplets, V=torch.eye(triplets.S.shape[-1], dtype=triplets.S.dtype, device=x_E.device))
        dominance = Dominance(identity)
        dominance.add(projected(triplets.V), value_E, column_E)
        ratios = dominance.ratios()
        peak, rms = value_E.abs().max().item(), seen.sums.rms().item()
        ratio = peak / rms if rms > 0 else 0.0
        tracked = target.name in self.selected
        gate = self.outlier_ratio * (RELEASE if tracked and self.track else 1.0)
        fresh = None
        reached = (ratios[:max_rank] >= self.threshold).nonzero()
        if len(reached) and ratio >= gate:
            k = int(reached[0]) + 1
            fresh = Components(triplets.S[:k].clone(), triplets.U[:, :k].clone(), triplets.V[:, :k].clone())
        components = fresh
        old = self.selected.get(target.name)
        if self.track and ratio >= gate and old is not None and old.U is not None and old.V is not None:
            W = _as_linear(target).to(old.U.dtype)
            sigma = ((W @ old.V) * old.U).sum(0)
            part = projected(old.V) * sigma * old.U[column_E]
            share = (part * value_E.sign()[:, None]).sum(0) / value_E.abs().sum().clamp_min(1e-30)
            components = self._tracked(target.name, fresh, {"old": share})
        k = min(self.max_rank, len(triplets.S))
        return Finding(triplets.S[:k].tolist(), ratios[:k].tolist(), peak, ratio, components)

    def state(self) -> dict[str, Any]:
        return {"triplets": {name: vars(t).copy() for name, t in self.triplets.items()}, "fallbacks": self.fallbacks}

    def load_state(self, state: dict[str, Any]) -> None:
        self.triplets = {name: Triplets(**fields) for name, fields in state["triplets"].items()}
        self.fallbacks = state["fallbacks"]


class DataMetric(Metric):
    """Components in the metric of the inputs: principal directions of each weight's outputs."""

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        self.directions: dict[str, Tensor] = {}
        self._findings: dict[str, Finding] = {}
        self._norms: dict[str, _Sums] = {}

    def begin(self) -> None:
        self._findings, self._norms = {}, {}

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        y_NO = token_rows(y.detach(), mask)
        if len(y_NO) == 0:
            return
        if target.kind == "norm":
            self._norms.setdefault(target.name, _Sums()).add(y_NO)
            return
        sums = _Sums()
        channel_max = sums.add(y_NO)
        peak, rms = channel_max.max().item(), sums.rms().item()
        ratio = peak / rms if rms > 0 else 0.0
        known = self._findings.get(target.name)
        if known is not None and known.outlier_ratio >= ratio:
            return  # of several forward passes the one with the largest outlier is judged
        finding = Finding([], [], peak, ratio)
        self._findings[target.name] = finding
        if ratio < self.outlier_ratio * (RELEASE if target.name in self.selected else 1.0):
            return  # healthy: no directions are computed
        row_E, column_E = outlier_entries(y_NO, channel_max=channel_max)
        k = min(self.max_rank + SPARE, y_NO.shape[1])
        bias = bias_of(target)
        Y = y_NO.float() if bias is None else y_NO.float() - bias.float()
        U = principal_directions(Y, k, self.directions.get(target.name), seed=self.seed)
        self.directions[target.name] = U
        share = outlier_shares(U, Y, row_E, column_E)
        part = Y @ U
        sigma = torch.linalg.vector_norm(part, dim=0) / math.sqrt(len(Y))
        finding.sigma, finding.pcdr = sigma[: self.max_rank].tolist(), share.cumsum(0)[: self.max_rank].tolist()
        chosen = (share >= self.threshold).nonzero().flatten()[: self.max_rank]
        fresh = None
        if len(chosen):
            V = None
            if target.kind != "embedding":
                V = token_rows(x.detach(), mask).float().mT @ part[:, chosen] / len(Y)
            fresh = Components(sigma[chosen], U[:, chosen].clone(), V)
        finding.components = fresh
        old = self.selected.get(target.name)
        if old is not None and old.U is not None:
            share_old = outlier_shares(old.U, Y, row_E, column_E)
            merged = self._tracked(target.name, fresh, {"old": share_old})
            if merged is not None and merged.U is not None:
                merged.U = torch.linalg.qr(merged.U).Q  # tracked and fresh directions need not be orthogonal
            finding.components = merged

    def finish(self) -> dict[str, Finding]:
        findings = dict(self._findings)
        for target in self.targets:
            if target.name in self._norms:
                findings[target.name] = coordinate_finding(
                    self._norms[target.name], None, target, self.outlier_ratio, self.selected.get(target.name)
                )
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings

    def state(self) -> dict[str, Any]:
        return {"directions": dict(self.directions)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.directions = dict(state["directions"])


class SiteMetric(Metric):
    """Coordinate components where quantizers sit, shrunk in the weights that write them.

    Sites are the inputs of linear layers and the operands of attention's products. Who writes a site is measured in
    the first refresh, see :mod:`s2d.writers`; sites that no single weight writes are left alone.
    """

    _SAMPLE_ROWS = 512
    _LOOK_BACK = 6

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        self.writers: dict[str, str] = {}
        self.operands: set[str] = set()
        self.peaks: dict[str, Tensor] = {}
        self._by_name = {target.name: target for target in targets}
        self._sums: dict[str, _Sums] = {}
        self._calls: list[Call] = []
        self._seen_input: tuple[int, ...] | None = None
        self._searching = True

    def begin(self) -> None:
        self._sums, self._calls, self._seen_input = {}, [], None
        self._searching = not self.writers

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        key = (x.data_ptr(), *x.shape)
        if target.kind == "linear" and key != self._seen_input and (self._searching or target.name in self.writers):
            rows = token_rows(x.detach(), mask)
            if self._searching and target.name not in self.writers:
                writer = find_writer(self._sample(rows), self._calls)
                if writer is not None:
                    self.writers[target.name] = writer.target.name
                    self.operands.update(operand.name for operand in writer.operands)
            if target.name in self.writers and len(rows):
                self._sums.setdefault(self.writers[target.name], _Sums()).add(rows)
                self._seen_input = key  # q, k and v read the same tensor
        if target.name in self.operands:
            rows = token_rows(y.detach(), mask)
            if len(rows):
                self._sums.setdefault(target.name, _Sums()).add(rows)
        if self._searching:
            self._calls.append(Call(target, self._sample(token_rows(y.detach(), mask)), key))
            self._calls = self._calls[-self._LOOK_BACK :]

    def _sample(self, rows_ND: Tensor) -> Tensor:
        return rows_ND[:: max(1, len(rows_ND) // self._SAMPLE_ROWS)].float()

    def finish(self) -> dict[str, Finding]:
        findings: dict[str, Finding] = {}
        for name, sums in self._sums.items():
            assert sums.channel_max is not None
            peaks = self.peaks.get(name)
            findings[name] = coordinate_finding(
                sums, peaks, self._by_name[name], self.outlier_ratio, self.selected.get(name)
            )
            leaked = sums.channel_max if peaks is None else LEAK * peaks.to(sums.channel_max)
            self.peaks[name] = torch.maximum(sums.channel_max, leaked)
        self._calls = []
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings

    def state(self) -> dict[str, Any]:
        return {"writers": dict(self.writers), "operands": sorted(self.operands), "peaks": dict(self.peaks)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.writers, self.operands = dict(state["writers"]), set(state["operands"])
        self.peaks = dict(state["peaks"])


def coordinate_finding(
    sums: _Sums, peaks: Tensor | None, target: Target, outlier_ratio: float, selected: Components | None
) -> Finding:
    """Select the channels whose maximum exceeds ``outlier_ratio`` times the RMS of the whole activation.

    Args:
        sums: Of this refresh.
        peaks: Leaky channel maxima of earlier refreshes, ``[O]``.
        target: Which weight; a gain's singular values are its magnitudes.
        outlier_ratio: See :class:`Metric`.
        selected: The last selection, held until its maximum falls below ``RELEASE`` of the limit.
    """
    assert sums.channel_max is not None and sums.channel_squares is not None
    channel_max = sums.channel_max if peaks is None else torch.maximum(sums.channel_max, LEAK * peaks.to(sums.channel_max))
    rms = sums.rms()
    limit = torch.full_like(channel_max, max(outlier_ratio, 1e-12)) * rms
    if selected is not None and selected.channels is not None:
        limit[selected.channels] *= RELEASE
    channels = (channel_max > limit).nonzero().flatten() if rms > 0 else channel_max.new_zeros(0, dtype=torch.long)
    if target.kind == "norm":
        sigma = target.parameter.detach().abs().float()
    else:
        sigma = (sums.channel_squares / max(sums.rows, 1)).sqrt()
    top = sums.channel_max.topk(min(3, len(sums.channel_max))).indices
    peak = sums.channel_max.max().item()
    return Finding(
        sigma[top].tolist(),
        [],  # no PCDR: a coordinate makes its own outliers alone
        peak,
        peak / rms.item() if rms > 0 else 0.0,
        Components(sigma[channels].clone(), channels=channels) if len(channels) else None,
    )


def _as_linear(target: Target) -> Tensor:
    """``[out, in]``; an embedding table maps one-hot tokens to features, so it is read transposed."""
    return target.matrix().mT if target.kind == "embedding" else target.matrix()


def bias_of(target: Target) -> Tensor | None:
    """The bias that belongs to a target's rows, detached; a view, so writing to it writes to the model."""
    name = "in_proj_bias" if target.parameter_name == "in_proj_weight" else "bias"
    bias = target.module._parameters.get(name)
    if bias is None or target.kind == "embedding":
        return None
    return bias.detach()[target.rows] if target.rows is not None else bias.detach()


def call_views(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a module's input and output to ``[..., I]`` and ``[..., O]`` of the target.

    Convolutions have their channels last; the input of a convolution is unfolded to the patches its matrix multiplies.
    """
    if target.kind == "conv" and isinstance(module, nn.Conv2d):
        patches = nn.functional.unfold(
            x.detach().float(), module.kernel_size, module.dilation, _padding(module), module.stride
        )
        x, y = patches.mT, y.flatten(2).mT
    elif target.kind == "conv":
        y = y.movedim(1, -1)
    return x, (y[..., target.rows] if target.rows is not None else y)


def _padding(module: nn.Conv2d) -> tuple[int, int] | int:
    padding = module.padding
    return 0 if isinstance(padding, str) else (padding[0], padding[1])
