"""ERQ: its ridge steps against numpy, its refinement against brute force, and what the whole gains."""

from __future__ import annotations

import itertools
import warnings

import numpy
import pytest
import torch
from tests.quant.ptq.test_repq import held_out_errors, with_random_norms
from tests.quant.tiny_models import bert, torch_encoder, vit
from torch import Tensor, nn

from s2d.quant import quantize
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer, affine_parameters, fake_quantize
from s2d.quant.ptq.erq import (
    Moments,
    refine_rounding,
    ridge_solve,
    round_halves,
    within_range,
)
from s2d.quant.ptq.gptq import Grid

INT4 = FORMATS["int4"]


def layer(tokens: int = 400, inputs: int = 24, outputs: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Correlated inputs, the same rounded to 4 bits, a weight and a bias."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix + 0.5
    uint4 = FORMATS["uint4"]
    rounded = fake_quantize(x, *affine_parameters(x.min(), x.max(), uint4, False), uint4)
    weight = torch.randn(outputs, inputs, generator=generator)
    return x, rounded, weight, torch.randn(outputs, generator=generator)


def moments(rounded: Tensor, x: Tensor, parts: int = 3) -> Moments:
    found = Moments("layer")
    for a, b in zip(rounded.chunk(parts), x.chunk(parts), strict=True):
        found.add(a, b)
    return found


def activation_correction(weight: Tensor, square: Tensor, cross: Tensor, ridge: float = 0.01) -> Tensor:
    """Equation 8: what to add to the weight and, in the last column, to its bias."""
    solution = ridge_solve(square, cross @ weight.double().T, ridge)
    assert solution is not None
    return solution.T


def grid_of(weight: Tensor) -> tuple[WeightQuantizer, Grid]:
    quantizer = WeightQuantizer(INT4, "channel", name="w", channels=len(weight))
    quantizer.set_range(weight.amin(1), weight.amax(1))
    return quantizer, Grid.of(quantizer, weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_ridge_step_is_the_least_squares_solution_of_numpy(bias: bool, ridge: float) -> None:
    x, rounded, weight, _ = layer()
    square, cross = moments(rounded, x).normalised(bias)
    ours = activation_correction(weight, square, cross, ridge)
    design = rounded.double().numpy()
    if bias:
        design = numpy.concatenate([design, numpy.ones((len(design), 1))], axis=1)
    size, count = design.shape[1], len(design)
    strength = ridge * numpy.trace(design.T @ design) / size
    stacked = numpy.concatenate([design, numpy.sqrt(strength) * numpy.eye(size)])
    missing = ((x - rounded).double() @ weight.double().T).numpy()
    target = numpy.concatenate([missing, numpy.zeros((size, len(weight)))])
    wanted = numpy.linalg.lstsq(stacked, target, rcond=None)[0].T
    assert count == 400
    torch.testing.assert_close(ours, torch.from_numpy(wanted), rtol=1e-4, atol=1e-6)


def test_the_strength_does_not_depend_on_how_many_tokens_there_are() -> None:
    """The trap: the release adds a constant to sums over tokens, so that fewer images mean a stronger ridge."""
    x, rounded, weight, _ = layer()
    once, thrice = (
        activation_correction(weight, *moments(rounded.repeat(times, 1), x.repeat(times, 1)).normalised(True))
        for times in (1, 3)
    )
    torch.testing.assert_close(once, thrice, rtol=1e-4, atol=1e-6)
    # Nor on the scale of the inputs.
    scaled = activation_correction(weight, *moments(8 * rounded, 8 * x).normalised(False))
    torch.testing.assert_close(scaled, activation_correction(weight, *moments(rounded, x).normalised(False)))


def test_the_correction_of_activations_lowers_the_error() -> None:
    x, rounded, weight, bias = layer()
    square, cross = moments(rounded, x).normalised(True)
    delta = activation_correction(weight, square, cross)
    assert delta is not None
    wanted = x @ weight.T + bias
    before = (rounded @ weight.T + bias - wanted).norm()
    after = (rounded @ (weight + delta[:, :-1]).float().T + bias + delta[:, -1].float() - wanted).norm()
    assert after < 0.9 * before


def test_a_matrix_without_full_rank_is_damped_and_a_broken_one_is_given_up() -> None:
    flat = torch.ones(6, 6, dtype=torch.float64)
    solution = ridge_solve(flat, torch.ones(6, 2, dtype=torch.float64), 1e-6)
    assert solution is not None and torch.isfinite(solution).all()
    assert ridge_solve(-torch.eye(4, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64), 0.01) is None


def test_what_a_range_cuts_off_is_not_learned() -> None:
    quantizer = Quantizer(FORMATS["uint4"], "tensor", name="x")
    quantizer.set_range(torch.tensor(-2.0), torch.tensor(4.0))
    x = torch.linspace(-2.0, 4.0, 301)
    x[[7, 9]] = torch.tensor([38.0, -20.0])
    rounded = quantizer.fake_quantize(x)
    held = within_range(x, rounded, quantizer)
    assert held[7] == rounded[7] and held[9] == rounded[9]
    inside = (x > -2.0) & (x < 4.0)
    assert torch.equal(held[inside], x[inside])


def loss(error: Tensor, moment: Tensor) -> Tensor:
    return torch.einsum("oi,ij,oj->o", error.double(), moment.double(), error.double())


def test_refinement_finds_the_best_single_flip_and_never_gets_worse() -> None:
    x, rounded, weight, _ = layer(inputs=8, outputs=40)
    _, grid = grid_of(weight)
    moment = rounded.T @ rounded / len(rounded)
    nearest = fake_quantize(weight, grid.scale, grid.zero_point, grid.format)
    ends = -7 * grid.scale, 7 * grid.scale
    start = loss(nearest - weight, moment)
    refined = refine_rounding(weight, nearest, grid.scale, *ends, moment)
    assert (loss(refined - weight, moment) <= start * (1 + 1e-6)).all()
    assert loss(refined - weight, moment).sum() < 0.8 * start.sum()
    # On the codes, and each entry on one of its two neighbours.
    assert torch.allclose(refined, fake_quantize(refined, grid.scale, grid.zero_point, grid.format), atol=1e-5)
    assert ((refined - weight).abs() <= 1.001 * grid.scale).all()
    # No second flip of the entry with the steepest slope would lower the loss any more: brute force over all flips.
    one = refine_rounding(weight, nearest, grid.scale, *ends, moment, flips=1)
    for row in range(len(weight)):
        changed = (one[row] - nearest[row]).abs() > 1e-6
        assert changed.sum() <= 1
        if changed.any():
            assert loss(one - weight, moment)[row] < start[row]
    best = start.clone()
    for signs in itertools.product((0, 1), repeat=8):
        choice = torch.tensor(signs, dtype=torch.bool)
        other = nearest - (nearest - weight).sign() * grid.scale
        tried = torch.where(choice & (other.abs() <= ends[1] * 1.001), other, nearest)
        best = torch.minimum(best, loss(tried - weight, moment))
    # Greedy is not optimal, but most of the way there.
    gained = (start - loss(refined - weight, moment)).sum() / (start - best).sum()
    assert gained > 0.6


def test_codes_outside_the_format_are_not_flipped_to() -> None:
    weight = torch.tensor([[7.4, -7.4, 0.1]])
    scale, moment = torch.ones(1, 3), torch.eye(3) + 0.5
    refined = refine_rounding(weight, torch.tensor([[7.0, -7.0, 0.0]]), scale, -7 * scale, 7 * scale, moment)
    assert refined.abs().max() <= 7


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("inputs", [1, 2, 7, 24])
def test_halves_leave_the_weight_on_its_grid_and_beat_rounding_to_nearest(with_bias: bool, inputs: int) -> None:
    x, rounded, weight, bias = layer(inputs=inputs)
    quantizer, grid = grid_of(weight)
    square, _ = moments(rounded, x).normalised(with_bias)
    found = round_halves(weight, bias if with_bias else None, square, grid)
    assert found is not None
    values, new_bias = found
    assert (new_bias is not None) == with_bias
    assert torch.equal(quantizer.fake_quantize(values), values)
    wanted = rounded @ weight.T
    nearest = (rounded @ quantizer.fake_quantize(weight).T - wanted).norm()
    moved = 0.0 if new_bias is None else new_bias.float() - bias
    ours = (rounded @ values.T + moved - wanted).norm()
    assert ours <= nearest * 1.0001
    if inputs == 24:
        assert ours < 0.85 * nearest


@pytest.mark.parametrize("protocol", ["own", "unified"])
def test_better_than_min_max_and_repq_where_channels_behind_norms_are_spread(protocol: str) -> None:
    error = held_out_errors(("rtn", "repq", "erq"), "w4a4", protocol)
    assert error["erq"] < 0.55 * error["rtn"] and error["erq"] < 0.8 * error["repq"], error


@torch.no_grad()
def test_rounded_weights_are_final_and_the_given_model_stays() -> None:
    torch.manual_seed(0)
    case = with_random_norms(vit())
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    quantized = quantize(case.model, "w4a4", calibration=case.batches, method="erq")
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    found = 0
    for module in quantized.modules():
        if isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer):
            assert torch.equal(module.weight_quantizer.fake_quantize(module.weight), module.weight)
            found += 1
    assert found == 12


@pytest.mark.parametrize("protocol", ["own", "unified"])
@pytest.mark.parametrize("spec", ["w8a8", "fp8", "nvfp4", {"base": "w8a8", "weight": {"granularity": "tensor"}}])
def test_every_format_runs(spec: str, protocol: str) -> None:
    case = torch_encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(case.model, spec, calibration=case.batches, method="erq", protocol=protocol)
    with torch.no_grad():
        assert (case.output(quantized) - case.output()).norm() < 0.4 * case.output().norm()


def test_post_norm_models_get_the_corrections_without_the_norms() -> None:
    torch.manual_seed(0)
    case = bert()
    with pytest.warns(UserWarning, match="erq: embeddings.LayerNorm, .* also feed the residual"):
        quantized = quantize(case.model, "w8a8", calibration=case.batches, method="erq")
    with torch.no_grad():
        assert (case.output(quantized) - case.output()).norm() < 0.05 * case.output().norm()


def test_a_layer_that_cannot_be_solved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2d.quant.ptq.erq.ridge_solve", lambda *_: None)
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6)
    with pytest.warns(UserWarning, match=r"erq: 0.weight \[4x6\] has inputs .* cannot be factored.*rounded to nearest"):
        quantized = quantize(model, "w8a8", calibration=[x], method="erq")
    with torch.no_grad():
        assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()
