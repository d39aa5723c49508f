"""The default metric: outlier channels at quantization sites, shrunk in the weights that write them.

Shapes: N tokens, D channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from s2d.decay.selection.base import Components, Finding, Metric, coordinate_finding
from s2d.decay.selection.limits import site_ratio
from s2d.decay.written_sites import Site, Uses
from s2d.distributed.sharding import Part, Parts, in_common
from s2d.spectral.statistics import Sums, add, reduced
from s2d.targets.weights import Target


class SiteMetric(Metric):
    """Coordinate components where quantizers sit, shrunk in the weights that write them.

    The model's graph tells which weight writes a site, see `s2d.decay.written_sites`.
    """

    def __init__(self, targets: list[Target], **settings: Any) -> None:
        super().__init__(targets, **settings)
        self._sums: dict[str, Sums] = {}
        self._sites: dict[str, Site] = {}

    def begin(self) -> None:
        """Forget the sums of the last refresh."""
        self._sums, self._sites = {}, {}

    def _observe(
        self, target: Target, x: Tensor, y: Tensor, mask: Tensor | None, parts: Parts, uses: Uses | None
    ) -> None:
        """Sum up the site that this module reads, and the sites observed at its output."""
        if uses is None:
            return
        if uses.read is not None:
            self._add(uses.read, target, x, mask, parts.x)
        for site in uses.written:
            if site.rows is None:
                self._add(site, target, y, mask, parts.y)
            elif not parts.y.column_groups:
                here = y[..., torch.tensor(site.rows, device=y.device)]
                self._add(site, target, here, mask, replace(parts.y, width=len(site.rows)))

    def _add(self, site: Site, reader: Target, x: Tensor, mask: Tensor | None, part: Part) -> None:
        key = site.writer if site.rows is None else f"{site.writer} at {reader.name} {site.rows[0]}:{len(site.rows)}"
        self._sites[key] = site
        add(self._sums, key, *self._rows(x, mask), part)

    def observe_stack(self, site: Site, reader: str, sums: Sums) -> None:
        """Add the statistics of a site inside experts, of the rows of the stack that it names."""
        key = f"{site.writer} in {reader}"
        self._sites[key] = site
        known = self._sums.get(key)
        if known is not None:
            largest = torch.maximum(known.channel_max, sums.channel_max)
            squares = known.channel_squares + sums.channel_squares
            sums = Sums(largest, squares, known.rows + sums.rows, sums.part)
        self._sums[key] = sums

    def finish(self) -> dict[str, Finding]:
        """Select the channels of every site."""
        by_name = {target.name: target for target in self.targets}
        if self.searched:
            # Ranks trace their own data, where other parts may run.
            everywhere = in_common(self._sums, self.everyone)
            self._sums = {key: self._sums[key] for key in everywhere}
        findings: dict[str, Finding] = {}
        for key, sums in reduced(self._sums).items():
            site = self._sites[key]
            sums, rows = (sums, None) if site.rows is None else _by_row(sums, site.rows)
            limit = site_ratio(sums) if self.own_limits else self.outlier_ratio
            if site.writer in by_name:
                target, selected = by_name[site.writer], self.selected.get(site.writer)
                found = coordinate_finding(sums, target, limit, selected, rows)
                findings[site.writer] = _together(findings.get(site.writer), found)
        self.selected = {n: f.components for n, f in findings.items() if f.components is not None}
        return findings


def _by_row(sums: Sums, rows: tuple[int, ...]) -> tuple[Sums, Tensor]:
    """The sums over the rows that write the channels (the largest maximum, the mean square), and these rows."""
    index = torch.tensor(rows, device=sums.channel_max.device)
    present, place, count = index.unique(return_inverse=True, return_counts=True)
    largest = sums.channel_max.new_zeros(len(present)).scatter_reduce_(0, place, sums.channel_max, "amax")
    squares = sums.channel_squares.new_zeros(len(present)).index_add_(0, place, sums.channel_squares) / count
    return Sums(largest, squares, sums.rows, Part(len(present))), present


def _together(one: Finding | None, other: Finding) -> Finding:
    """Merge two sites that one weight writes: the numbers of the worse one, the channels of both."""
    if one is None:
        return other
    worse, better = (one, other) if one.outlier_ratio >= other.outlier_ratio else (other, one)
    if worse.components is None or better.components is None:
        return replace(worse, components=worse.components or better.components)
    a, b = worse.components, better.components
    assert a.channels is not None and b.channels is not None
    new = ~torch.isin(b.channels, a.channels)
    both = Components(torch.cat([a.S, b.S[new]]), channels=torch.cat([a.channels, b.channels[new]]))
    return replace(worse, components=both)
