"""GPTQ and GPTAQ against direct solutions of what they minimise, and on every kind of attention."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.quant.tiny_models import Case, PlainTransformer
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant import quantize
from s2d.quant.modules.sites import quantizers_of
from s2d.quant.numerics.observers import weight_range
from s2d.quant.numerics.quantizer import WeightQuantizer, fake_quantize
from s2d.quant.ptq.gptq import Compensation, Grid, Moments, compensation, gptq_round, round_columns, upper_factor
from s2d.quant.spec import QuantSpec

Array = NDArray[np.float64]
METHODS = ("gptq", "gptaq")


def quantizer_of(weight: Tensor, spec: str | dict[str, object] = "w4a16") -> WeightQuantizer:
    """A min-max quantizer for a weight ``[o, d]``."""
    tensor = QuantSpec.parse(spec).weight
    assert tensor is not None
    groups = weight.shape[1] // tensor.group if tensor.group else 0
    quantizer = WeightQuantizer(tensor.format, tensor.granularity, name="w", channels=len(weight), groups=groups)
    if not quantizer.dynamic:
        rows = weight.reshape(-1, tensor.group) if tensor.group else weight
        rows = rows if quantizer.scale.ndim else rows.reshape(1, -1)
        lo, hi = weight_range(rows, "minmax", tensor.format, name="w")
        quantizer.set_range(lo.reshape(quantizer.scale.shape), hi.reshape(quantizer.scale.shape))
    return quantizer


def layer(outputs: int = 12, inputs: int = 24, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight ``[o, d]``, and inputs ``[N, d]`` whose features are correlated and of different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mixing * torch.linspace(0.3, 3.0, inputs)
    return torch.randn(outputs, inputs, generator=generator), x


def hessian_of(x: Tensor) -> Tensor:
    return (2.0 / len(x)) * (x.double().t() @ x.double())


def error(x: Tensor, weight: Tensor, rounded: Tensor) -> float:
    return float((x @ (weight - rounded).t()).double().norm())


def rounded_for(weight: Tensor, hessian: Tensor, grid: Grid, **options: Any) -> Tensor:
    inputs = compensation(hessian, **options)
    assert inputs is not None
    return gptq_round(weight, inputs, grid)


def inputs_of(x: Tensor, reference: Tensor | None = None, **options: Any) -> Compensation:
    moments = Moments("w")
    moments.add(x, reference)
    found = moments.compensation(**options)
    assert found is not None
    return found


def by_least_squares(
    weight: Tensor, x: Tensor, scale: Tensor, limit: int, damping: float, reference: Tensor | None = None
) -> Array:
    """What GPTQ and GPTAQ do, without Hessians, factors or updates: numpy's least squares after every column.

    Each rounded column leaves an error in the output; the columns that are left are changed by the solution of
    ``min |error - X_rest change|^2``, damping being rows of their own below X. GPTAQ adds the part of the output that
    the change of the inputs takes from that column.
    """
    w, inputs, s = weight.double().numpy().copy(), x.double().numpy(), scale.double().numpy()
    clean = inputs if reference is None else reference.double().numpy()
    tokens, width = inputs.shape
    mean = 2.0 / tokens * (inputs**2).sum(0).mean()
    below = np.sqrt(damping * mean * tokens / 2.0) * np.eye(width)
    tall = np.concatenate([inputs, below])
    drift = np.concatenate([clean - inputs, np.zeros((width, width))])
    rounded = np.zeros_like(w)
    for i in range(width):
        rounded[:, i] = np.clip(np.round(w[:, i] / s), -limit, limit) * s
        if i + 1 < width:
            wanted = np.outer(tall[:, i], w[:, i] - rounded[:, i]) + np.outer(drift[:, i], w[:, i])
            w[:, i + 1 :] += np.linalg.lstsq(tall[:, i + 1 :], wanted, rcond=None)[0].T
    return rounded


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equal_to_least_squares_after_every_column(bits: int) -> None:
    weight, x = layer()
    quantizer = quantizer_of(weight, f"w{bits}a16")
    rounded = rounded_for(weight, hessian_of(x), Grid.of(quantizer, weight), damping=0.01, act_order=False)
    wanted = by_least_squares(weight, x, quantizer.scale, 2 ** (bits - 1) - 1, 0.01)
    assert np.abs(rounded.numpy() - wanted).max() < 1e-5


def test_gptaq_equal_to_least_squares_after_every_column() -> None:
    weight, clean = layer()
    x = fake_quantize(clean, torch.tensor(1.0), torch.tensor(0), QuantSpec.parse("w4a4").weight.format)  # type: ignore[union-attr]
    quantizer = quantizer_of(weight)
    moments = Moments("w")
    moments.add(x[:90], clean[:90])
    moments.add(x[90:], clean[90:])
    inputs = moments.compensation(damping=0.1, act_order=False, alpha=1.0)
    assert inputs is not None
    rounded = gptq_round(weight, inputs, Grid.of(quantizer, weight))
    wanted = by_least_squares(weight, x, quantizer.scale, 7, 0.1, clean)
    assert np.abs(rounded.numpy() - wanted).max() < 1e-5


def test_near_the_best_of_all_roundings() -> None:
    """Every combination of codes tried: GPTQ is never better than the best, and closer to it than rounding is."""
    ratios = []
    for seed in range(20):
        weight, x = layer(outputs=1, inputs=5, tokens=50, seed=seed)
        quantizer = quantizer_of(weight, "w3a16")
        scale = float(quantizer.scale)
        every = torch.tensor(list(itertools.product(range(-3, 4), repeat=5))) * scale
        best = float(((weight - every) @ x.t()).norm(dim=1).min())
        rounded = rounded_for(weight, hessian_of(x), Grid.of(quantizer, weight), damping=1e-6)
        ours, nearest = error(x, weight, rounded), error(x, weight, quantizer.fake_quantize(weight))
        assert ours >= best * (1 - 1e-5)
        ratios.append((ours / best, nearest / best))
    ours, nearest = np.mean(ratios, axis=0)
    assert ours < 0.9 * nearest, (ours, nearest)


@pytest.mark.parametrize(
    "spec",
    [
        "w4a16",
        "w2a16",
        {"weight": {"bits": 4, "granularity": "tensor"}},
        {"weight": {"bits": 3, "granularity": "group-32"}},
        {"weight": {"format": "fp8_e4m3"}},
        {"weight": {"format": "mxfp4"}},
        {"weight": {"format": "mxfp8"}},
        {"weight": {"format": "nvfp4"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("act_order", [False, True])
def test_on_the_grid_and_better_than_nearest(spec: str | dict[str, object], act_order: bool) -> None:
    weight, x = layer(outputs=16, inputs=320, tokens=900)
    quantizer = quantizer_of(weight, spec)
    rounded = rounded_for(weight, hessian_of(x), Grid.of(quantizer, weight), act_order=act_order)
    assert torch.equal(quantizer.fake_quantize(rounded), rounded)
    assert error(x, weight, rounded) < 0.9 * error(x, weight, quantizer.fake_quantize(weight))


def test_gptaq_is_closer_to_the_full_precision_output() -> None:
    weight, clean = layer(outputs=32, inputs=48, tokens=600)
    x = clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)) * clean.abs()
    quantizer = quantizer_of(weight)
    grid = Grid.of(quantizer, weight)

    def distance(rounded: Tensor) -> float:
        return float((clean @ weight.t() - x @ rounded.t()).norm())

    plain = distance(gptq_round(weight, inputs_of(x), grid))
    whole = distance(gptq_round(weight, inputs_of(x, clean, alpha=1.0), grid))
    quarter = distance(gptq_round(weight, inputs_of(x, clean), grid))
    assert whole < quarter < plain < distance(quantizer.fake_quantize(weight))


def test_lazy_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(inputs=50)
    grid, inputs = Grid.of(quantizer_of(weight), weight), inputs_of(x, x * 1.1)
    whole = gptq_round(weight, inputs, grid)
    for size in (1, 7, 25, 50):
        monkeypatch.setattr("s2d.quant.ptq.gptq.LAZY_BLOCK", size)
        assert torch.allclose(whole, gptq_round(weight, inputs, grid), atol=1e-6)


def test_sums_and_factors_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, x = layer(inputs=50)
    whole = inputs_of(x, x * 1.1)
    for size in (1, 7, 49):
        monkeypatch.setattr("s2d.quant.ptq.gptq.COLUMNS", size)
        monkeypatch.setattr("s2d.quant.calibration.corrections.ROWS", size)
        parts = inputs_of(x, x * 1.1)
        assert torch.equal(parts.order, whole.order) and parts.drift is not None and whole.drift is not None
        assert torch.allclose(parts.factor, whole.factor, rtol=1e-4, atol=1e-6)
        assert torch.allclose(parts.drift, whole.drift, rtol=1e-4, atol=1e-6)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, x = layer()
    hessian = hessian_of(x)
    factor = upper_factor(hessian)
    by_columns = hessian.t().contiguous().t()
    in_place = upper_factor(by_columns)
    assert in_place is by_columns and torch.equal(hessian, hessian_of(x))  # rows are not overwritten
    assert factor is not None and torch.equal(factor, factor.triu()) and torch.equal(factor, in_place)
    assert torch.allclose(factor.t() @ factor, torch.linalg.inv(hessian))
    assert torch.allclose(factor, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True))
    assert upper_factor(-hessian) is None and upper_factor(torch.full_like(hessian, torch.nan)) is None


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight, _ = layer()
    quantizer = quantizer_of(weight)
    factor = upper_factor(torch.diag(torch.linspace(1, 5, 24, dtype=torch.float64)))
    assert factor is not None
    rounded = round_columns(weight, Grid.of(quantizer, weight), factor.float())
    assert torch.equal(rounded, quantizer.fake_quantize(weight))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x = layer()
    x[:, [0, 7, 23]] = 0.0
    quantizer = quantizer_of(weight)
    rounded = rounded_for(weight, hessian_of(x), Grid.of(quantizer, weight))
    nearest = quantizer.fake_quantize(weight)
    assert torch.equal(rounded[:, [0, 7, 23]], nearest[:, [0, 7, 23]])
    assert error(x, weight, rounded) < error(x, weight, nearest)


def test_fewer_tokens_than_inputs() -> None:
    weight, x = layer(tokens=5)
    quantizer = quantizer_of(weight)
    rounded = rounded_for(weight, hessian_of(x), Grid.of(quantizer, weight))
    assert error(x, weight, rounded) < 0.5 * error(x, weight, quantizer.fake_quantize(weight))


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, x = layer()
    grid = Grid.of(quantizer_of(weight), weight)
    first = rounded_for(weight, hessian_of(x), grid)
    for times in (1e-6, 1e6):
        other = rounded_for(weight, hessian_of(x * times), grid)
        assert torch.allclose(first, other)


# In models


def relative(case: Case, spec: object, method: str, **options: object) -> float:
    plain = case.output()
    quantized = quantize(case.model, spec, calibration=case.batches, method=method, **options)  # type: ignore[arg-type]
    return float((case.output(quantized) - plain).norm() / plain.norm())


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("protocol", ["own", "unified"])
def test_better_than_rounding_on_every_attention(case: Case, method: str, protocol: str) -> None:
    assert relative(case, "w4a8", method, protocol=protocol) < 0.9 * relative(case, "w4a8", "rtn")


@torch.no_grad()
@pytest.mark.parametrize("spec", ["w4a4", "w3a4", "w8a8", "w4a16", "w16a4", "fp8", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_short_spec(make: Callable[[str], Case], spec: str, method: str) -> None:
    case = make("plain-sdpa")
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    assert relative(case, spec, method) < 0.7
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_weights_lie_on_their_grid(make: Callable[[str], Case], method: str) -> None:
    for name, spec in (("bert-sdpa", "w4a4"), ("torch-encoder", "w3a8"), ("llama-sdpa", "nvfp4")):
        case = make(name)
        quantized = quantize(case.model, spec, calibration=case.batches, method=method)
        count = 0
        for module in quantized.modules():
            found = getattr(module, "weight_quantizer", None)
            if found is not None:
                assert torch.equal(found.fake_quantize(module.weight), module.weight)
                count += 1
        assert count >= 4


@torch.no_grad()
def test_what_stands_in_padding_changes_nothing(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    real = case.batches[0]["attention_mask"].bool()
    others = [{**batch, "input_ids": torch.where(real, batch["input_ids"], 7)} for batch in case.batches]
    for method in METHODS:
        first, second = (
            quantize(case.model, "w4a4", calibration=b, method=method).state_dict() for b in (case.batches, others)
        )
        for key, value in first.items():
            # Sums over more or fewer rows of zeros may differ in the last bit, codes do not.
            assert torch.allclose(value.float(), second[key].float(), rtol=1e-4, atol=1e-6), key


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_model(make: Callable[[str], Case], method: str) -> None:
    case = make("bert-sdpa")
    first, second = (quantize(case.model, "w4a4", calibration=case.batches, method=method) for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


class Pooled(nn.Module):
    """Two blocks, and a learned query that attends to all tokens, as SigLIP's head."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.encoder = PlainTransformer().blocks
        self.probe = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.encoder:
            x = block(x)
        return self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0]


@torch.no_grad()
def test_query_key_and_value_that_differ() -> None:
    torch.manual_seed(0)
    model, x, errors = Pooled().eval(), torch.randn(16, 7, 16), {}
    plain = model(x)
    for method in ("rtn", *METHODS):
        pool = quantize(model, "w3a16", calibration=[x], method=method, inplace=False).attention
        spec = {"base": "w16a16", "overrides": {"attention": "w3a16"}}
        alone = quantize(model, spec, calibration=[x], method=method)
        errors[method] = float((alone(x) - plain).norm())
        if method != "rtn":
            assert torch.equal(pool.attention_quantizer.weight.fake_quantize(pool.in_proj_weight), pool.in_proj_weight)
    assert errors["gptq"] < errors["rtn"] and errors["gptaq"] < errors["rtn"]


def test_a_shared_weight_is_left_alone_and_said() -> None:
    torch.manual_seed(0)
    model = PlainTransformer().eval()
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    before = model.blocks[0].fc1.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"blocks.0.fc1.weight shares its weight with blocks.1.fc1.weight"):
        quantized = quantize(model, "w4a8", calibration=[torch.randn(3, 7, 16)], method="gptq")
    assert torch.equal(quantized.blocks[0].fc1.weight, before)
    assert quantized.blocks[1].fc1.weight is quantized.blocks[0].fc1.weight


def test_a_hessian_that_cannot_be_factored_falls_back_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = PlainTransformer().eval(), torch.randn(3, 7, 16)
    real = upper_factor

    def broken(hessian: Tensor) -> Tensor | None:
        return None if len(hessian) == 32 else real(hessian)

    monkeypatch.setattr("s2d.quant.ptq.gptq.upper_factor", broken)
    with pytest.warns(UserWarning, match=r"blocks.\d.fc2.weight has inputs whose Hessian cannot be factored") as caught:
        quantized = quantize(model, "w4a8", calibration=[x], method="gptq")
    assert len(caught) == 2
    quantizer = quantized.blocks[0].fc2.weight_quantizer
    assert torch.equal(quantized.blocks[0].fc2.weight, quantizer.fake_quantize(model.blocks[0].fc2.weight))


def test_more_damping_before_falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer()
    real, tried = upper_factor, []

    def third_time(hessian: Tensor) -> Tensor | None:
        tried.append(float(hessian.diagonal().mean()))
        return real(hessian) if len(tried) == 3 else None

    monkeypatch.setattr("s2d.quant.ptq.gptq.upper_factor", third_time)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded_for(weight, hessian_of(x), Grid.of(quantizer_of(weight), weight))
    mean = float(hessian_of(x).diagonal().mean())
    assert tried == pytest.approx([1.01 * mean, 1.1 * mean, 2.0 * mean])


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_numbers(method: str) -> None:
    torch.manual_seed(0)
    model, x = PlainTransformer().eval(), torch.randn(3, 7, 16)
    x[1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="blocks.0 received NaN"):
        quantize(model, "w4a8", calibration=[x], method=method)
    with torch.no_grad():
        model.blocks[0].fc1.bias[0] = torch.inf
    x = torch.randn(3, 7, 16)
    with pytest.raises(InputError, match="blocks.0.fc2.weight received NaN or infinite"):
        quantize(model, "w4a16", calibration=[x], method=method)


@torch.no_grad()
def test_a_convolution_by_override(make: Callable[[str], Case]) -> None:
    case = make("vit-sdpa")
    spec = {"base": "w4a16", "overrides": {"*": "keep", "*.projection": "w3a16"}}
    assert relative(case, spec, "gptq") < relative(case, spec, "rtn")


def test_a_failed_call_in_place_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = PlainTransformer().eval(), torch.randn(3, 7, 16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    original = gptq_round

    def fail_later(weight: Tensor, *args: object, **kwargs: object) -> Tensor | None:
        if weight.shape[1] == 32:
            raise KeyboardInterrupt
        return original(weight, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("s2d.quant.ptq.gptq.gptq_round", fail_later)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "w4a8", calibration=[x], method="gptq", inplace=True)
    assert not list(quantizers_of(model))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
