"""Log-sqrt2 and twin quantizers against their definitions, plain Python, and the figures in the documentation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.log_and_twin import (
    LogSqrt2Quantizer,
    TwinQuantizer,
    log_sqrt2,
    log_sqrt2_values,
    twin,
)
from s2d.quant.numerics.observers import make_observer
from s2d.quant.numerics.quantizer import affine_parameters, build_kind, fake_quantize

UINT4 = FORMATS["uint4"]


def attention(sd: float, tokens: int, rows: int = 400) -> Tensor:
    logits = sd * torch.randn(rows, tokens, generator=torch.Generator().manual_seed(0))
    return logits.softmax(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_log_sqrt2_is_a_shift_under_two_scales_for_every_code(bits: int) -> None:
    codes, scale = torch.arange(2**bits + 3).float(), torch.tensor(0.7)
    scales = torch.where(codes % 2 == 1, scale * 2**0.5, scale)
    shifted = torch.where(codes >= 2**bits, torch.zeros_like(codes), torch.ldexp(scales, -torch.ceil(codes / 2.0)))
    torch.testing.assert_close(shifted, log_sqrt2_values(codes, scale, bits), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.0, 1.0, width=32), st.floats(2.0**-10, 1.0, width=32), st.sampled_from([3, 4, 8]))
def test_log_sqrt2_equals_plain_python(x: float, scale: float, bits: int) -> None:
    ours = log_sqrt2(torch.tensor(x), torch.tensor(scale), bits).item()
    exact = -2.0 * math.log2(x / scale) if x > 0 else math.inf
    wanted = {0.0}
    if exact < math.inf:
        # A value on the border between two codes may go to either: float32 does not know where exactly it lies.
        codes = {max(round(exact + nudge), 0) for nudge in (-1e-4, 1e-4)}
        wanted = {0.0 if code >= 2**bits else scale * 2 ** (-code / 2) for code in codes}
    assert any(ours == pytest.approx(value, rel=1e-5) for value in wanted)


def test_log_sqrt2_is_idempotent_keeps_zero_and_monotone() -> None:
    x = torch.linspace(0, 1.2, 5001)
    rounded = log_sqrt2(x, torch.tensor(0.9), 4)
    assert torch.equal(log_sqrt2(rounded, torch.tensor(0.9), 4), rounded)
    assert rounded[0] == 0 and rounded.max() == pytest.approx(0.9) and (rounded.diff() >= 0).all()
    # 2**bits levels, and 0 on top of them: what the header says about kernels.
    assert len(rounded.unique()) == 2**4 + 1
    # From the last level up, the error is at most half a code: a factor of 2**0.25.
    inside = (x >= 0.9 * 2**-7.5) & (x <= 0.9)
    assert (rounded / x)[inside].log2().abs().max() <= 0.25 + 1e-4


def kept_and_error(probs: Tensor, rounded: Tensor) -> tuple[float, float]:
    return rounded.sum(-1).mean().item(), ((rounded - probs).square().sum() / probs.square().sum()).item()


@pytest.mark.parametrize(
    ("sd", "tokens", "log", "uniform", "twins"),
    [
        (1.5, 196, (0.89, 0.014), (0.73, 0.080), (0.71, 0.072)),
        (1.5, 576, (0.84, 0.019), (0.67, 0.111), (0.62, 0.186)),
        (1.5, 1024, (0.81, 0.022), (0.65, 0.123), (0.47, 0.235)),
    ],
)
def test_lost_attention_mass_is_what_the_documentation_says(
    sd: float, tokens: int, log: tuple[float, float], uniform: tuple[float, float], twins: tuple[float, float]
) -> None:
    """The trap: 4 bits with one scale lose a sixth of the attention of 576 tokens and more."""
    probs = attention(sd, tokens)
    scales = probs.max() * torch.logspace(0, -1.5, 60)
    best_log = min((kept_and_error(probs, log_sqrt2(probs, s, 4)) for s in scales), key=lambda found: found[1])
    best_uniform = min(
        (
            kept_and_error(probs, fake_quantize(probs, *affine_parameters(0 * s, s, UINT4, False), UINT4))
            for s in scales
        ),
        key=lambda found: found[1],
    )
    best_twin = min(
        (
            kept_and_error(probs, twin(probs, torch.tensor(2.0**-m / 7), torch.tensor(1 / 7), 4, "magnitude"))
            for m in range(20)
        ),
        key=lambda found: found[1],
    )
    for ours, wanted in ((best_log, log), (best_uniform, uniform), (best_twin, twins)):
        assert ours[0] == pytest.approx(wanted[0], abs=0.03) and ours[1] == pytest.approx(wanted[1], rel=0.1)
    by_error = min((log_sqrt2(probs, s, 4) for s in scales), key=lambda rounded: (rounded - probs).square().sum())
    renormalised = kept_and_error(probs, by_error / by_error.sum(-1, keepdim=True))
    assert renormalised[1] > 2 * best_log[1]
    at_8_bits = kept_and_error(probs, log_sqrt2(probs, probs.max(), 8))
    assert at_8_bits[0] == pytest.approx(1.0, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(st.floats(-0.25, 1.25, width=32), st.integers(0, 8), st.sampled_from([3, 4, 6]))
def test_the_piecewise_twin_equals_plain_python(x: float, m: int, bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    low, high = torch.tensor(2.0**-m / top), torch.tensor(1.0 / top)
    step = low.item() if torch.tensor(x) < low * top else high.item()
    wanted = min(max(round(x / step), 0), top) * step
    # As above, a value between two codes may go to either.
    ours = twin(torch.tensor(x), low, high, bits, "magnitude").item()
    assert ours == pytest.approx(wanted, abs=1e-5) or abs(abs(ours - x) - step / 2) < 1e-5


@pytest.mark.parametrize(("bits", "ratio"), [(4, 2), (6, 10), (8, 30)])
def test_the_released_sum_counts_the_split_twice(bits: int, ratio: float) -> None:
    """The trap: the sum of both parts is off by ``split`` above it and by the high part of ``split`` below it."""
    top = 2 ** (bits - 1) - 1
    split = torch.tensor(2.0**-3)
    low, high = split / top, torch.tensor(1.0 / top)
    x = torch.linspace(0, 1, 1001)
    added, chosen = (twin(x, low, high, bits, "magnitude", form) for form in ("sum", "piecewise"))
    above = x >= split
    torch.testing.assert_close(added[above], chosen[above] + split)
    at_split = torch.round(split / high) * high
    torch.testing.assert_close(added[~above], chosen[~above] + at_split)
    probs = attention(1.5, 197)
    errors = {}
    for form in ("sum", "piecewise"):
        tries = [twin(probs, torch.tensor(2.0**-m / top), high, bits, "magnitude", form) for m in range(20)]
        errors[form] = min((rounded - probs).square().mean().item() for rounded in tries)
    assert errors["sum"] > ratio * errors["piecewise"]


@pytest.mark.parametrize("form", ["piecewise", "sum"])
def test_by_sign_each_side_has_its_own_grid(form: str) -> None:
    x = torch.nn.functional.gelu(3 * torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    low, high = torch.tensor(0.17 / 8), x.max() / 7
    rounded = twin(x, low, high, 4, "sign", form)
    negative = x < 0
    wanted_low = torch.fake_quantize_per_tensor_affine(x[negative], low.item(), 0, -8, 0)
    wanted_high = torch.fake_quantize_per_tensor_affine(x[~negative], high.item(), 0, 0, 7)
    torch.testing.assert_close(rounded[negative], wanted_low)
    torch.testing.assert_close(rounded[~negative], wanted_high)
    assert torch.equal(twin(rounded, low, high, 4, "sign", form), rounded)


@pytest.mark.parametrize("kind", ["log_sqrt2", "magnitude", "sign"])
def test_gradients_pass_inside_and_stop_where_values_are_clipped(kind: str) -> None:
    x = torch.tensor([-5.0, 0.3, 0.5, 5.0], requires_grad=True)
    if kind == "log_sqrt2":
        rounded = log_sqrt2(x, torch.tensor(1.0), 4)
    else:
        rounded = twin(x, torch.tensor(0.25 / 7), torch.tensor(1.0 / 7), 4, kind)
    rounded.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    with torch.no_grad():
        again = log_sqrt2(x, torch.tensor(1.0), 4) if kind == "log_sqrt2" else None
        assert again is None or torch.equal(again, rounded)


def test_nan_stays_nan_and_half_types_stay_half() -> None:
    x = torch.tensor([0.1, torch.nan, 0.5])
    for rounded in (log_sqrt2(x, torch.tensor(1.0), 4), twin(x, torch.tensor(0.01), torch.tensor(0.1), 4, "magnitude")):
        assert rounded.isnan().tolist() == [False, True, False]
    assert log_sqrt2(x.bfloat16(), torch.tensor(1.0), 4).dtype == torch.bfloat16


def test_modules_take_their_range_from_observers_and_are_off_until_switched_on() -> None:
    probs = attention(3.0, 64)
    observer = make_observer("percentiles:99,99.9,100", "probs")
    observer.update(probs)
    quantizer = LogSqrt2Quantizer(UINT4, name="attn.probs")
    assert torch.equal(quantizer(probs), probs)
    quantizer.fit(observer)
    quantizer.enabled = True
    errors = [
        (log_sqrt2(probs, torch.quantile(probs.flatten(), p), 4) - probs).square().sum() for p in (0.99, 0.999, 1.0)
    ]
    assert (quantizer(probs) - probs).square().sum() <= 1.01 * min(errors)

    twins = TwinQuantizer(UINT4, name="attn.probs", split="magnitude")
    twins.fit(observer)
    assert twins.scale[1] == pytest.approx(7 * twins.scale[0].item())
    by_sign = TwinQuantizer(UINT4, name="fc2.input", split="sign")
    by_sign.set_range(torch.tensor(-0.17), torch.tensor(7.0))
    assert by_sign.scale.tolist() == pytest.approx([0.17 / 8, 1.0])
    assert by_sign.half().scale.dtype == torch.float32


def test_kinds_are_built_by_name() -> None:
    quantizer = TwinQuantizer(UINT4, name="a", split="sign", form="sum")
    again = build_kind("twin", UINT4, "a", quantizer.options())
    assert isinstance(again, TwinQuantizer) and (again.split, again.form) == ("sign", "sum")
    assert isinstance(build_kind("log_sqrt2", UINT4, "a", {}), LogSqrt2Quantizer)
    with pytest.raises(KeyError):
        build_kind("magic", UINT4, "a", {})
