"""Singular components of the weight itself, selected by PCDR: the paper's metric (arXiv 2602.14432).

Shapes: N tokens, O outputs, I inputs, K components, E outlier entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s2d.decay.selection.base import RELEASE, SAME_COMPONENT, SPARE, Components, Finding, Metric, largest_here
from s2d.decay.written_sites import Uses
from s2d.distributed.sharding import (
    Block,
    Groups,
    Parts,
    all_reduce,
    all_reduce_floats,
    all_reduce_many,
    kth_largest,
    local_part,
)
from s2d.spectral.statistics import Sums, add, outlier_count, peaks, token_rows
from s2d.spectral.svd import top_singular_many
from s2d.spectral.triplets import Triplets
from s2d.targets.calls import bias_of
from s2d.targets.weights import Target


@dataclass
class _Seen:
    """The outlier entries of one weight, pass by pass, held until the end of a refresh; at most a few dozen rows each.

    `sizes` are the magnitudes that make them outliers; `values` are without bias.
    """

    parts: Parts
    squares: float = 0.0
    entries: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)

    def keep(self, number: int, among: int, kept: Tensor) -> None:
        """Reduce pass `number` to the entries of a mask: the outliers among this number of entries of all ranks."""
        self.entries[number] = among
        for entries in (self.inputs, self.sizes, self.values, self.columns):
            entries[number] = entries[number][kept]


class WeightMetric(Metric):
    """Singular components of the weight itself: the paper's metric."""

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        self.triplets: dict[str, Triplets] = {}
        self.fallbacks = 0
        self._seen: dict[str, _Seen] = {}
        self._norms: dict[str, Sums] = {}

    def begin(self) -> None:
        """Forget the sums of the last refresh."""
        self._seen, self._norms = {}, {}

    def forget(self, name: str) -> None:
        """Its triplets are of the weight that is gone."""
        super().forget(name)
        self.triplets.pop(name, None)

    def _observe(
        self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None, parts: Parts, uses: Uses | None
    ) -> None:
        """Keep the inputs and values of the largest outputs."""
        y_NO, kept = self._rows(y, mask)
        if target.kind == "norm":
            add(self._norms, target.name, y_NO, kept, parts.y)
            return
        found = peaks(y_NO, kept)
        if found is None and not parts.y.groups:
            return
        seen = self._seen.setdefault(target.name, _Seen(parts))
        seen.entries.append(0 if found is None else found.entries)
        seen.squares += 0.0 if found is None else found.squares
        row_E, column_E = largest_here(y_NO, found, kept, parts.y)
        given = token_rows(x.unsqueeze(-1))[row_E, 0] if target.kind == "embedding" else token_rows(x)[row_E].float()
        value_E, bias = y_NO[row_E, column_E].float(), bias_of(target)
        seen.inputs.append(given)
        seen.sizes.append(value_E.abs())
        seen.values.append(value_E if bias is None else value_E - local_part(bias)[column_E].to(value_E))
        seen.columns.append(column_E + parts.y.first)

    def finish(self) -> dict[str, Finding]:
        """Refresh the triplets, and select by PCDR."""
        self._keep_largest()
        matrices = [t for t in self.targets if t.name in self._seen and sum(self._seen[t.name].entries)]
        width = {t.name: min(self.max_rank + SPARE, *t.block().shape) for t in matrices}
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
        findings = self._judge(matrices)
        return self._select(findings, self._norms)

    def _keep_largest(self) -> None:
        """Keep the outliers of every pass that are among the largest of all ranks together."""
        calls: dict[Groups, list[tuple[_Seen, int]]] = {}
        for seen in self._seen.values():
            if seen.parts.y.groups:
                calls.setdefault(seen.parts.y.groups, []).extend((seen, number) for number in range(len(seen.sizes)))
        for groups, members in calls.items():
            sizes = [seen.sizes[number] for seen, number in members]
            entries = torch.tensor([seen.entries[number] for seen, number in members], device=sizes[0].device)
            among = all_reduce(entries, groups).tolist()
            limits = kth_largest(sizes, [outlier_count(each) for each in among], groups)
            for (seen, number), size, limit, each in zip(members, sizes, limits, among, strict=True):
                seen.keep(number, each, size >= limit)

    def _judge(self, matrices: list[Target]) -> dict[str, Finding]:
        """The findings of all weights. Sums over ranks take a few messages for all weights together."""
        seen, found = [self._seen[t.name] for t in matrices], [self.triplets[t.name] for t in matrices]
        values, columns = [torch.cat(s.values) for s in seen], [torch.cat(s.columns) for s in seen]
        groups = [s.parts.y.groups for s in seen]
        part = self._projected(matrices, [each.V for each in found])
        made = [(p * t.S * t.U[c]).cumsum(-1).abs().sum(0) for p, t, c in zip(part, found, columns, strict=True)]
        totals = all_reduce_many([value.abs().sum() for value in values], groups)
        tops = all_reduce_many([torch.cat([v.abs(), v.new_zeros(1)]).max() for v in values], groups, "max")
        squares = all_reduce_floats([s.squares for s in seen], groups, [value.device for value in values])
        ratios = [
            each / total if total > 0 else torch.zeros_like(each)
            for each, total in zip(all_reduce_many(made, groups), totals, strict=True)
        ]
        findings: dict[str, Finding] = {}
        reached: dict[str, int] = {}
        for t, triplets, ratio_K, top, square, s in zip(matrices, found, ratios, tops, squares, seen, strict=True):
            peak, rms = top.item(), math.sqrt(square / sum(s.entries))
            k = min(self.max_rank, len(triplets.S))
            finding = Finding(triplets.S[:k].tolist(), ratio_K[:k].tolist(), peak, peak / rms if rms > 0 else 0.0)
            findings[t.name] = finding
            if finding.outlier_ratio >= self._gate(t.name):
                over = (ratio_K[: self.max_rank] >= self.threshold).nonzero()
                reached[t.name] = int(over[0]) + 1 if len(over) else 0
        kept = self._still_tracked([t for t in matrices if t.name in reached], reached)
        for t, triplets in zip(matrices, found, strict=True):
            k = reached.get(t.name, 0)
            chosen = (
                [Components(triplets.S[:k].clone(), triplets.U[:, :k].clone(), triplets.V[:, :k].clone())] if k else []
            )
            chosen += [kept[t.name]] if t.name in kept else []
            S, U, V = (torch.cat([getattr(c, part) for c in chosen], -1) if chosen else None for part in "SUV")
            findings[t.name].components = Components(S, U, V) if S is not None and len(S) else None
        return findings

    def _still_tracked(self, judged: list[Target], reached: dict[str, int]) -> dict[str, Components]:
        """The components selected before, beyond the first so many triplets, that still make outliers."""
        tracked = [t for t in judged if self.track and t.name in self.selected]
        if not tracked:
            return {}
        seen = [self._seen[t.name] for t in tracked]
        groups = [s.parts.y.groups for s in seen]
        moved = [_followed(self.selected[t.name], self.triplets[t.name], reached[t.name]) for t in tracked]
        blocks = [_as_block(t) for t in tracked]
        present = [block.between(U, V) for block, (U, V) in zip(blocks, moved, strict=True)]
        present = all_reduce_many(present, [block.groups for block in blocks])
        part = self._projected(tracked, [V for _, V in moved])
        shares, totals = [], []
        for p, S, (U, _), s in zip(part, present, moved, seen, strict=True):
            value_E, column_E = torch.cat(s.values), torch.cat(s.columns)
            shares.append((p * S * U[column_E] * value_E.sign()[:, None]).sum(0))
            totals.append(value_E.abs().sum())
        shares, totals = all_reduce_many(shares, groups), all_reduce_many(totals, groups)
        kept = {}
        for t, S, (U, V), share, total in zip(tracked, present, moved, shares, totals, strict=True):
            keep = share / total.clamp_min(1e-30) >= RELEASE * self.threshold
            kept[t.name] = Components(S[keep], U[:, keep], V[:, keep])
        return kept

    def _projected(self, targets: list[Target], Vs: list[Tensor]) -> list[Tensor]:
        """The inputs of each weight's outliers along vectors ``[I, K]``: ``[E, K]``."""
        along, groups = [], []
        for target, V in zip(targets, Vs, strict=True):
            seen = self._seen[target.name]
            x_E = torch.cat(seen.inputs)
            part = seen.parts.x
            # An embedding's input is one-hot, so its projection on v is one entry of v.
            along.append(V[x_E] if target.kind == "embedding" else x_E.to(V.dtype) @ part.narrowed(V, 0))
            groups.append(part.column_groups)
        return all_reduce_many(along, groups)

    def state(self) -> dict[str, Any]:
        """The state that a bit-exact continuation needs, beside `selected`."""
        return {"triplets": {name: vars(t).copy() for name, t in self.triplets.items()}, "fallbacks": self.fallbacks}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from `state`."""
        self.triplets = {name: Triplets(**fields) for name, fields in state["triplets"].items()}
        self.fallbacks = state["fallbacks"]


def _as_block(target: Target) -> Block:
    """``[out, in]``; an embedding table maps one-hot tokens to features, so it is read transposed."""
    return target.block().mT if target.kind == "embedding" else target.block()


def _as_linear(target: Target) -> Tensor | Block:
    block = _as_block(target)
    return block if block.groups else block.local


def _followed(old: Components, found: Triplets, k: int) -> tuple[Tensor, Tensor]:
    """The present U and V of the components selected last, without those among the first k.

    A component that is still among the triplets found takes their vectors. A component that is not keeps its own.
    """
    assert old.U is not None and old.V is not None
    overlap = (old.U.mT @ found.U).abs() * (old.V.mT @ found.V).abs()
    best, index = overlap.max(1)
    spare = index[(best >= SAME_COMPONENT) & (index >= k)].unique()
    covered = torch.linalg.vector_norm(old.U.mT @ found.U[:, :k], dim=1) >= SAME_COMPONENT
    lost = (best < SAME_COMPONENT) & ~covered
    U, V = (torch.cat([new[:, spare], kept[:, lost]], 1) for new, kept in ((found.U, old.U), (found.V, old.V)))
    return U, V
