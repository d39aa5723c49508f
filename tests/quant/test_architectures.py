"""A share of the sweep over architectures; the whole of it is `python benchmarks/architectures.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).resolve().parents[2] / "benchmarks" / "architectures.py"
# Shared blocks, attention with more products, norms of other places, experts, two towers, windows, weight norm.
SHARE = ("Albert", "Deberta", "Gemma2", "Mixtral", "CLIP", "Swinv2Model", "Wav2Vec2")


def test_a_share_of_the_sweep_is_as_it_should_be() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    command = [sys.executable, "-W", "ignore", str(SWEEP), *SHARE, "--methods", "rtn,smoothquant,repq"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-1000:]
    assert f"{len(SHARE)} architectures, 0 with a failure" in done.stdout
