"""Shared by all selection metrics: components, findings, the contract, and the choice of channels.

Shapes: N tokens, D channels, O outputs, I inputs, K components, E outlier entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2d.decay.written_sites import Uses
from s2d.distributed.sharding import Groups, Part, Parts, ranks_in, whole_vector
from s2d.spectral.statistics import Peaks, Sums, kept_rows, outlier_entries, reduced, token_rows
from s2d.targets.weights import Target

# Largest activation over RMS from which it is an outlier, for the metrics that have no better limit of their own.
FIXED_RATIO = 8.0
# How far a component's share of the outliers, or a site's outlier ratio, must fall below the value that selects it
# before it is released. Without the gap a component at the limit flickers from batch to batch.
RELEASE = 0.7
# Overlap |u.u'| from which a refreshed component counts as the tracked one.
SAME_COMPONENT = 0.7
# The same for a channel. Its limit moves with the RMS of the site, which falls as channels are shrunk. A wide gap would
# hold channels that were never outliers; nearly all would be shrunk together, and the ratio would never fall.
RELEASE_CHANNEL = 0.9
# For the same reason at most this share of a site's channels is shrunk at a time, the largest ones.
MOST_CHANNELS = 0.25
# A rank keeps this many times its share of the outliers until the outliers of all ranks are known. The result is exact
# on as many ranks. On more ranks, only a rank that holds more outliers than that may lose some.
SKEW = 4
# Extra components computed beyond max_rank, so that a component that lost its rank is still found.
SPARE = 3


@dataclass
class Components:
    """The selected components of one weight, as they are shrunk.

    Attributes:
        S: Their singular values in the metric, ``[K]``.
        U: Output directions ``[O, K]``, orthonormal; None for coordinate components.
        V: ``[I, K]``: right singular vectors (weight metric), or ``C W^T u`` (data metric), used by the gradient.
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
    """The result of a refresh for one weight: a row of the history, and the selection."""

    sigma: list[float]
    pcdr: list[float]
    outlier_max: float
    outlier_ratio: float
    components: Components | None = None


class Metric:
    """A way to find components. One object lives as long as the decay; `observe` is called only on refresh steps."""

    def __init__(
        self,
        targets: list[Target],
        *,
        threshold: float,
        max_rank: int,
        outlier_ratio: float | None,
        track: bool,
        seed: int,
        gradients: bool = True,
        everyone: Groups = (),
    ) -> None:
        """Remember the settings; nothing is computed yet.

        Args:
            targets: The weights to look at.
            threshold: Share of the outliers (PCDR) that selects.
            max_rank: Most components per weight.
            outlier_ratio: Largest activation over RMS from which an activation is an outlier; 0 for always. None for
                the metric's own limit (`s2d.decay.selection.limits`), or `FIXED_RATIO` where it has none.
            track: Keep following a selected component until its outlier is gone, whatever its rank.
            seed: Seed of random starts.
            gradients: Also compute what only the gradient of the penalty needs (coupled mode, data metric).
            everyone: All ranks that train the model, whatever part they hold.
        """
        self.targets = targets
        self.threshold = threshold
        self.max_rank = max_rank
        self.outlier_ratio = FIXED_RATIO if outlier_ratio is None else outlier_ratio
        self.own_limits = outlier_ratio is None
        self.track = track
        self.seed = seed
        self.gradients = gradients
        self.everyone = everyone
        self.selected: dict[str, Components] = {}
        self.searched = False
        self._kept: tuple[Tensor, Tensor | None] | None = None

    def begin(self) -> None:
        """A refresh starts: forget the last one's sums."""

    def forget(self, name: str) -> None:
        """Another weight, perhaps of another shape, took the place of the target of this name."""
        self.selected.pop(name, None)

    def observe(
        self,
        target: Target,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        parts: Parts | None = None,
        uses: Uses | None = None,
    ) -> None:
        """Observe one call of a target's module: its input ``[..., I]`` and its output ``[..., O]``.

        Args:
            target: The target of the module that was called.
            x: Its input.
            y: Its output.
            mask: True for real tokens; None for all.
            parts: Which parts of input and output these are; by default the whole.
            uses: Information of the model's graph about this call.
        """
        self._observe(target, x, y, mask, Parts.whole(x, y) if parts is None else parts, uses)

    def _observe(
        self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None, parts: Parts, uses: Uses | None
    ) -> None:
        """`observe`, with the parts known: what each metric does in its own way."""
        raise NotImplementedError

    def finish(self) -> dict[str, Finding]:
        """The refresh is over: findings by target name. `selected` holds the new selection."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The state that a bit-exact continuation needs, beside `selected`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from `state`."""

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """All rows ``[N, D]`` of an activation, and the indices of the real tokens (None: all are).

        Padding is left out by index, as copying the other rows would cost as much as reading them. All layers of a
        forward pass share a mask, so its indices are computed once.
        """
        rows = token_rows(x.detach())
        if mask is None or mask.numel() != len(rows):
            return rows, None
        if self._kept is None or self._kept[0] is not mask:
            self._kept = mask, kept_rows(mask)
        return rows, self._kept[1]

    def _select(self, findings: dict[str, Finding], channels: dict[str, Sums]) -> dict[str, Finding]:
        """Add the findings of coordinate components, in the order of the targets, and store the selection."""
        sums, found = reduced(channels), dict(findings)
        for target in self.targets:
            if target.name in sums:
                old = self.selected.get(target.name)
                found[target.name] = coordinate_finding(sums[target.name], target, self.outlier_ratio, old)
        self.selected = {n: f.components for n, f in found.items() if f.components is not None}
        return found

    def _gate(self, name: str) -> float:
        """The outlier ratio above which a weight is treated; lower while it is tracked."""
        return self.outlier_ratio * (RELEASE if self.track and name in self.selected else 1.0)


def coordinate_finding(
    sums: Sums, target: Target, outlier_ratio: float, selected: Components | None, rows: Tensor | None = None
) -> Finding:
    """Select the channels whose maximum exceeds ``outlier_ratio`` times the RMS of the whole activation.

    Args:
        sums: The sums of this refresh.
        target: The weight; a gain's singular values are its magnitudes.
        outlier_ratio: See `Metric`.
        selected: The last selection. A channel is held until its maximum falls below ``RELEASE_CHANNEL`` of the limit.
        rows: The channels of the weight that the sums cover, ascending; None: all.
    """
    channel_max = sums.channel_max
    rms = sums.rms()
    limit = torch.full_like(channel_max, max(outlier_ratio, 1e-12)) * rms
    if selected is not None and selected.channels is not None:
        limit[selected.channels if rows is None else torch.isin(rows, selected.channels)] *= RELEASE_CHANNEL
    channels = (channel_max > limit).nonzero().flatten() if rms > 0 else channel_max.new_zeros(0, dtype=torch.long)
    most = max(1, int(MOST_CHANNELS * len(channel_max)))
    if len(channels) > most:
        channels = channels[channel_max[channels].topk(most).indices].sort().values
    if target.kind == "norm":
        sigma = (whole_vector(target.parameter).float() + target.offset).abs()
        sigma = sigma if rows is None else sigma[rows]
    else:
        sigma = (sums.channel_squares / sums.rows).sqrt()
    top = sums.channel_max.topk(min(3, len(sums.channel_max))).indices
    peak = sums.channel_max.max().item()
    return Finding(
        sigma[top].tolist(),
        [],  # no PCDR: a channel alone makes its own outliers
        peak,
        peak / rms.item() if rms > 0 else 0.0,
        Components(sigma[channels].clone(), channels=channels if rows is None else rows[channels])
        if len(channels)
        else None,
    )


def largest_here(y_NO: Tensor, found: Peaks | None, kept: Tensor | None, part: Part) -> tuple[Tensor, Tensor]:
    """Rows and columns ``[E]`` of the largest entries, enough of them to hold the outliers of the whole activation."""
    entries = (len(y_NO) if kept is None else len(kept)) * y_NO.shape[1]
    if found is None or entries == 0:
        nothing = torch.zeros(0, dtype=torch.long, device=y_NO.device)
        return nothing, nothing
    most = entries * min(ranks_in(part.groups), SKEW)
    return outlier_entries(y_NO, row_max=found.row_max, kept=kept, among=most)
