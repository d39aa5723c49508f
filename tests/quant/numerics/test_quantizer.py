"""Fake quantization against torch's own operators, exact rational arithmetic, and its laws."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from s2d.quant.numerics.formats import (
    FORMATS,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    BlockFormat,
    FloatFormat,
    Format,
    IntFormat,
)
from s2d.quant.numerics.quantizer import (
    SMALLEST_SCALE,
    Quantizer,
    WeightQuantizer,
    affine_parameters,
    dequantize,
    fake_quantize,
    quantize_codes,
)

INTEGERS = {name: format for name, format in FORMATS.items() if isinstance(format, IntFormat)}
NARROW = {name: format for name, format in INTEGERS.items() if format.bits <= 8}
BLOCKS = {name: format for name, format in FORMATS.items() if isinstance(format, BlockFormat)}
TORCHAO = "torchao.prototype.mx_formats"

formats = st.sampled_from(list(INTEGERS.values()))
any_format = st.sampled_from(list(FORMATS.values()))
numbers = st.floats(-1e4, 1e4, width=32)
values = st.lists(numbers, min_size=1, max_size=40).map(lambda xs: torch.tensor(xs, dtype=torch.float32))


def fitted(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    return affine_parameters(x.min(), x.max(), format, format.symmetric)


@pytest.mark.parametrize("format", NARROW.values(), ids=NARROW)
def test_per_tensor_equals_torch(format: IntFormat) -> None:
    x = torch.randn(64, 33) * 3 + 0.7
    scale, zero_point = affine_parameters(torch.tensor(-2.3), torch.tensor(4.1), format, format.symmetric)
    ours = fake_quantize(x, scale, zero_point, format)
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, format.qmin, format.qmax))


@pytest.mark.parametrize("name", ["int16", "uint16", "int16-pow2"])
def test_sixteen_bits_are_found_by_dividing_as_runtimes_do(name: str) -> None:
    x, format = torch.randn(300, 100) * 3 + 0.7, INTEGERS[name]
    scale, zero_point = affine_parameters(torch.tensor(-9.1), torch.tensor(11.3), format, format.symmetric)
    codes = np.rint(x.numpy() / scale.numpy()) + zero_point.float().numpy()  # QuantizeLinear of ONNX
    codes = np.clip(codes, format.qmin, format.qmax)
    assert np.array_equal(quantize_codes(x, scale, zero_point, format).numpy(), codes.astype(name.partition("-")[0]))
    found = fake_quantize(x, scale, zero_point, format)
    assert (
        np.array_equal(found.numpy(), (codes - zero_point.float().numpy()) * scale.numpy())
        and found.unique().numel() > 9999
    )


@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from(["int4-pow2", "int8-pow2", "int16-pow2"]))
def test_scales_that_are_powers_of_two_are_the_next_ones(largest: float, name: str) -> None:
    format = INTEGERS[name]
    scale, zero_point = affine_parameters(torch.tensor(-largest), torch.tensor(largest / 3), format, True)
    wanted = max(Fraction(float(torch.tensor(largest) / format.qmax)), Fraction(SMALLEST_SCALE))
    assert math.frexp(scale.item())[0] == 0.5 and zero_point == 0
    assert wanted <= Fraction(scale.item()) < 2 * wanted


@pytest.mark.parametrize("format", NARROW.values(), ids=NARROW)
def test_per_channel_equals_torch(format: IntFormat) -> None:
    x = torch.randn(16, 33) * torch.logspace(-3, 3, 16)[:, None]
    scale, zero_point = affine_parameters(x.amin(1) * 0.7, x.amax(1) * 0.7, format, format.symmetric)
    ours = fake_quantize(x, scale[:, None], zero_point[:, None], format)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, format.qmin, format.qmax)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_equal_torch(dtype: torch.dtype) -> None:
    format = FORMATS["uint4"]
    x = torch.randn(64, 33).to(dtype)
    scale, zero_point = affine_parameters(torch.tensor(-2.0), torch.tensor(3.0), format, False)
    ours = fake_quantize(x, scale, zero_point, format)
    assert ours.dtype == dtype
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 15))


def test_gradient_equals_torch() -> None:
    format = FORMATS["uint4"]
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(1.0), format, False)
    ours, theirs = (torch.linspace(-2, 2, 101, requires_grad=True) for _ in range(2))
    weight = torch.randn(101)
    (fake_quantize(ours, scale, zero_point, format) * weight).sum().backward()
    (torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, 0, 15) * weight).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert (ours.grad == 0).any() and (ours.grad != 0).any()


@given(values, formats)
def test_against_exact_arithmetic(x: Tensor, format: IntFormat) -> None:
    """Codes equal those of rational arithmetic with the same scale, except within float rounding of a tie."""
    scale, zero_point = fitted(x, format)
    codes = quantize_codes(x, scale, zero_point, format)
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        exact = Fraction(value) / Fraction(scale.item())
        wanted = min(max(round(exact) + int(zero_point), format.qmin), format.qmax)
        tie = abs(abs(exact - int(exact)) - Fraction(1, 2)) < Fraction(1, 2**12)
        assert code == wanted or (tie and abs(code - wanted) <= 1)


@given(values, any_format)
def test_idempotent(x: Tensor, format: Format) -> None:
    parameters = fitted(x, format)
    once = fake_quantize(x, *parameters, format)
    assert torch.equal(fake_quantize(once, *parameters, format), once)


@given(values, formats)
def test_monotone(x: Tensor, format: IntFormat) -> None:
    rounded = fake_quantize(x.sort().values, *fitted(x, format), format)
    assert bool((rounded.diff() >= 0).all())


@given(values, any_format)
def test_zero_is_exact_and_the_zero_point_is_a_code(x: Tensor, format: Format) -> None:
    scale, zero_point = fitted(x, format)
    assert fake_quantize(torch.zeros(3), scale, zero_point, format).abs().max() == 0
    assert (format.qmin if isinstance(format, IntFormat) else 0) <= int(zero_point) <= format.qmax
    assert zero_point.dtype == torch.int32 and scale > 0


@given(values, formats)
def test_error_is_at_most_half_a_step_inside_the_range(x: Tensor, format: IntFormat) -> None:
    scale, zero_point = fitted(x, format)
    error = (fake_quantize(x, scale, zero_point, format) - x).abs()
    assert bool((error <= scale * (0.5 + 1e-5 * format.qmax)).all())


@given(values, formats)
def test_codes_and_fake_quantization_agree_to_the_bit(x: Tensor, format: IntFormat) -> None:
    parameters = fitted(x, format)
    codes = quantize_codes(x, *parameters, format)
    assert codes.dtype == format.storage
    assert torch.equal(dequantize(codes, *parameters), fake_quantize(x, *parameters, format))


def test_the_range_is_made_to_contain_zero() -> None:
    format = FORMATS["uint8"]
    scale, zero_point = affine_parameters(torch.tensor([2.0, -5.0]), torch.tensor([4.0, -3.0]), format, False)
    assert torch.allclose(scale, torch.tensor([4.0, 5.0]) / 255)
    assert zero_point.tolist() == [0, 255]


def test_dead_channels_stay_zero() -> None:
    for format in (FORMATS["int4"], FORMATS["uint4"]):
        scale, zero_point = affine_parameters(torch.zeros(2), torch.zeros(2), format, format.symmetric)
        assert scale.tolist() == [SMALLEST_SCALE] * 2
        assert fake_quantize(torch.zeros(5, 2), scale, zero_point, format).abs().sum() == 0


def test_nan_is_not_turned_into_a_code() -> None:
    scale, zero_point = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
    assert fake_quantize(torch.tensor([torch.nan, 1.0]), scale, zero_point, FORMATS["int8"]).isnan().tolist() == [
        True,
        False,
    ]


def test_symmetric_needs_a_signed_format() -> None:
    with pytest.raises(ValueError, match="uint4"):
        affine_parameters(torch.tensor(-1.0), torch.tensor(1.0), FORMATS["uint4"], True)


def test_floats_have_no_zero_point() -> None:
    with pytest.raises(ValueError, match="fp8_e4m3 has no zero point"):
        affine_parameters(torch.tensor(-1.0), torch.tensor(1.0), FP8_E4M3, False)


@pytest.mark.parametrize(("format", "dtype"), [(FP8_E4M3, torch.float8_e4m3fn), (FP8_E5M2, torch.float8_e5m2)])
def test_scaled_fp8_equals_torchs_cast(format: FloatFormat, dtype: torch.dtype) -> None:
    x = torch.randn(16, 64) * torch.logspace(-3, 3, 16)[:, None]
    scale, zero_point = affine_parameters(x.amin(1, True), x.amax(1, True), format, True)
    wanted = (x / scale).clamp(-format.qmax, format.qmax).to(dtype).float() * scale
    assert torch.equal(fake_quantize(x, scale, zero_point, format), wanted)
    assert fake_quantize(x.bfloat16(), scale, zero_point, format).dtype == torch.bfloat16


def spread_blocks() -> Tensor:
    """Rows whose blocks span many magnitudes, with a block of zeros and a row that does not fill its last block."""
    x = torch.randn(6, 80, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-4, 3, 5).repeat_interleave(16)
    x[2, 16:64] = 0.0
    return x


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_a_loop_over_blocks(name: str) -> None:
    format, x = BLOCKS[name], spread_blocks()
    scale, zero_point = fitted(x, format)
    ours = fake_quantize(x, scale, zero_point, format)
    for row, mine in zip(x, ours, strict=True):
        for block, got in zip(row.split(format.block), mine.split(format.block), strict=True):
            top = block.abs().max().item()
            if format.scale is None:
                shared = 2.0 ** (math.floor(math.log2(top)) - format.element.largest_exponent) if top else 1.0
            else:
                wanted = torch.tensor(top / 6 / scale.item()).clamp(2.0**-6, 448.0)
                shared = wanted.to(torch.float8_e4m3fn).item() * scale.item()
            if format.element is FP4_E2M1:
                grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) * shared
                best = (block.abs()[:, None] - grid).abs().min(dim=1).values
                torch.testing.assert_close((got - block).abs(), best, rtol=1e-5, atol=1e-6 * shared)
            else:
                cast = (block / shared).clamp(-448, 448).to(torch.float8_e4m3fn).float() * shared
                torch.testing.assert_close(got, cast, rtol=0, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_torchao(name: str) -> None:
    """Bit-exact against the reference implementation, where it is installed."""
    x = spread_blocks()[:, :64].contiguous()
    format = BLOCKS[name]
    scale, zero_point = fitted(x, format)
    if format.scale is None:
        module = pytest.importorskip(f"{TORCHAO}.mx_tensor", reason="needs torchao")
        element = torch.float4_e2m1fn_x2 if format.element is FP4_E2M1 else torch.float8_e4m3fn
        wanted = module.MXTensor.to_mx(x, element, block_size=32).dequantize(torch.float32)
    else:
        module = pytest.importorskip(f"{TORCHAO}.nvfp4_tensor", reason="needs torchao")
        wanted = module.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(fake_quantize(x, scale, zero_point, format), wanted)


@given(st.sampled_from(list(BLOCKS.values())), st.integers(0, 10_000))
def test_blocks_are_idempotent_at_any_spread(format: BlockFormat, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 48, generator=generator) * 2.0 ** torch.randint(
        -20, 12, (4, 3), generator=generator
    ).repeat_interleave(16, 1)
    parameters = fitted(x, format)
    once = fake_quantize(x, *parameters, format)
    assert torch.equal(fake_quantize(once, *parameters, format), once)


def test_gradient_of_floats_and_blocks_is_straight_through() -> None:
    for format in (FP8_E4M3, *BLOCKS.values()):
        x = spread_blocks().requires_grad_()
        scale = torch.tensor(1.0) if format is FP8_E4M3 else fitted(x.detach(), format)[0]
        fake_quantize(x, scale, torch.tensor(0), format).sum().backward()
        assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 1.0}
        assert x.grad.mean() > 0.5


def test_token_ranges_are_each_tokens_own() -> None:
    quantizer = Quantizer(FORMATS["uint4"], "token", name="x")
    quantizer.enabled = True
    x = torch.randn(3, 5, 8) * torch.logspace(-2, 2, 5)[:, None]
    rows = torch.stack(
        [fake_quantize(row, *fitted(row, FORMATS["uint4"]), FORMATS["uint4"]) for row in x.flatten(0, 1)]
    )
    assert torch.equal(quantizer(x).flatten(0, 1), rows)
    assert not quantizer.state_dict()


def test_a_quantizer_is_off_until_enabled_and_shows_what_passes() -> None:
    quantizer = Quantizer(FORMATS["uint4"], "tensor", name="x")
    x, seen = torch.randn(4, 4), []
    quantizer.watch = seen.append
    assert quantizer(x) is x and seen[0] is x
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    quantizer.enabled, quantizer.watch = True, None
    assert not torch.equal(quantizer(x), x)


def test_scales_keep_their_type_when_the_model_is_cast() -> None:
    quantizer = Quantizer(FORMATS["uint4"], "tensor", name="x")
    quantizer.set_range(torch.tensor(-0.3), torch.tensor(1.7))
    before = quantizer.scale.clone()
    quantizer.to(torch.bfloat16)
    assert quantizer.scale.dtype == torch.float32 and torch.equal(quantizer.scale, before)


class TestWeightQuantizer:
    def make(self, weight: Tensor) -> WeightQuantizer:
        quantizer = WeightQuantizer(FORMATS["int4"], "channel", name="w", channels=len(weight))
        quantizer.set_range(weight.amin(1), weight.amax(1))
        quantizer.enabled = True
        return quantizer.eval()

    def test_rounds_once_in_evaluation_and_notices_changes(self) -> None:
        weight = torch.nn.Parameter(torch.randn(4, 8))
        quantizer = self.make(weight.detach())
        with torch.no_grad():
            first = quantizer(weight)
            assert quantizer(weight) is first
            weight.mul_(0.5)
            second = quantizer(weight)
            assert second is not first and not torch.equal(first, second)
            quantizer.scale.mul_(0.5)
            assert torch.equal(quantizer(weight), first * 0.5)

    def test_a_weight_on_the_grid_is_not_held_twice(self) -> None:
        weight = torch.nn.Parameter(torch.randn(4, 8))
        quantizer = self.make(weight.detach())
        with torch.no_grad():
            assert quantizer(weight).data_ptr() != weight.data_ptr()
            weight.copy_(quantizer(weight))
            assert quantizer(weight).data_ptr() == weight.data_ptr()
            weight.mul_(0.9)
            assert not torch.equal(quantizer(weight), weight), "changes are noticed all the same"

    def test_writes_through_data_are_noticed_at_eval(self) -> None:
        weight = torch.nn.Parameter(torch.randn(4, 8))
        quantizer = self.make(weight.detach())
        with torch.no_grad():
            quantizer(weight)
            weight.data.zero_()
            quantizer.eval()
            assert quantizer(weight).abs().sum() == 0

    def test_gradient_passes_in_training_and_whenever_it_is_wanted(self) -> None:
        weight = torch.nn.Parameter(torch.randn(4, 8))
        quantizer = self.make(weight.detach())
        for mode in (True, False):
            weight.grad = None
            quantizer.train(mode)(weight).sum().backward()
            assert weight.grad is not None and torch.equal(weight.grad, torch.ones(4, 8))

    def test_copies_carry_no_rounded_weight(self) -> None:
        weight = torch.nn.Parameter(torch.randn(4, 8))
        quantizer = self.make(weight.detach())
        with torch.no_grad():
            rounded = quantizer(weight)
            other = copy.deepcopy(quantizer)
            assert other._cache is None
            assert torch.equal(other(weight), rounded)
