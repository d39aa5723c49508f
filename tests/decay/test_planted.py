"""A share of benchmarks/planted_outliers.py: outliers planted by name in architectures of every kind are found."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sweep: Any = importlib.import_module("planted_outliers")

# Shared blocks, gains of 1 + w, experts, two towers that read each other, two beside one another, functional weights.
SHARE = ("AlbertModel", "GemmaForCausalLM", "MixtralForCausalLM", "WhisperModel", "CLIPModel", "eva02_tiny_patch14_224")


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Any, Any]]:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    return {name.removeprefix("timm "): (make, batch) for name, make, batch in sweep.rows()}


@pytest.mark.parametrize("name", SHARE)
def test_a_planted_outlier_is_shrunk_below_the_limit_and_nothing_else_changes(name: str, made: Any) -> None:
    found = sweep.look(*made[name])
    for what, row in found.items():
        assert row["ok"], (what, row)
        assert row["first_ratio"] > row["limit"] > row["last_ratio"] and not row["others_changed"]
