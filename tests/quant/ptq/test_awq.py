"""AWQ: the scale, the search, every family's function kept, better where channels are large."""

from __future__ import annotations

import pytest
import torch
from tests.quant.tiny_families import FAMILIES, apart, build, job, outlying

from s2d.quant import quantize
from s2d.quant.calibration.transforms import channel_statistics
from s2d.quant.calibration.walk import walk
from s2d.quant.ptq.awq import awq, awq_scale, best_scale
from s2d.quant.ptq.smoothquant import input_statistics, pairs


def test_the_scale_at_its_ends() -> None:
    weights = [torch.tensor([[2.0, 1.0], [4.0, -4.0]])]  # relative: (1 + 1) / 2 and (0.5 + 1) / 2
    mean = torch.tensor([8.0, 2.0])
    alone = awq_scale(mean, weights, 1.0)  # the weights' part is 1 for every channel
    assert torch.allclose(alone, torch.tensor([2.0, 0.5]).double(), rtol=1e-3)
    inputs = awq_scale(mean, weights, 0.0)
    assert torch.allclose(inputs[0] / inputs[1], torch.tensor(0.75).double(), rtol=1e-3)
    assert torch.allclose(inputs.max() * inputs.min(), torch.tensor(1.0).double())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_kept_on_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2d.quant.ptq.awq.STEPS", 2)
    case = build(name)
    plain = case.output()
    work = job(case, "w3a16")
    awq(work)
    assert apart(case.output(work.model), plain) < 1e-5


def test_the_search_leaves_the_block_as_it_was_and_finds_the_best() -> None:
    case = outlying()
    work = job(case, "w3a16")
    pair = pairs(work)[0]
    statistics = input_statistics(pair, channel_statistics(work, [pair.readers[0]]))
    block = next(walk(work))
    before = {key: value.clone() for key, value in block.module.state_dict().items()}
    scale = best_scale(work, block, pair, statistics, block.run(block.inputs))
    assert scale is not None and scale[7] > 3 * scale.median()
    assert all(torch.equal(value, before[key]) for key, value in block.module.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("spec", ["w3a16", "w4a16"])
def test_better_than_rounding_alone_where_channels_are_large(spec: str) -> None:
    case = outlying()
    plain = case.output()
    scaled, rtn = (
        float((case.output(quantize(case.model, spec, calibration=case.batches, method=method)) - plain).norm())
        for method in ("awq", "rtn")
    )
    assert scaled < 0.9 * rtn
