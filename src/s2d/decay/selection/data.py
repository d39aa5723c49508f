"""Components in the metric of the inputs: principal directions of each weight's outputs.

Shapes: N tokens, O outputs, I inputs, K components, E outlier entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from s2d.decay.selection.base import RELEASE, SAME_COMPONENT, SPARE, Components, Finding, Metric, largest_here
from s2d.decay.written_sites import Uses
from s2d.distributed.sharding import Part, Parts, all_reduce, kth_largest, local_part
from s2d.spectral.pcdr import outlier_shares, principal_components, projections
from s2d.spectral.statistics import Sums, add, outlier_count, peaks, token_rows
from s2d.targets.calls import bias_of
from s2d.targets.weights import Target


class DataMetric(Metric):
    """Components in the metric of the inputs: principal directions of each weight's outputs."""

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        self.directions: dict[str, Tensor] = {}
        self._findings: dict[str, Finding] = {}
        self._norms: dict[str, Sums] = {}

    def begin(self) -> None:
        """Forget the sums of the last refresh."""
        self._findings, self._norms = {}, {}

    def forget(self, name: str) -> None:
        """Its directions are of the weight that is gone."""
        super().forget(name)
        self.directions.pop(name, None)

    def _observe(
        self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None, parts: Parts, uses: Uses | None
    ) -> None:
        """Measure one pass: its principal directions and their shares of the outliers."""
        rows, kept = self._rows(y, mask)
        if target.kind == "norm":
            add(self._norms, target.name, rows, kept, parts.y)
            return
        found = peaks(rows, kept, parts.y.groups)
        if found is None:
            return
        ratio = found.largest / found.rms if found.rms > 0 else 0.0
        known = self._findings.get(target.name)
        if known is not None and known.outlier_ratio >= ratio:
            return  # of several forward passes the one with the largest outlier is used
        finding = self._findings[target.name] = Finding([], [], found.largest, ratio)
        if ratio < self._gate(target.name):
            return  # healthy: no directions are computed
        row_E, column_E = largest_here(rows, found, kept, parts.y)
        if parts.y.groups:
            sizes = rows[row_E, column_E].abs()
            among = sizes >= kth_largest([sizes], [outlier_count(found.entries)], parts.y.groups)[0]
            row_E, column_E = row_E[among], column_E[among]
        k, bias = min(self.max_rank + SPARE, parts.y.width), bias_of(target)
        bias = None if bias is None else local_part(bias)
        warm = self.directions.get(target.name)
        U, sigma = principal_components(rows, k, warm, seed=self.seed, bias=bias, kept=kept, part=parts.y)
        self.directions[target.name] = U
        Y_EO = rows[row_E].float() if bias is None else rows[row_E].float() - bias.float()
        value_E = Y_EO.gather(1, column_E[:, None])[:, 0]

        def shares(U_OK: Tensor) -> Tensor:
            # Where columns are divided, other ranks need the projections of rows whose outliers lie here.
            divided = bool(parts.y.column_groups)
            along_EK = projections(rows, U_OK, bias, part=parts.y)[row_E] if divided else Y_EO.to(U_OK.dtype) @ U_OK
            return outlier_shares(along_EK * U_OK[column_E + parts.y.first], value_E, parts.y.groups)

        share = shares(U)
        finding.sigma, finding.pcdr = sigma[: self.max_rank].tolist(), share.cumsum(0)[: self.max_rank].tolist()

        is_chosen = torch.zeros_like(share, dtype=torch.bool)
        is_chosen[(share >= self.threshold).nonzero().flatten()[: self.max_rank]] = True
        chosen = U[:, is_chosen]
        old = self.selected.get(target.name)
        if self.track and old is not None and old.U is not None:
            chosen = self._followed(U, share, is_chosen, old.U, shares(old.U))
        if chosen.shape[1]:
            count = found.entries // parts.y.width
            along = projections(rows, chosen, bias, kept, parts.y)
            norm = torch.linalg.vector_norm(along, dim=0)
            S = all_reduce(norm.square(), parts.y.row_groups).sqrt() if parts.y.row_groups else norm
            V = self._inputs_times(target, x, mask, along, parts.x) / count if self.gradients else None
            finding.components = Components(S / math.sqrt(count), chosen.clone(), V)

    def _followed(self, U: Tensor, share: Tensor, is_chosen: Tensor, old: Tensor, old_share: Tensor) -> Tensor:
        """The chosen directions and the tracked ones that still make outliers, orthonormal.

        Of a tracked direction and its refreshed form, the one that makes more of the outliers stays. The reason: while
        a direction's energy falls to that of the others, a power step mixes them.
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

    def _inputs_times(self, target: Target, x: Tensor, mask: Tensor | None, along_NK: Tensor, part: Part) -> Tensor:
        """``X^T along``, which is ``N C W^T U`` for the weight's inputs, ``[I, K]``."""
        if target.kind == "embedding":  # its inputs are one-hot
            token_N = token_rows(x.unsqueeze(-1), mask)[:, 0]
            entries = target.block().shape[0]
            summed = along_NK.new_zeros(entries, along_NK.shape[1]).index_add_(0, token_N, along_NK)
            return all_reduce(summed, part.row_groups)
        return all_reduce(part.widened(token_rows(x.detach(), mask).float().mT @ along_NK, 0), part.groups)

    def finish(self) -> dict[str, Finding]:
        """Select from the measured passes."""
        return self._select(self._findings, self._norms)

    def state(self) -> dict[str, Any]:
        """The state that a bit-exact continuation needs, beside `selected`."""
        return {"directions": dict(self.directions)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from `state`."""
        self.directions = dict(state["directions"])
