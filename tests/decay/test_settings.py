"""Settings: presets, and the refusal of impossible ones."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from tests.blocks import WIDTH, Encoder, Two, hooks_of, removed, sgd, still_step
from torch import nn

from s2d.decay.settings import PRESETS, DecaySettings
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError


def test_the_papers_settings() -> None:
    assert PRESETS["paper"] == DecaySettings(
        metric="weight", mode="coupled", power=2.0, strength=5e-4, threshold=0.95, max_rank=3, refresh_every=100,
        outlier_ratio=0.0, track=False, kinds=("linear", "conv"),
    )  # fmt: skip
    model = Encoder()
    decay = SelectiveSpectralDecay(model, sgd(model), preset="paper", strength=1e-3)
    decay.remove()
    assert decay.settings == DecaySettings(**{**vars(PRESETS["paper"]), "strength": 1e-3})
    default = SelectiveSpectralDecay(model, sgd(model))
    default.remove()
    assert default.settings == PRESETS["default"] == DecaySettings()


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"metric": "entropy"}, "metric"),
    ({"mode": "both"}, "mode"),
    ({"preset": "papers"}, "preset"),
    ({"threshold": 1.01}, "threshold"),
    ({"threshold": -0.1}, "threshold"),
    ({"threshold": "high"}, "threshold"),
    ({"strength": -1e-9}, "strength"),
    ({"strength": math.inf}, "strength"),
    ({"strength": math.nan}, "strength"),
    ({"strength": True}, "strength"),
    ({"power": 0.5}, "power"),
    ({"power": 17}, "power"),
    ({"outlier_ratio": -1}, "outlier_ratio"),
    ({"outlier_ratio": math.nan}, "outlier_ratio"),
    ({"fall": 1.0, "total_steps": 10}, "fall=1.0"),
    ({"fall": 2.0}, "total_steps"),
    ({"fall": 2.0, "power": 2.0, "total_steps": 10}, "fall=2.0 with metric='site'"),
    ({"max_rank": 0}, "max_rank"),
    ({"max_rank": 2.0}, "max_rank"),
    ({"max_rank": 1000}, "max_rank"),
    ({"refresh_every": 0}, "refresh_every"),
    ({"refresh_every": True}, "refresh_every"),
    ({"track": "yes"}, "track"),
    ({"kinds": ()}, "kinds"),
    ({"kinds": ("linear", "bias")}, "kinds"),
    ({"kinds": "lines"}, "kinds"),
    ({"seed": 0.5}, "seed"),
    ({"metric": "site", "mode": "coupled"}, "metric='site'"),
    ({"include": "no.such.weight"}, "no.such.weight"),
    ({"include": "re:("}, "regular expression"),
    ({"exclude": "*"}, "excludes every"),
]


@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS, ids=[str(settings) for settings, _ in BAD_SETTINGS])
def test_impossible_settings_are_refused_by_name_in_one_line(settings: dict[str, Any], words: str) -> None:
    model = Encoder()
    optimizer = sgd(model)
    before = hooks_of(model, optimizer)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        SelectiveSpectralDecay(model, optimizer, **settings)
    assert "\n" not in str(caught.value)
    assert hooks_of(model, optimizer) == before


@pytest.mark.parametrize("optimizer", [None, [], "adam", [None], 3])
def test_an_optimizer_is_needed(optimizer: Any) -> None:
    with pytest.raises(InputError, match="torch.optim.Optimizer") as caught:
        SelectiveSpectralDecay(Encoder(), optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [None, "bert", {"weight": torch.ones(3, 3)}])
def test_a_model_is_needed(model: Any) -> None:
    with pytest.raises(InputError, match="model is"):
        SelectiveSpectralDecay(model, sgd(Encoder()))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match="no linear or norm weights"):
        SelectiveSpectralDecay(nn.ReLU(), sgd(Encoder()), kinds=("linear", "norm"))


def test_a_rank_may_exceed_that_of_some_weights() -> None:
    """A head with two classes is no reason to refuse; it has two components."""
    model = Two(nn.Linear(20, 24), nn.Linear(24, 2))
    optimizer = sgd(model)
    with removed(
        SelectiveSpectralDecay(model, optimizer, metric="weight", mode="decoupled", max_rank=3, outlier_ratio=0.0)
    ) as decay:
        still_step(model, optimizer, torch.randn(30, 20))
    assert [len(r["sigma"]) for r in decay.history] == [3, 2]


def test_weights_that_are_not_finite_are_named() -> None:
    model = Two(nn.Linear(20, 24), nn.Linear(24, 8))
    optimizer = sgd(model)
    with removed(SelectiveSpectralDecay(model, optimizer, preset="paper")):
        model(torch.randn(30, 20)).sum().backward()
        with torch.no_grad():
            model.second.weight[1, 2] = math.nan  # type: ignore[index, operator]
        with pytest.raises(InputError, match=r"second\.weight holds 1 NaN or Inf"):
            optimizer.step()


def test_a_kind_alone_may_be_named() -> None:
    model = Encoder()
    decay = SelectiveSpectralDecay(model, sgd(model), kinds="norm")  # type: ignore[arg-type]
    decay.remove()
    assert {t.kind for t in decay.targets} == {"norm"} and f"{WIDTH}" not in repr(decay)
    assert "metric=" in repr(decay)
