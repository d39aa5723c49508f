from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quant.tiny_models import Case

from s2d.errors import InputError
from s2d.quant import QuantSpec, estimate, plan, planned, quantize, record, save


@pytest.mark.parametrize(
    "spec",
    ["w4a4", "w8a8", "w3a16", "mxfp4", "nvfp4", {"base": "w4a8", "weight": {"granularity": "group-8"}}],
    ids=str,
)
def test_the_size_is_that_of_the_saved_file(make: Callable[[str], Case], tmp_path: Path, spec: object) -> None:
    for name in ("bert-sdpa", "vit-sdpa", "torch-encoder"):
        case = make(name)
        quantized = quantize(case.model, spec, calibration=case.batches)  # type: ignore[arg-type]
        expected = estimate(case.model, record(quantized).sites)
        save(quantized, tmp_path / name)
        (file,) = (tmp_path / name).glob("*.safetensors")
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert abs(file.stat().st_size - header - expected.stored_bytes) <= 0.01 * expected.stored_bytes
        assert expected.plain_bytes == sum(t.numel() * t.element_size() for t in case.model.state_dict().values())


def test_a_tied_weight_is_counted_as_it_is_stored(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    case.model.blocks[1].fc1.weight = case.model.blocks[0].fc1.weight
    sites = plan(case.model, QuantSpec.parse("w4a16"))
    assert estimate(case.model, sites).stored_bytes > 32 * 16 * 4


def test_the_time_is_that_of_the_forwards(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    sites = plan(case.model, QuantSpec.parse("w4a4"))
    one = estimate(case.model, sites, "rtn", case.batches)
    assert one.batches == 3 and one.forward_seconds and one.seconds == pytest.approx(3 * one.forward_seconds)
    assert estimate(case.model, sites, "gptaq", case.batches).passes > one.passes
    assert "stored:" in str(one) and "at least" in str(one)
    assert estimate(case.model, sites).seconds is None and "time" not in str(estimate(case.model, sites))
    assert estimate(case.model, sites, "rtn", (batch for batch in case.batches)).seconds is None
    with pytest.raises(InputError, match="does not fit"):
        estimate(case.model, sites, "rtn", [{"x": torch.randn(2, 7, 3)}])


def test_a_spec_stands_for_its_plan(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    sites = planned(case.model, QuantSpec.parse("w4a4"), case.batches)
    for spec in ("w4a4", {"base": "w4a4"}, QuantSpec.parse("w4a4")):
        assert (
            estimate(case.model, spec, calibration=case.batches).stored_bytes
            == estimate(case.model, sites).stored_bytes
        )
    assert (
        estimate(case.model, "w4a4").stored_bytes
        == estimate(case.model, plan(case.model, QuantSpec.parse("w4a4"))).stored_bytes
    )
