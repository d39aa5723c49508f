"""Coordinate components where quantizers sit, shrunk in the weights that write them.

Shapes: N tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s2d.channels import Sums, add, reduced
from s2d.dominance import token_rows
from s2d.selection.base import Finding, Metric, coordinate_finding
from s2d.selection.limits import site_ratio
from s2d.sharding import Parts, from_first, in_common
from s2d.targets import Target
from s2d.writers import Call, find_writer, same_tensor


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
        self._sums: dict[str, Sums] = {}
        self._calls: list[Call] = []
        self._seen_input: Tensor | None = None
        self._searching = True

    def begin(self) -> None:
        """Forget the sums of the last refresh."""
        self._sums, self._calls, self._seen_input = {}, [], None
        self._searching = not self.writers

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None, parts: Parts | None = None) -> None:
        """Sum up the site that this module reads, and find its writer in the first refresh."""
        parts = Parts.whole(x, y) if parts is None else parts
        if target.kind == "linear" and (self._searching or target.name in self.writers) and not self._read_before(x):
            if self._searching and target.name not in self.writers:
                writer = find_writer(self._sample(token_rows(x.detach(), mask)), self._calls)
                if writer is not None:
                    self.writers[target.name] = writer.target.name
                    self.operands.update(operand.name for operand in writer.operands)
            if target.name in self.writers:
                add(self._sums, self.writers[target.name], *self._rows(x, mask), parts.x)
                self._seen_input = x.detach()
        if target.name in self.operands:
            add(self._sums, target.name, *self._rows(y, mask), parts.y)
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
        if self._searching:
            self._agree()
        self._calls, self._seen_input = [], None
        findings: dict[str, Finding] = {}
        for name, sums in reduced(self._sums).items():
            limit = site_ratio(sums) if self.own_limits else self.outlier_ratio
            findings[name] = coordinate_finding(sums, self._by_name[name], limit, self.selected.get(name))
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings

    def _agree(self) -> None:
        """Ranks see other samples, and may find other writers: those of the first one hold from the next refresh on."""
        self.writers, operands = from_first((self.writers, sorted(self.operands)), self.everyone)
        self.operands = set(operands)
        everywhere = in_common(self._sums, self.everyone)
        self._sums = {name: self._sums[name] for name in everywhere}

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs, beside `selected`."""
        return {"writers": dict(self.writers), "operands": sorted(self.operands)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.writers, self.operands = dict(state["writers"]), set(state["operands"]) | self._fused
