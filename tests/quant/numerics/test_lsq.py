"""Learned ranges: the gradients of LSQ and LSQ+ in closed form, and the way back to an ordinary quantizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from s2d.quant.numerics.formats import IntFormat, integer_format
from s2d.quant.numerics.lsq import LearnedQuantizer, gradient_factor, learned_quantize, lsq_step, zero_point_of
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer, fake_quantize

SIGNED, UNSIGNED = integer_format(3, signed=True), integer_format(3, signed=False)


def lsq_by_hand(x: float, s: float, offset: float | None, format: IntFormat) -> tuple[float, float, float, float]:
    """Value and the three slopes, straight from the papers, one number at a time; ``offset`` on the grid."""
    v = (x - (offset or 0.0)) / s
    low, high = (format.qmin, format.qmax) if format.signed else (0, format.qmax)
    value = s * min(max(round(v), low), high) + (offset or 0.0)
    if v < low:
        return value, 0.0, low, 1.0
    if v > high:
        return value, 0.0, high, 1.0
    return value, 1.0, round(v) - v, 0.0


@pytest.mark.parametrize(("format", "offset"), [(SIGNED, None), (UNSIGNED, None), (UNSIGNED, -0.75), (UNSIGNED, -1.75)])
def test_the_gradients_are_those_of_the_papers(format: IntFormat, offset: float | None) -> None:
    values = torch.tensor([-9.0, -1.6, -1.3, -0.9, -0.4, -0.1, 0.0, 0.07, 0.3, 0.6, 0.99, 1.3, 1.62, 9.0])
    s = 0.25
    for x in values.tolist():
        tensor = torch.tensor([x], requires_grad=True)
        scale = torch.tensor(s, requires_grad=True)
        lowest = None if offset is None else torch.tensor(offset, requires_grad=True)
        out = learned_quantize(tensor, scale, lowest, format)
        out.backward()
        value, dx, ds, doffset = lsq_by_hand(x, s, offset, format)
        g = 1 / math.sqrt(format.qmax)
        assert out.item() == pytest.approx(value, abs=1e-6)
        assert tensor.grad is not None and scale.grad is not None
        assert tensor.grad.item() == dx
        assert scale.grad.item() == pytest.approx(g * ds, abs=1e-5)
        if lowest is not None:
            assert lowest.grad is not None and lowest.grad.item() == pytest.approx(g * doffset)


def test_the_slope_of_the_step_is_that_of_the_loss_with_rounding_held() -> None:
    """With rounding replaced by adding a constant, the gradient is the ordinary one: finite differences in float64."""
    torch.manual_seed(0)
    x, s, eps = torch.randn(200, dtype=torch.float64), 0.3, 1e-6
    # Values less than half a step beyond the last code round onto it but count as clipped, in both papers.
    x = x[((x / s).abs() - SIGNED.qmax).abs() > 0.5]
    shift = torch.round(x / s) - x / s

    def held(step: float) -> Tensor:
        return ((step * (x / step + shift).clamp(SIGNED.qmin, SIGNED.qmax)) ** 2).sum()

    scale, single = torch.tensor(s, requires_grad=True), x.float()
    (learned_quantize(single, scale, None, SIGNED) ** 2).sum().backward()
    slope = (held(s + eps) - held(s - eps)).item() / (2 * eps)
    assert scale.grad is not None
    assert scale.grad.item() / gradient_factor(single, scale, SIGNED) == pytest.approx(slope, rel=1e-4)


def test_rows_have_their_own_gradient_and_factor() -> None:
    torch.manual_seed(1)
    x, scale = torch.randn(5, 40), torch.rand(5, 1) * 0.2 + 0.1
    together = scale.clone().requires_grad_()
    (learned_quantize(x, together, None, SIGNED) * torch.arange(40.0)).sum().backward()
    for row in range(5):
        alone = scale[row].clone().requires_grad_()
        (learned_quantize(x[row], alone, None, SIGNED) * torch.arange(40.0)).sum().backward()
        assert together.grad is not None and alone.grad is not None
        assert together.grad[row].item() == pytest.approx(alone.grad.item(), rel=1e-4)
    assert gradient_factor(x, scale, SIGNED) == pytest.approx(1 / math.sqrt(40 * 3))


def test_the_forward_is_that_of_the_plain_quantizer_bit_for_bit() -> None:
    torch.manual_seed(2)
    for plain, x in (
        (Quantizer(UNSIGNED, "tensor", name="a"), torch.randn(4, 9, 16)),
        (WeightQuantizer(SIGNED, "channel", name="w", channels=4), torch.randn(4, 9)),
    ):
        plain.set_range(-torch.rand(plain.scale.shape), 1 + torch.rand(plain.scale.shape))
        plain.enabled = True
        learned = LearnedQuantizer(plain)
        assert torch.equal(learned(x), plain(x))
        assert torch.equal(learned.plain()(x), plain(x)) and type(learned.plain()) is type(plain)


def test_what_was_learned_survives_the_way_back() -> None:
    torch.manual_seed(3)
    plain = Quantizer(UNSIGNED, "tensor", name="a")
    plain.set_range(torch.tensor(-0.8), torch.tensor(1.9))
    plain.enabled = True
    learned = LearnedQuantizer(plain)
    assert learned.offset is not None
    with torch.no_grad():
        learned.log_step += 0.3
        learned.offset -= 0.2
    x = torch.randn(1000) * 2
    back = learned.plain()
    assert back.scale.item() == pytest.approx(plain.scale.item() * math.exp(0.3))
    assert torch.equal(back(x), learned(x))
    assert torch.equal(fake_quantize(x, *learned.parameters_for(x), UNSIGNED), learned(x))
    assert learned(torch.zeros(3)).abs().max() == 0


def test_ranges_that_start_at_zero_learn_no_offset_and_steps_stay_positive() -> None:
    plain = Quantizer(UNSIGNED, "tensor", name="probs")
    plain.set_range(torch.tensor(0.0), torch.tensor(1.0))
    plain.enabled = True
    learned = LearnedQuantizer(plain)
    assert learned.offset is None
    with torch.no_grad():
        learned.log_step.fill_(-50.0)
    assert learned.step > 0
    assert learned.half().step.dtype == torch.float32


def test_zero_stays_a_value_however_far_the_offset_goes() -> None:
    scale = torch.tensor(0.1)
    for offset in (-5.0, -0.31, 0.0, 0.4):
        zero_point = zero_point_of(scale, torch.tensor(offset), UNSIGNED)
        assert UNSIGNED.qmin <= int(zero_point) <= UNSIGNED.qmax


def test_the_start_of_lsq() -> None:
    x = torch.randn(3, 50)
    expected = 2 * x.abs().mean(1) / math.sqrt(3)
    assert torch.allclose(lsq_step(x, SIGNED), expected)
    assert bool((lsq_step(torch.zeros(2, 5), SIGNED) > 0).all())


def test_descending_the_gradient_of_the_step_lowers_the_error() -> None:
    torch.manual_seed(4)
    plain = WeightQuantizer(SIGNED, "channel", name="w", channels=8)
    x = torch.randn(8, 400)
    plain.set_range(x.amin(1), x.amax(1))
    plain.enabled = True
    learned = LearnedQuantizer(plain)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (learned(x) - x).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]
