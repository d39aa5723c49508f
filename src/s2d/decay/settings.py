"""The settings of a decay, and the presets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from s2d.errors import InputError
from s2d.targets.weights import KINDS, Kind

MetricName = Literal["site", "data", "weight"]
Mode = Literal["decoupled", "coupled"]


@dataclass(frozen=True)
class DecaySettings:
    """The settings of a decay. `PRESETS` holds the named ones.

    Attributes:
        metric: Definition of a component; see `s2d.decay.selection`.
        mode: ``"decoupled"`` or ``"coupled"``.
        power: n of the penalty; 1 is exponential decay, the same for every size of component.
        strength: lambda. Decoupled: per step, times the schedule. Coupled: factor on the penalty in the loss.
        budget: The decay may change the loss by this share of the change by the optimizer's steps. Above it, the
            strength falls (site metric; see `s2d.decay.budget`). 0: no limit.
        fall: In place of a fixed strength: what a selected value is divided by over the whole run (2: it falls to a
            half), whose length the decay must know (``total_steps``); see `s2d.decay.fall`. None: ``strength`` counts.
        threshold: tau, the share of the outliers that selects a component (weight and data metric).
        max_rank: K_max, most components per weight (weight and data metric).
        refresh_every: m, optimizer steps between two refreshes, which measure the activations.
        outlier_ratio: Largest activation over RMS above which a site or an output is treated. None: for sites a limit
            from their own channels (`s2d.decay.selection.limits`), for outputs 8.
        track: Follow a component until its outlier is gone.
        kinds: Kinds of weight considered.
    """

    metric: MetricName = "site"
    mode: Mode = "decoupled"
    power: float = 1.0
    strength: float = 0.03
    budget: float = 0.0
    fall: float | None = None
    threshold: float = 0.3
    max_rank: int = 3
    refresh_every: int = 5
    outlier_ratio: float | None = None
    track: bool = True
    kinds: tuple[Kind, ...] = ("linear", "norm")

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            InputError: Naming the setting, its value and the range.
        """
        for name, value, allowed in (
            ("metric", self.metric, get_args(MetricName)),
            ("mode", self.mode, get_args(Mode)),
        ):
            if value not in allowed:
                raise InputError(f"{name}={value!r} is unknown; choose from {', '.join(allowed)}")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise InputError(f"kinds={self.kinds!r} must be one or several of {', '.join(KINDS)}")
        if not isinstance(self.track, bool):
            raise InputError(f"track={self.track!r} must be True or False")
        ranges = (
            ("strength", self.strength, 0.0, math.inf, "at least 0"),
            ("budget", self.budget, 0.0, math.inf, "at least 0, where 0 sets no limit"),
            ("fall", self.fall, math.nextafter(1.0, 2.0), math.inf, "above 1, or None for a fixed strength"),
            ("power", self.power, 1.0, 16.0, "between 1 (plain decay) and 16"),
            ("threshold", self.threshold, 0.0, 1.0, "between 0 and 1 (a share of the outliers)"),
            ("outlier_ratio", self.outlier_ratio, 0.0, math.inf, "at least 0"),
        )
        for name, value, low, high, text in ranges:
            if name in ("outlier_ratio", "fall") and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high or value == math.inf:  # pyright: ignore
                raise InputError(f"{name}={value!r} is out of range; it must be {text}")
        for name, value in (("max_rank", self.max_rank), ("refresh_every", self.refresh_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r} is out of range; it must be a whole number, at least 1")
        if self.fall is not None and self.metric == "site" and self.power != 1:
            raise InputError(f"fall={self.fall!r} with metric='site' divides channels by one factor; leave power at 1")
        if self.metric == "site" and self.mode == "coupled":
            raise InputError(
                "metric='site' shrinks rows and gains directly and has no loss form; "
                "use mode='decoupled', or metric='weight' or 'data' with mode='coupled'"
            )


PRESETS: dict[str, DecaySettings] = {
    "default": DecaySettings(),
    "paper": DecaySettings(
        metric="weight",
        mode="coupled",
        power=2.0,
        strength=5e-4,
        threshold=0.95,
        max_rank=3,
        refresh_every=100,
        outlier_ratio=0.0,
        track=False,
        kinds=("linear", "conv"),
    ),
}
