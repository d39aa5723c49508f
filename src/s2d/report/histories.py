"""The decay at work: singular values and outliers of the weights that it watches, refresh by refresh."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2d.report.formatting import ratio, show

if TYPE_CHECKING:
    from s2d.report.schema import Moment

SHOWN = 6  # the number of colours that everybody can tell apart


@dataclass(frozen=True)
class Track:
    """One weight over the refreshes, in order of steps."""

    weight: str
    moments: tuple[Moment, ...]

    def series(self, measure: str) -> list[float | None]:
        """A measure at every moment; None where it was not taken or cannot be drawn on a logarithmic scale."""
        values = (getattr(moment, measure) for moment in self.moments)
        return [value if math.isfinite(value) and value > 0 else None for value in values]

    def fall(self) -> float:
        """The factor by which the outliers fell; of the leading singular value where no outliers were logged."""
        for measure in ("ratio", "sigma"):
            known = [value for value in self.series(measure) if value is not None]
            if known:
                return known[0] / known[-1] if len(known) > 1 else 0.0
        return 0.0


def tracks(history: Sequence[Moment]) -> dict[str, Track]:
    """The weights with more than one moment, by name."""
    found: dict[str, list[Moment]] = defaultdict(list)
    for moment in history:
        found[moment.weight].append(moment)
    return {
        weight: Track(weight, tuple(sorted(moments, key=lambda moment: moment.step)))
        for weight, moments in found.items()
        if len(moments) > 1
    }


def most_decayed(found: dict[str, Track]) -> list[Track]:
    """The weights that were ever selected, those whose outliers fell by the largest factor first."""
    decayed = [track for track in found.values() if any(moment.selected for moment in track.moments)]
    return sorted(decayed, key=Track.fall, reverse=True)[:SHOWN]


def track_figure(track: Track) -> dict[str, Any]:
    """One weight's history as lists over its moments."""
    return {
        "name": track.weight,
        "step": [moment.step for moment in track.moments],
        "sigma": track.series("sigma"),
        "ratio": track.series("ratio"),
        "pcdr": track.series("pcdr"),
        "selected": [moment.selected for moment in track.moments],
    }


def history_figure(decayed: Sequence[Track]) -> list[dict[str, Any]]:
    """The panels of the most decayed weights: their outliers, and the leading singular value; with words for both."""
    panels = []
    for measure, heading, write in (("ratio", "largest output / RMS", ratio), ("sigma", "singular value σ₁", show)):
        shown = [track for track in decayed if sum(value is not None for value in track.series(measure)) > 1]
        said = []
        for track in shown:
            known = [value for value in track.series(measure) if value is not None]
            said.append(f"{track.weight}: {write(known[0])} to {write(known[-1])}")
        if shown:
            panels.append(
                {
                    "heading": heading,
                    "measure": measure,
                    "weights": [track.weight for track in shown],
                    "said": f"{heading} by optimizer step. " + "; ".join(said),
                }
            )
    return panels
