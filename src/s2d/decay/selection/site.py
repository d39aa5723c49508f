"""The default metric: outlier channels at quantization sites, shrunk in the weights that write them.

Shapes: N tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s2d.decay.selection.base import Finding, Metric, coordinate_finding
from s2d.decay.selection.limits import site_ratio
from s2d.distributed.sharding import Parts, from_first, in_common
from s2d.spectral.statistics import Sums, add, reduced
from s2d.targets.weights import Target
from s2d.writers import Call, find_writer, same_tensor, version_of


class _Read:
    """A tensor that was read, as it was then: memory that is free is used again, and it may be written to."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._version = x.detach(), version_of(x)

    def is_of(self, x: Tensor) -> bool:
        return same_tensor(x, self._x) and self._version == version_of(x)


class SiteMetric(Metric):
    """Coordinate components where quantizers sit, shrunk in the weights that write them.

    Sites are the inputs of linear layers and the operands of attention's products. Who writes a site is measured
    when it is first seen, see `s2d.writers`; sites that no single weight writes are left alone.
    """

    _SAMPLE_ROWS = 512
    _LOOK_BACK = 6

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        # Who writes what a weight reads is known for each weight that may run before it: shared modules (ALBERT),
        # layers that are dropped and experts read now from one, now from another. None: nobody found.
        self._written: dict[tuple[str, str], str | None] = {}
        self.operands: set[str] = set()
        self._sums: dict[str, Sums] = {}
        self._calls: list[Call] = []
        self._seen_input: _Read | None = None
        self._searched = False
        self._by_name: dict[str, Target] = {}
        self.begin()

    @property
    def writers(self) -> dict[str, str]:
        """The writer of what each weight reads; of several the one found last."""
        return {reader: writer for (reader, _), writer in self._written.items() if writer is not None}

    def begin(self) -> None:
        """Forget the sums of the last refresh."""
        self._sums, self._calls, self._seen_input = {}, [], None
        self._searched = False
        self._by_name = {target.name: target for target in self.targets}
        # Torch's own attention multiplies with out_proj's weight without calling it, so that no input of out_proj is
        # seen: its values are watched where they are made, as queries and keys are.
        self.operands |= {target.name for target in self.targets if isinstance(target.module, nn.MultiheadAttention)}

    def observe(self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None, parts: Parts | None = None) -> None:
        """Sum up the site that this module reads, and find its writer the first time that it runs after another."""
        parts = Parts.whole(x, y) if parts is None else parts
        if target.kind == "linear" and not self._read_before(x):
            writer = self._by_name.get(self._writer(target, x, mask) or "")
            if writer is not None:
                add(self._sums, writer.name, *self._rows(x, mask), parts.x)
                self._seen_input = _Read(x)
        if target.name in self.operands:
            add(self._sums, target.name, *self._rows(y, mask), parts.y)
        self._calls.append(Call(target, self._sample(y, mask), x.detach()))
        self._calls = self._calls[-self._LOOK_BACK :]

    def _writer(self, target: Target, x: Tensor, mask: Tensor | None) -> str | None:
        place = target.name, self._calls[-1].target.name if self._calls else ""
        if place not in self._written:
            self._searched = True
            writer = find_writer(self._sample(x, mask), self._calls)
            self._written[place] = None if writer is None else writer.target.name
            if writer is not None:
                self.operands.update(operand.name for operand in writer.operands)
        return self._written[place]

    def _read_before(self, x: Tensor) -> bool:
        """q, k and v read the same tensor: one look is enough."""
        return self._seen_input is not None and self._seen_input.is_of(x)

    def _sample(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Copies of the same rows of every activation with so many, as the model may write to it afterwards.

        They are spread by a prime, as a stride may hit one position only.
        """
        rows_ND, kept = self._rows(x, mask)
        n = len(rows_ND) if kept is None else len(kept)
        if n <= self._SAMPLE_ROWS:
            return rows_ND.float().clone() if kept is None else rows_ND[kept].float()
        spread = torch.arange(self._SAMPLE_ROWS, device=rows_ND.device) * 7919 % n
        return rows_ND[spread if kept is None else kept[spread]].float()

    def finish(self) -> dict[str, Finding]:
        """Select the channels of every site."""
        if self._searched:
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
        self._written, operands = from_first((self._written, sorted(self.operands)), self.everyone)
        self.operands = set(operands)
        everywhere = in_common(self._sums, self.everyone)
        self._sums = {name: self._sums[name] for name in everywhere}

    def state(self) -> dict[str, Any]:
        """What a bit-exact continuation needs, beside `selected`."""
        return {"written": [[*place, by] for place, by in self._written.items()], "operands": sorted(self.operands)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self._written = {(reader, before): by for reader, before, by in state.get("written", ())}
        self.operands |= set(state["operands"])
