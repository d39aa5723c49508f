"""RepQ-ViT: the equivalence that it rests on, in numbers and in models, and what it gains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quant.tiny_models import Case, bert, llama, torch_encoder, vit
from torch import Tensor, nn

from s2d.models.tracing import trace
from s2d.quant import quantize
from s2d.quant.modules.folding import norm_folds
from s2d.quant.modules.sites import quantizers_of
from s2d.quant.numerics.formats import FORMATS, IntFormat
from s2d.quant.numerics.log_and_twin import LogSqrt2Quantizer
from s2d.quant.numerics.quantizer import Quantizer, quantize_codes
from s2d.quant.ptq.repq import apply_reparametrisation, channel_rounding, reparametrise

UINT4, INT4 = FORMATS["uint4"], FORMATS["int4"]
assert isinstance(UINT4, IntFormat) and isinstance(INT4, IntFormat)


def spread_channels(tokens: int = 200, width: int = 24) -> Tensor:
    """Channels of scales over two orders of magnitude, with offsets; one of them far above all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator) * torch.logspace(-1, 0.7, width)
    x[:, 5] *= 30.0
    return x + 0.3 * torch.randn(width, generator=generator)


def channel_codes(x: Tensor, scale: Tensor, zero: Tensor, format: IntFormat) -> Tensor:
    return (torch.round(x / scale) + zero).clamp(format.qmin, format.qmax)


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Where rounding does not hang on the last bit."""
    return ((x / scale - torch.floor(x / scale)) - 0.5).abs() > 1e-3


@pytest.mark.parametrize(("format", "shift"), [(UINT4, True), (UINT4, False), (INT4, False)])
def test_layer_wise_codes_are_the_channel_wise_ones(format: IntFormat, shift: bool) -> None:
    x = spread_channels().double()
    found = reparametrise(x.amin(0), x.amax(0), format, shift=shift)
    moved = x / found.ratio - found.shift
    layer_wise = quantize_codes(moved, found.scale.double(), found.zero_point, format)
    channel_wise = channel_codes(x, found.channel_scale.double(), found.channel_zero.double(), format)
    sure = away_from_ties(x, found.channel_scale)
    assert sure.float().mean() > 0.95
    assert torch.equal(layer_wise[sure].double(), channel_wise[sure])
    assert format.qmin <= found.zero_point <= format.qmax
    if not shift:
        assert not found.shift.any()


def test_only_an_integer_zero_point_makes_the_codes_equal() -> None:
    """The trap: the release keeps the mean of the zero points as it is."""
    x = spread_channels().double()
    found = reparametrise(x.amin(0), x.amax(0), UINT4, shift=True)
    mean = found.channel_zero.double().mean()
    assert abs(mean - mean.round()) > 0.05
    channel_wise = channel_codes(x, found.channel_scale.double(), found.channel_zero.double(), UINT4)
    scale = found.scale.double()
    unrounded = (torch.round((x / found.ratio - scale * (mean - found.channel_zero)) / scale) + mean).clamp(0, 15)
    assert (unrounded != channel_wise).double().mean() > 0.9


def test_a_constant_channel_does_not_blow_up() -> None:
    x = spread_channels()
    x[:, 3] = 0.7
    found = reparametrise(x.amin(0), x.amax(0), UINT4, shift=True)
    assert torch.isfinite(found.shift).all() and found.ratio.min() >= 0.0099
    rounded = channel_codes(x, found.channel_scale, found.channel_zero, UINT4) - found.channel_zero
    assert ((rounded * found.channel_scale - x)[:, 3].abs() <= found.channel_scale[3]).all()


def test_the_mean_does_not_matter() -> None:
    """Another average of the scales multiplies x' and divides W', which their own scales take up: same layer output."""
    torch.manual_seed(0)
    x, weight = spread_channels(), torch.randn(8, 24)
    found = reparametrise(x.amin(0), x.amax(0), UINT4, shift=True)
    outputs = []
    for factor in (1.0, 0.125):
        scale = found.scale * factor
        ratio, shift = found.channel_scale / scale, scale * (found.zero_point - found.channel_zero)
        codes = quantize_codes(x / ratio - shift, scale, found.zero_point, UINT4)
        moved = weight * ratio
        step = moved.abs().amax(1, keepdim=True) / 7
        rounded = torch.round(moved / step) * step
        outputs.append(((codes.float() - found.zero_point) * scale + shift) @ rounded.T)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_channel_ranges_need_not_contain_zero() -> None:
    x = torch.linspace(5.0, 6.0, 33)[None]
    rounded = channel_rounding(UINT4)(x, torch.tensor([[5.0]]), torch.tensor([[6.0]]))
    assert (rounded - x).abs().max() <= 0.5 / 15 + 1e-5


def with_random_norms(case: Case) -> Case:
    """Norms with spread gains and biases, as trained models have."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if "norm" in name.lower():
                new = torch.randn_like(parameter)
                parameter.copy_(new.exp() if name.endswith("weight") else new)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.1)
    return case


def pre_norm_encoder() -> Case:
    case = torch_encoder()
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=24, batch_first=True, norm_first=True)
    return replace(case, model=nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval())


@torch.no_grad()
@pytest.mark.parametrize("build", [vit, llama, pre_norm_encoder])
def test_the_full_precision_function_stays_what_it_was(build: Callable[[], Case]) -> None:
    """LayerNorm with shifts, RMSNorm without, and the fused projection of torch's own attention."""
    torch.manual_seed(0)
    case = with_random_norms(build())
    model = copy.deepcopy(case.model)
    folds = [fold for fold in norm_folds(model, trace(model, case.batches[0])) if not fold.residual]
    if build is pre_norm_encoder and not folds:
        pytest.skip("no family gives roles to torch's own encoder")
    assert folds
    for fold in folds:
        norm = model.get_submodule(fold.norm)
        x = spread_channels(width=len(norm.weight))
        found = reparametrise(x.amin(0), x.amax(0), UINT4, shift=getattr(norm, "bias", None) is not None)
        before = norm.weight.clone()
        apply_reparametrisation(model, fold, found)
        assert not torch.allclose(before, norm.weight)
    plain = case.output()
    assert (case.output(model) - plain).norm() < 1e-4 * plain.norm()


def held_out_errors(methods: tuple[str, ...], spec: str, protocol: Any = "own") -> dict[str, float]:
    """Relative output errors on unseen images of a ViT whose channels behind the norms are spread."""
    torch.manual_seed(0)
    case = with_random_norms(vit())
    batches = [{"pixel_values": torch.randn(16, 3, 16, 16)} for _ in range(5)]
    unseen = batches.pop()
    with torch.no_grad():
        plain = case.output(batch=unseen)
        outputs = {
            method: case.output(
                quantize(case.model, spec, calibration=batches, method=method, protocol=protocol), unseen
            )
            for method in methods
        }
        return {method: ((output - plain).norm() / plain.norm()).item() for method, output in outputs.items()}


@pytest.mark.parametrize("protocol", ["own", "unified"])
def test_better_than_min_max_where_channels_behind_norms_are_spread(protocol: str) -> None:
    error = held_out_errors(("rtn", "repq"), "w4a4", protocol)
    assert error["repq"] < 0.85 * error["rtn"], error


def test_above_six_bits_the_probabilities_keep_uniform_steps() -> None:
    case = vit()
    quantized = quantize(case.model, "w8a8", calibration=case.batches, method="repq")
    assert not any(isinstance(q, LogSqrt2Quantizer) for q in quantizers_of(quantized))


def test_weights_and_norms_of_the_given_model_stay_and_the_probabilities_get_log_sqrt2() -> None:
    torch.manual_seed(0)
    case = with_random_norms(vit())
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    quantized = quantize(case.model, "w4a4", calibration=case.batches, method="repq")
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    kinds = {q.name.rpartition(".")[2]: type(q) for q in quantizers_of(quantized)}
    assert kinds["probs"] is LogSqrt2Quantizer and kinds["q"] is Quantizer
    assert all(0 < q.scale <= 1 for q in quantizers_of(quantized) if isinstance(q, LogSqrt2Quantizer))


def test_post_norm_models_keep_their_norms_by_name_and_the_rest_runs() -> None:
    torch.manual_seed(0)
    case = bert()
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    with pytest.warns(
        UserWarning, match=r"repq: embeddings.LayerNorm, .*LayerNorm and \d+ more also feed the residual"
    ):
        quantized = quantize(case.model, "w4a4", calibration=case.batches, method="repq")
    assert all(torch.equal(value, quantized.state_dict()[key]) for key, value in before.items())
    assert any(isinstance(q, LogSqrt2Quantizer) for q in quantizers_of(quantized))


def test_other_granularities_and_formats_are_left_alone() -> None:
    case = vit()
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in ({"base": "w8a8", "activation": {"granularity": "token"}}, "fp8", "mxfp8", "w4a16"):
            quantized = quantize(case.model, spec, calibration=case.batches, method="repq")
            assert not any(isinstance(q, LogSqrt2Quantizer) for q in quantizers_of(quantized))
            assert all(torch.equal(value, quantized.state_dict()[key]) for key, value in before.items())


@torch.no_grad()
def test_it_is_deterministic_and_storable(tmp_path: Path) -> None:
    from s2d.quant import load, save

    torch.manual_seed(0)
    case = with_random_norms(vit())
    first, second = (quantize(case.model, "w4a4", calibration=case.batches, method="repq") for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    save(first, tmp_path)
    assert torch.equal(case.output(load(tmp_path, vit().model)), case.output(first))
