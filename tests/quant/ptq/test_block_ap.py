"""Block-AP: every block comes closer than its rounding, on the grid; saved, interrupted and repeated it is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quant.ptq.test_adaround import weights
from tests.quant.tiny_models import Case
from torch import Tensor, nn

from s2d import quant
from s2d.quant.ptq import block_ap


@torch.no_grad()
def stream(block: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return [block(x) for x in inputs]


@pytest.mark.parametrize("rounding", ["rtn", "erq"])
def test_each_block_comes_closer_to_what_it_was(make: Callable[[str], Case], rounding: str) -> None:
    case = make("plain-sdpa")
    rounded, trained = (
        quant.quantize(case.model, "w3a8", calibration=case.batches, method=method)
        for method in (rounding, f"{rounding}+block-ap")
    )
    full = behind = [batch["x"] for batch in case.batches]
    for plain, before, after in zip(case.model.blocks, rounded.blocks, trained.blocks, strict=True):
        full = stream(plain, full)
        errors = [
            sum((y - z).square().sum().item() for y, z in zip(stream(block, behind), full, strict=True))
            for block in (before, after)
        ]
        assert errors[1] < 0.9 * errors[0]
        behind = stream(after, behind)


@pytest.mark.parametrize("name", ["vit-sdpa", "torch-encoder"])
def test_weights_lie_on_their_grid_and_saved_is_what_is_in_memory(
    make: Callable[[str], Case], name: str, tmp_path: Path
) -> None:
    case = make(name)
    model = quant.quantize(case.model, "w4a4", calibration=case.batches, method="block-ap")
    plain = quant.quantize(case.model, "w4a4", calibration=case.batches, method="rtn")
    changed = 0
    for (site, weight, quantizer), (_, before, _) in zip(weights(model), weights(plain), strict=True):
        assert torch.equal(quantizer.fake_quantize(weight), weight), site.name
        changed += int((weight != before).sum())
    assert changed > 0 and not any(isinstance(module, block_ap.TrainedWeight) for module in model.modules())
    quant.save(model, tmp_path)
    assert torch.equal(case.output(quant.load(tmp_path, case.model)), case.output(model))


def test_the_seed_decides_and_an_interrupted_call_continues(make: Callable[[str], Case], tmp_path: Path) -> None:
    case = make("plain-sdpa")

    def output(seed: int, **options: Path) -> Tensor:
        settings: dict[str, Any] = {"calibration": case.batches, "method": "erq+block-ap+qwt", "seed": seed, **options}
        return case.output(quant.quantize(case.model, "w4a4", **settings))

    first = output(0, resume=tmp_path / "kept")
    (kept,) = (tmp_path / "kept").glob("1-blocks.1.safetensors")  # of the second walk, the last block
    kept.unlink()
    assert torch.equal(output(0, resume=tmp_path / "kept"), first) and kept.is_file()
    assert not torch.equal(output(1), first)


def test_what_has_no_integer_grid_stays(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    outputs = [
        case.output(quant.quantize(case.model, "nvfp4", calibration=case.batches, method=method))
        for method in ("rtn", "rtn+block-ap")
    ]
    assert torch.equal(*outputs)
