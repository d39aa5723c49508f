"""AdaRound: the rounding that is learned, and that a block comes closer to what it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from tests.quant.tiny_models import Case
from torch import Tensor

from s2d import quant
from s2d.quant.calibration.walk import Call
from s2d.quant.modules.sites import Site, weight_name
from s2d.quant.numerics.formats import integer_format
from s2d.quant.numerics.quantizer import WeightQuantizer
from s2d.quant.ptq import adaround
from s2d.quant.ptq.adaround import SoftRounding, beta_at, mixed, rectified, roundness, start_at


def weights(model: torch.nn.Module) -> list[tuple[Site, Tensor, WeightQuantizer]]:
    quantizers = {module.name: module for module in model.modules() if isinstance(module, WeightQuantizer)}
    return [
        (site, model.get_parameter(weight_name(model, site)).detach(), quantizers[site.name])
        for site in quant.record(model).sites
        if site.what == "weight" and site.format is not None
    ]


def test_the_rectified_sigmoid_starts_at_the_fraction_and_reaches_both_ends() -> None:
    fraction = torch.linspace(0, 0.999, 50)
    assert torch.allclose(rectified(start_at(fraction)), fraction, atol=1e-5)
    assert rectified(torch.tensor(-4.0)) == 0 and rectified(torch.tensor(4.0)) == 1


def test_the_penalty_is_nought_where_the_choice_is_made() -> None:
    ones = torch.ones(3)
    assert roundness(torch.tensor([0.0, 1.0, 1.0]), 3.0, ones) == 0
    assert roundness(torch.tensor([0.5]), 20.0, ones[:1]) == 1
    h = torch.rand(50, dtype=torch.float64, requires_grad=True)
    counts = (torch.rand(50) > 0.3).double()
    for beta in (2.0, 3.7, 20.0):
        expected = (counts * (1 - (2 * h - 1).abs() ** beta)).sum()
        assert torch.allclose(roundness(h, beta, counts), expected)
        assert torch.autograd.gradcheck(lambda x, beta=beta: roundness(x, beta, counts), h)
    assert beta_at(0.1) is None and beta_at(0.2) == 20 and beta_at(1.0) == pytest.approx(2)


def test_soft_rounding_starts_at_the_weight_and_ends_on_its_grid() -> None:
    torch.manual_seed(0)
    plain = WeightQuantizer(integer_format(3, signed=True), "channel", name="w", channels=5)
    weight = torch.randn(5, 40)
    plain.set_range(weight.amin(1), weight.amax(1))
    soft = SoftRounding(plain, weight)
    assert torch.allclose(soft(weight), weight, atol=1e-5)
    nearest = soft.values((rectified(soft.V) >= 0.5).float())
    assert torch.allclose(nearest, plain.fake_quantize(weight))
    flipped = soft.values((rectified(soft.V) < 0.5).float())
    step = plain.scale[:, None].expand_as(weight)
    assert bool(((flipped - weight).abs() <= step + 1e-6).all())
    assert torch.allclose(plain.fake_quantize(flipped), flipped, atol=1e-6)


def test_inputs_are_mixed_entry_by_entry_and_the_rest_is_left_alone() -> None:
    mask, generator = torch.ones(2, 5, dtype=torch.bool), torch.Generator().manual_seed(0)
    a, b = torch.zeros(2, 500, 8), torch.ones(2, 500, 8)
    call = mixed(Call((a,), {"mask": mask, "causal": None}), Call((b,), {"mask": mask, "causal": None}), generator)
    assert call.args[0].mean().item() == pytest.approx(0.5, abs=0.02) and set(call.args[0].unique().tolist()) == {0, 1}
    assert call.kwargs["mask"] is mask and call.kwargs["causal"] is None


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaround.reconstruct, "__defaults__", (60,))


@pytest.fixture
def shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what holds after any number of steps: a few of all three phases."""
    monkeypatch.setattr(adaround.reconstruct, "__defaults__", (12,))


@pytest.mark.parametrize("spec", ["w3a16", "w3a8"])
def test_the_model_comes_closer_than_by_rounding_to_nearest(
    make: Callable[[str], Case], spec: str, short: None
) -> None:
    for name in ("plain-sdpa", "bert-sdpa"):
        case = make(name)
        expected = case.output()
        errors = {}
        for method in ("rtn", "adaround"):
            model = quant.quantize(case.model, spec, calibration=case.batches, method=method, observer="mse")
            errors[method] = (case.output(model) - expected).square().mean().item()
        assert errors["adaround"] < 0.7 * errors["rtn"], (name, errors)


def test_a_block_comes_closer_to_what_it_was(make: Callable[[str], Case], short: None) -> None:
    case = make("plain-sdpa")
    plain, x = case.model.blocks[0], torch.randn(16, 7, 16)
    calibration = [{"x": x}]
    errors = {}
    for method in ("rtn", "adaround"):
        model = quant.quantize(case.model, "w3a16", calibration=calibration, method=method, observer="mse")
        errors[method] = (model.blocks[0](x) - plain(x)).square().mean().item()
    assert errors["adaround"] < 0.6 * errors["rtn"]


def test_weights_lie_on_their_grid_next_to_where_they_were(case: Case, shortest: None) -> None:
    before = copy.deepcopy(case.model)
    model = quant.quantize(case.model, "w4a4", calibration=case.batches, method="adaround")
    for site, weight, quantizer in weights(model):
        assert torch.equal(quantizer.fake_quantize(weight), weight), site.name
        plain = before.get_parameter(weight_name(before, site))
        scale, zero_point = quantizer.parameters_for(weight)
        low, high = ((limit - zero_point) * scale for limit in (quantizer.format.qmin, quantizer.format.qmax))
        moved = (weight - plain.clamp(low, high)).abs()
        assert bool((moved <= scale * 1.001).all()), site.name
    assert math.isfinite(case.output(model).sum().item())
    assert not any(isinstance(module, SoftRounding) for module in model.modules())


def test_the_unified_protocol_keeps_the_ranges_of_the_spec(make: Callable[[str], Case], shortest: None) -> None:
    case = make("bert-sdpa")
    both = [
        quant.quantize(case.model, "w4a4", calibration=case.batches, method=method, protocol="unified")
        for method in ("rtn", "adaround")
    ]
    scales = [{name: value for name, value in model.state_dict().items() if name.endswith("scale")} for model in both]
    assert all(torch.equal(value, scales[1][name]) for name, value in scales[0].items())


def test_the_same_seed_gives_the_same_weights(make: Callable[[str], Case], short: None) -> None:
    case = make("plain-sdpa")
    states = [
        quant.quantize(case.model, "w4a4", calibration=case.batches, method="adaround", seed=seed).state_dict()
        for seed in (0, 0, 1)
    ]
    same = [all(torch.equal(value, other[name]) for name, value in states[0].items()) for other in states[1:]]
    assert same == [True, False]


def test_formats_without_a_choice_are_rounded_to_nearest(make: Callable[[str], Case]) -> None:
    case = make("plain-sdpa")
    outputs = [
        case.output(quant.quantize(case.model, "nvfp4", calibration=case.batches, method=method, protocol="unified"))
        for method in ("rtn", "adaround")
    ]
    assert torch.equal(*outputs)
