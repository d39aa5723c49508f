"""Rivals of spectral decay, one file each and one contract: `base.Baseline`.

They are here for fair comparisons (``benchmarks/rivals.py``), not as recommendations: docs/baselines.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from s2d.baselines.base import REGISTERED, Baseline, Settings
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError, choices

__all__ = ["Baseline", "attach", "baselines", "create", "settings_of"]
KEY = "baseline"  # an arm's key for its baseline


def baselines() -> dict[str, str]:
    """The known baselines: name and one line."""
    return {name: (inspect.getdoc(found) or "").partition("\n")[0] for name, found in sorted(REGISTERED.all().items())}


def create(name: str, model: nn.Module, optimizer: Optimizer, *, seed: int = 0, **settings: Any) -> Baseline:
    """A baseline on a model and the optimizer that trains it.

    Args:
        name: One of `baselines()`.
        model: Changed in place.
        optimizer: The one that trains it.
        seed: Seed of its random parts.
        settings: Settings of the baseline; see its file.

    Raises:
        InputError: Unknown name or setting (close ones are listed), an impossible value, or a model without anything to
            act on.
    """
    found = _find(name)
    return found(model, optimizer, _settings(found, settings), seed=seed)


def settings_of(arm: Mapping[str, Any]) -> dict[str, Any]:
    """The name and all settings of an arm's ``{"baseline": NAME, ...}``.

    Raises:
        InputError: As `create`, as far as it shows without a model.
    """
    found = _find(arm[KEY])
    given = {name: value for name, value in arm.items() if name != KEY}
    return {KEY: found.name, **asdict(_settings(found, given))}


def attach(
    model: nn.Module, optimizer: Optimizer, arm: Mapping[str, Any], *, total_steps: int | None = None, seed: int = 0
) -> SelectiveSpectralDecay | Baseline:
    """The training method of an arm: the baseline that it names, else spectral decay with these keywords.

    ``total_steps`` is the length of the run, where it is known.

    Raises:
        InputError: As `create` or `SelectiveSpectralDecay`.
    """
    if KEY not in arm:
        return SelectiveSpectralDecay(model, optimizer, **{"total_steps": total_steps, "seed": seed, **arm})
    settings = {name: value for name, value in arm.items() if name != KEY}
    return create(arm[KEY], model, optimizer, seed=seed, **settings)


def _find(name: Any) -> type[Baseline]:
    known = REGISTERED.all()
    if not isinstance(name, str) or name not in known:
        raise InputError(f"there is no baseline {name!r}; {choices(str(name), sorted(known))}")
    return known[name]


def _settings(found: type[Baseline], given: Mapping[str, Any]) -> Settings:
    accepted = [field.name for field in fields(found.Settings)]
    for name in given:
        if name not in accepted:
            raise InputError(f"the baseline {found.name} has no setting {name!r}; {choices(name, accepted)}")
    return found.Settings(**given)
