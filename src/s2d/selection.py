"""Selection: which components of a model's weights make the outliers that low-bit grids cannot hold.

Three metrics answer the question "component of what?". They see the same forward passes and give the same kind of
answer, `Components`, which `s2d.decay` then shrinks.

- ``"weight"``: singular components of W, selected by PCDR (the paper, arXiv 2602.14432, its selection rule).
- ``"data"``: components of W C^(1/2), C the second moment of the inputs: principal directions u of the outputs.
- ``"site"``: where a quantizer will sit (inputs of linear layers, attention's operands), the channels whose maximum
  exceeds a multiple of the site's RMS. A per-tensor grid is stretched by channels, so the directions are the coordinate
  axes e_j; what is shrunk is whatever *writes* channel j: a row of the linear layer before, or a norm's gain
  (diag(gamma) has the singular values |gamma_j| and the singular vectors e_j).

Norm gains have coordinate components in every metric.

Shapes: N tokens, O outputs, I inputs, K components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2d.dominance import (
    Dominance,
    channel_sums,
    kept_rows,
    outlier_entries,
    outlier_shares,
    principal_components,
    projections,
    row_sums,
    token_rows,
)
from s2d.spectrum import Triplets, top_singular_many
from s2d.targets import Target
from s2d.views import bias_of
from s2d.writers import Call, find_writer, same_tensor

# How far a component's share of the outliers, or a site's outlier ratio, must fall below the value that selects it
# before it is released. Without the gap a component at the limit flickers from batch to batch.
RELEASE = 0.7
# Overlap |u.u'| from which a refreshed component counts as the tracked one.
SAME_COMPONENT = 0.7
# The same for a channel. Its limit moves with the RMS of the site, which falls as channels are shrunk: a wide gap would
# hold channels that were never outliers, until nearly all are shrunk together and the ratio never falls.
RELEASE_CHANNEL = 0.9
# For the same reason at most this share of a site's channels is shrunk at a time, the largest ones.
MOST_CHANNELS = 0.25
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

    def to(self, device: torch.device) -> Components:
        """The same on another device."""
        return Components(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})


@dataclass
class Finding:
    """What a refresh saw at one weight: a row of the history, and the selection."""

    sigma: list[float]
    pcdr: list[float]
    outlier_max: float
    outlier_ratio: float
    components: Components | None = None


@dataclass(frozen=True)
class _Sums:
    """Statistics of the channels of one activation, over the forward passes of a refresh."""

    channel_max: Tensor
    channel_squares: Tensor
    rows: int

    def rms(self) -> Tensor:
        return (self.channel_squares.mean() / self.rows).sqrt()


def _add(sums: dict[str, _Sums], name: str, x_ND: Tensor, kept: Tensor | None) -> None:
    """Take in the rows of index `kept` (None: all).

    Nothing is taken in where there are no rows, or one holds NaN or Inf: half precision overflowed, and the gradient
    scaler will skip the step.
    """
    rows = len(x_ND) if kept is None else len(kept)
    channel_max, channel_squares = channel_sums(x_ND, kept)
    if rows == 0 or not math.isfinite(channel_max.max().item()):
        return
    if (known := sums.get(name)) is not None:
        channel_max = torch.maximum(known.channel_max, channel_max)
        channel_squares, rows = known.channel_squares + channel_squares, known.rows + rows
    sums[name] = _Sums(channel_max, channel_squares, rows)


@dataclass(frozen=True)
class _Peaks:
    """Statistics of one activation as a whole, in one forward pass."""

    row_max: Tensor  # of all rows, padding included
    largest: float
    squares: float
    entries: int

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.entries)


def _peaks(x_ND: Tensor, kept: Tensor | None) -> _Peaks | None:
    """Look at the rows of index `kept` (None: all); None where `_add` would take nothing in."""
    row_max, row_squares = row_sums(x_ND)
    among, squares = (row_max, row_squares) if kept is None else (row_max[kept], row_squares[kept])
    if len(among) == 0:
        return None
    largest, total = torch.stack([among.max(), squares.sum()]).tolist()
    return _Peaks(row_max, largest, total, len(among) * x_ND.shape[1]) if math.isfinite(largest) else None


class Metric:
    """A way to find components. One object lives as long as the decay; `observe` is called only on refresh steps."""

    def __init__(
        self,
        targets: list[Target],
        *,
        threshold: float,
        max_rank: int,
        outlier_ratio: float,
        track: bool,
        seed: int,
        gradients: bool = True,
    ) -> None:
        """Remember the settings; nothing is computed yet.

        Args:
            targets: The weights to look at.
            threshold: Share of the outliers (PCDR) that selects.
            max_rank: At most so many components per weight.
            outlier_ratio: Largest activation over RMS from which an activation is an outlier; 0 for always.
            track: Keep following a selected component until its outlier is gone, whatever its rank.
            seed: Of random starts.
            gradients: Find what only the gradient of the penalty needs as well (coupled mode, data metric).
        """
        self.targets = targets
        self.threshold = threshold
        self.max_rank = max_rank
        self.outlier_ratio = outlier_ratio
        self.track = track
        self.seed = seed
        self.gradients = gradients
        self.selected: dict[str, Components] = {}
        self._kept: tuple[Tensor, Tensor | None] | None = None

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

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All rows ``[N, D]`` of an activation, and the indices of the real tokens (None: all are).

        Padding is left out by index, as copying the other rows would cost as much as looking at them. All layers of a
        forward pass share a mask, whose indices are found once.
        """
        rows = token_rows(x.detach())
        if mask is None or mask.numel() != len(rows):
            return rows, None
        if self._kept is None or self._kept[0] is not mask:
            self._kept = mask, kept_rows(mask)
        return rows, self._kept[1]

    def _gate(self, name: str) -> float:
        """The outlier ratio from which a weight is judged; lower while it is tracked."""
        return self.outlier_ratio * (RELEASE if self.track and name in self.selected else 1.0)


@dataclass
class _Seen:
    """The outlier entries of one weight, held until the end of a refresh; at most a few dozen rows."""

    squares: float = 0.0
    entries: int = 0
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
        self._norms: dict[str, _Sums] = {}

    def begin(self) -> None:
        """Forget the sums of the last refresh."""
        self._seen, self._norms = {}, {}

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Keep the inputs and values of the largest outputs."""
        y_NO, kept = self._rows(y, mask)
        if target.kind == "norm":
            _add(self._norms, target.name, y_NO, kept)
            return
        peaks = _peaks(y_NO, kept)
        if peaks is None:
            return
        seen = self._seen.setdefault(target.name, _Seen())
        seen.squares, seen.entries = seen.squares + peaks.squares, seen.entries + peaks.entries
        row_E, column_E = outlier_entries(y_NO, row_max=peaks.row_max, kept=kept)
        if target.kind == "embedding":
            seen.inputs.append(token_rows(x.unsqueeze(-1))[row_E, 0])
        else:
            seen.inputs.append(token_rows(x)[row_E].float())
        value_E = y_NO[row_E, column_E].float()
        bias = bias_of(target)
        seen.values.append(value_E if bias is None else value_E - bias[column_E].to(value_E))
        seen.columns.append(column_E)

    def finish(self) -> dict[str, Finding]:
        """Refresh the triplets, and select by PCDR."""
        matrices = [t for t in self.targets if t.name in self._seen]
        width = {t.name: min(self.max_rank + SPARE, *t.matrix().shape) for t in matrices}
        for k in sorted(set(width.values())):
            members = [t for t in matrices if width[t.name] == k]
            found = top_singular_many(
                [_as_linear(t) for t in members],
                k,
                warm=[self.triplets.get(t.name) for t in members],
                seed=self.seed,
                names=[t.name for t in members],
            )
            self.triplets.update(zip((t.name for t in members), found, strict=True))
            self.fallbacks += sum(triplets.fallbacks for triplets in found)
        findings = {t.name: self._judge(t, self.triplets[t.name]) for t in matrices}
        for target in self.targets:
            if target.name in self._norms:
                findings[target.name] = coordinate_finding(
                    self._norms[target.name], target, self.outlier_ratio, self.selected.get(target.name)
                )
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings

    def _judge(self, target: Target, triplets: Triplets) -> Finding:
        seen = self._seen[target.name]
        x_E, value_E, column_E = torch.cat(seen.inputs), torch.cat(seen.values), torch.cat(seen.columns)

        def projected(V: Tensor) -> Tensor:
            return V[x_E] if target.kind == "embedding" else x_E.to(V.dtype) @ V

        # An embedding's input is one-hot, so its projection on v is one entry of v.
        identity = replace(triplets, V=torch.eye(triplets.S.shape[-1], dtype=triplets.S.dtype, device=x_E.device))
        dominance = Dominance(identity)
        dominance.add(projected(triplets.V), value_E, column_E)
        ratios = dominance.ratios()
        peak, rms = value_E.abs().max().item(), math.sqrt(seen.squares / seen.entries)
        ratio = peak / rms if rms > 0 else 0.0
        old = self.selected.get(target.name)
        chosen: list[Components] = []
        if ratio >= self._gate(target.name):
            reached = (ratios[: self.max_rank] >= self.threshold).nonzero()
            k = int(reached[0]) + 1 if len(reached) else 0
            if k:
                chosen.append(Components(triplets.S[:k].clone(), triplets.U[:, :k].clone(), triplets.V[:, :k].clone()))
            if self.track and old is not None:
                S, U, V = _followed(_as_linear(target), old, triplets, k)
                part = projected(V) * S * U[column_E]
                share = (part * value_E.sign()[:, None]).sum(0) / value_E.abs().sum().clamp_min(1e-30)
                keep = share >= RELEASE * self.threshold
                chosen.append(Components(S[keep], U[:, keep], V[:, keep]))
        S, U, V = (torch.cat([getattr(c, part) for c in chosen], -1) if chosen else None for part in "SUV")
        components = Components(S, U, V) if S is not None and len(S) else None
        k = min(self.max_rank, len(triplets.S))
        return Finding(triplets.S[:k].tolist(), ratios[:k].tolist(), peak, ratio, components)

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs, beside `selected`."""
        return {"triplets": {name: vars(t).copy() for name, t in self.triplets.items()}, "fallbacks": self.fallbacks}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
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
        """Forget the sums of the last refresh."""
        self._findings, self._norms = {}, {}

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Judge one pass: its principal directions and their shares of the outliers."""
        rows, kept = self._rows(y, mask)
        if target.kind == "norm":
            _add(self._norms, target.name, rows, kept)
            return
        peaks = _peaks(rows, kept)
        if peaks is None:
            return
        ratio = peaks.largest / peaks.rms if peaks.rms > 0 else 0.0
        known = self._findings.get(target.name)
        if known is not None and known.outlier_ratio >= ratio:
            return  # of several forward passes the one with the largest outlier is judged
        finding = self._findings[target.name] = Finding([], [], peaks.largest, ratio)
        if ratio < self._gate(target.name):
            return  # healthy: no directions are computed
        row_E, column_E = outlier_entries(rows, row_max=peaks.row_max, kept=kept)
        k, bias = min(self.max_rank + SPARE, rows.shape[1]), bias_of(target)
        U, sigma = principal_components(rows, k, self.directions.get(target.name), seed=self.seed, bias=bias, kept=kept)
        self.directions[target.name] = U
        Y_EO = rows[row_E].float() if bias is None else rows[row_E].float() - bias.float()
        share = outlier_shares(U, Y_EO, column_E)
        finding.sigma, finding.pcdr = sigma[: self.max_rank].tolist(), share.cumsum(0)[: self.max_rank].tolist()

        is_chosen = torch.zeros_like(share, dtype=torch.bool)
        is_chosen[(share >= self.threshold).nonzero().flatten()[: self.max_rank]] = True
        chosen = U[:, is_chosen]
        old = self.selected.get(target.name)
        if self.track and old is not None and old.U is not None:
            chosen = self._followed(U, share, is_chosen, old.U, outlier_shares(old.U, Y_EO, column_E))
        if chosen.shape[1]:
            part = projections(rows, chosen, bias, kept)
            S = torch.linalg.vector_norm(part, dim=0) / math.sqrt(len(part))
            V = self._inputs_times(target, x, mask, part) if self.gradients else None
            finding.components = Components(S, chosen.clone(), V)

    def _followed(self, U: Tensor, share: Tensor, is_chosen: Tensor, old: Tensor, old_share: Tensor) -> Tensor:
        """The chosen directions and the tracked ones that still make outliers, orthonormal.

        Of a tracked direction and its refreshed form the one stays that makes more of the outliers: while a direction
        sinks through the others, a power step mixes them.
        """
        limit = RELEASE * self.threshold
        overlap, index = (old.mT @ U).abs().max(1)
        renewed = (overlap >= SAME_COMPONENT) & (share[index] >= old_share)
        stays = ~renewed & (old_share >= limit)
        is_chosen = is_chosen.clone()
        is_chosen[index[renewed & (share[index] >= limit)]] = True
        is_chosen[index[stays & (overlap >= SAME_COMPONENT)]] = False
        Q, R = torch.linalg.qr(torch.cat([old[:, stays], U[:, is_chosen]], 1))
        new = R.diagonal().abs() >= SAME_COMPONENT  # the others lie in the span of those before them
        return (Q * R.diagonal().sign())[:, new]

    def _inputs_times(self, target: Target, x: Tensor, mask: Tensor | None, part_NK: Tensor) -> Tensor:
        """``X^T part / N``, which is ``C W^T U`` for the weight's inputs, ``[I, K]``."""
        if target.kind == "embedding":  # its inputs are one-hot
            token_N = token_rows(x.unsqueeze(-1), mask)[:, 0]
            summed = part_NK.new_zeros(len(target.parameter), part_NK.shape[1]).index_add_(0, token_N, part_NK)
        else:
            summed = token_rows(x.detach(), mask).float().mT @ part_NK
        return summed / len(part_NK)

    def finish(self) -> dict[str, Finding]:
        """Select what the judged passes found."""
        findings = dict(self._findings)
        for target in self.targets:
            if target.name in self._norms:
                findings[target.name] = coordinate_finding(
                    self._norms[target.name], target, self.outlier_ratio, self.selected.get(target.name)
                )
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs, beside `selected`."""
        return {"directions": dict(self.directions)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.directions = dict(state["directions"])


class SiteMetric(Metric):
    """Coordinate components where quantizers sit, shrunk in the weights that write them.

    Sites are the inputs of linear layers and the operands of attention's products. Who writes a site is measured in
    the first refresh, see `s2d.writers`; sites that no single weight writes are left alone.
    """

    _SAMPLE_ROWS = 512
    _LOOK_BACK = 6

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        self.writers: dict[str, str] = {}
        # Torch's own attention multiplies with out_proj's weight without calling it, so that no input of out_proj is
        # seen: its values are watched where they are made, as queries and keys are.
        self._fused = {target.name for target in targets if isinstance(target.module, nn.MultiheadAttention)}
        self.operands: set[str] = set(self._fused)
        self._by_name = {target.name: target for target in targets}
        self._sums: dict[str, _Sums] = {}
        self._calls: list[Call] = []
        self._seen_input: Tensor | None = None
        self._searching = True

    def begin(self) -> None:
        """Forget the sums of the last refresh."""
        self._sums, self._calls, self._seen_input = {}, [], None
        self._searching = not self.writers

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Sum up the site that this module reads, and find its writer in the first refresh."""
        if target.kind == "linear" and (self._searching or target.name in self.writers) and not self._read_before(x):
            if self._searching and target.name not in self.writers:
                writer = find_writer(self._sample(token_rows(x.detach(), mask)), self._calls)
                if writer is not None:
                    self.writers[target.name] = writer.target.name
                    self.operands.update(operand.name for operand in writer.operands)
            if target.name in self.writers:
                _add(self._sums, self.writers[target.name], *self._rows(x, mask))
                self._seen_input = x.detach()
        if target.name in self.operands:
            _add(self._sums, target.name, *self._rows(y, mask))
        if self._searching:
            self._calls.append(Call(target, self._sample(token_rows(y.detach(), mask)), x.detach()))
            self._calls = self._calls[-self._LOOK_BACK :]

    def _read_before(self, x: Tensor) -> bool:
        """q, k and v read the same tensor: one look is enough."""
        return self._seen_input is not None and same_tensor(x, self._seen_input)

    def _sample(self, rows_ND: Tensor) -> Tensor:
        """The same rows of every activation with so many; spread by a prime, as a stride may hit one position only."""
        n = len(rows_ND)
        if n <= self._SAMPLE_ROWS:
            return rows_ND.float()
        return rows_ND[torch.arange(self._SAMPLE_ROWS, device=rows_ND.device) * 7919 % n].float()

    def finish(self) -> dict[str, Finding]:
        """Select the channels of every site."""
        findings: dict[str, Finding] = {}
        for name, sums in self._sums.items():
            findings[name] = coordinate_finding(sums, self._by_name[name], self.outlier_ratio, self.selected.get(name))
        self._calls, self._seen_input = [], None
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs, beside `selected`."""
        return {"writers": dict(self.writers), "operands": sorted(self.operands)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.writers, self.operands = dict(state["writers"]), set(state["operands"]) | self._fused


METRICS: dict[str, type[Metric]] = {"site": SiteMetric, "data": DataMetric, "weight": WeightMetric}


def coordinate_finding(sums: _Sums, target: Target, outlier_ratio: float, selected: Components | None) -> Finding:
    """Select the channels whose maximum exceeds ``outlier_ratio`` times the RMS of the whole activation.

    Args:
        sums: Of this refresh.
        target: Which weight; a gain's singular values are its magnitudes.
        outlier_ratio: See `Metric`.
        selected: The last selection, held until its maximum falls below ``RELEASE_CHANNEL`` of the limit.
    """
    channel_max = sums.channel_max
    rms = sums.rms()
    limit = torch.full_like(channel_max, max(outlier_ratio, 1e-12)) * rms
    if selected is not None and selected.channels is not None:
        limit[selected.channels] *= RELEASE_CHANNEL
    channels = (channel_max > limit).nonzero().flatten() if rms > 0 else channel_max.new_zeros(0, dtype=torch.long)
    most = max(1, int(MOST_CHANNELS * len(channel_max)))
    if len(channels) > most:
        channels = channels[channel_max[channels].topk(most).indices].sort().values
    if target.kind == "norm":
        sigma = target.parameter.detach().abs().float()
    else:
        sigma = (sums.channel_squares / sums.rows).sqrt()
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


def _followed(W: Tensor, old: Components, found: Triplets, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the components selected last have become, but for those among the first k: sigma, U and V.

    One that is still among the triplets found takes over their vectors; one that left them keeps its own.
    """
    assert old.U is not None and old.V is not None
    overlap = (old.U.mT @ found.U).abs() * (old.V.mT @ found.V).abs()
    best, index = overlap.max(1)
    spare = index[(best >= SAME_COMPONENT) & (index >= k)].unique()
    covered = torch.linalg.vector_norm(old.U.mT @ found.U[:, :k], dim=1) >= SAME_COMPONENT
    lost = (best < SAME_COMPONENT) & ~covered
    U, V = (torch.cat([new[:, spare], kept[:, lost]], 1) for new, kept in ((found.U, old.U), (found.V, old.V)))
    return ((W.to(U.dtype) @ V) * U).sum(0), U, V
