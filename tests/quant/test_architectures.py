"""A share of the sweep over architectures; the whole of it is `python benchmarks/architectures.py`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
# Shared blocks, attention with more products, norms of other places, experts, two towers, windows, weight norm.
SHARE = ("Albert", "Deberta", "Gemma2", "Mixtral", "CLIP", "Swinv2Model", "Wav2Vec2")


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_share_of_the_sweep_is_as_it_should_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(BENCHMARKS)
    sweep = importlib.import_module("architectures")
    monkeypatch.setattr(sys, "argv", ["architectures.py", *SHARE, "--methods", "rtn,smoothquant,repq"])
    threads = torch.get_num_threads()
    try:
        code = sweep.main()
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert code == 0, told
    assert f"{len(SHARE)} architectures, 0 with a failure" in told
