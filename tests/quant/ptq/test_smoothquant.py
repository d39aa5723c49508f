"""SmoothQuant: the closed form, every family's function kept, better where channels are large."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.quant.tiny_families import FAMILIES, POST_NORM, apart, build, job, outlying

from s2d.errors import InputError
from s2d.quant import load, quantize, remove, save
from s2d.quant.calibration.transforms import channel_statistics
from s2d.quant.modules.online import OnlineLinear
from s2d.quant.ptq.smoothquant import smoothing_scale, smoothquant

pytestmark = pytest.mark.filterwarnings("ignore:.*is post-norm")


def test_the_scale_is_equation_4() -> None:
    weights = [torch.tensor([[1.0, -4.0, 0.0, 2.0]]), torch.tensor([[-9.0, 1.0, 0.0, 1.0], [0.0, 2.0, 0.0, 0.5]])]
    largest = torch.tensor([4.0, 16.0, 5.0, 0.0])
    wanted = torch.tensor([2.0 / 3.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # dead weights and dead inputs keep 1
    assert torch.allclose(smoothing_scale(largest, weights), wanted)
    assert torch.allclose(smoothing_scale(largest, weights, 1.0)[:2], largest[:2].double())
    assert torch.allclose(smoothing_scale(largest, weights, 0.0)[:2], 1.0 / torch.tensor([9.0, 4.0]).double())


def test_statistics_leave_padding_out_and_know_their_tokens() -> None:
    case = build("bert")
    name = "encoder.layer.0.intermediate.dense"
    seen: list[torch.Tensor] = []
    hook = case.model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    for batch in case.batches:
        case.output(batch=batch)
    hook.remove()
    real = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, case.batches, strict=True)]).abs()
    found = channel_statistics(job(case), [name])[name]
    assert torch.allclose(found.largest, real.amax(0), rtol=1e-6)
    assert torch.allclose(found.mean, real.mean(0), rtol=1e-5) and found.tokens == len(real)


def test_nan_is_named() -> None:
    case = build("vit")
    with torch.no_grad():
        case.model.layers[0].layernorm_before.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"layers\.0\..*NaN"):
        quantize(case.model, "w4a4", calibration=case.batches, method="smoothquant")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_kept_on_every_family(name: str) -> None:
    case = build(name)
    plain = case.output()
    work = job(case)
    smoothquant(work)
    changed = [not torch.equal(a, b) for a, b in zip(work.model.parameters(), case.model.parameters(), strict=True)]
    assert sum(changed) >= 4
    assert apart(case.output(work.model), plain) < 1e-5
    # Only where nothing can be folded does the division stay in the forward.
    assert any(isinstance(module, OnlineLinear) for module in work.model.modules()) == (name in POST_NORM)
    remove(work.model)
    assert apart(case.output(work.model), plain) < 1e-5


@pytest.mark.parametrize("name", ["vit", "llama", "bert", "torch-post-norm"])
def test_after_rotation_too(name: str) -> None:
    case = build(name)
    quantized = quantize(case.model, "w8a16", calibration=case.batches, method="rotation+smoothquant")
    assert apart(case.output(quantized), case.output()) < 0.2
    assert apart(case.output(remove(quantized)), case.output()) < 0.2


@torch.no_grad()
def test_better_than_rounding_alone_where_channels_are_large() -> None:
    case = outlying()
    plain = case.output()
    smooth, rtn = (
        apart(case.output(quantize(case.model, "w4a4", calibration=case.batches, method=method)), plain)
        for method in ("smoothquant", "rtn")
    )
    assert smooth < 0.8 * rtn


def test_saved_and_loaded_bit_identical(tmp_path: Path) -> None:
    case = build("bert")
    quantized = quantize(case.model, "w4a4", calibration=case.batches, method="smoothquant")
    save(quantized, tmp_path)
    assert torch.equal(case.output(load(tmp_path, build("bert").model)), case.output(quantized))
