"""What an audit finds, against closed computations with torch.linalg.svd and torch's own fake quantization."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from s2d.audit import Audit, AuditRow, audit, audit_many
from s2d.audit.accumulators import SAMPLE_ROWS, Survey, binned, sample_positions
from s2d.audit.measure import select
from s2d.errors import InputError
from s2d.quant import QuantSpec, quantize
from s2d.targets.weights import find_targets

SHAPES = [(24, 40), (40, 24)]  # more inputs than outputs, and the other way round


def spiked(outputs: int, inputs: int, *, sigma: float = 12.0, seed: int = 0) -> tuple[nn.Linear, Tensor]:
    """A linear layer with one far-leading component, and its right singular direction."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.zeros(outputs)
    u[3] = 1.0
    v = nn.functional.normalize(torch.randn(inputs, generator=generator), dim=0)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        noise = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        layer.weight.copy_(noise + sigma * torch.outer(u, v))
        layer.bias.copy_(torch.randn(outputs, generator=generator))
    return layer, v


def inputs_along(v: Tensor, rows: int, *, seed: int = 1, size: float = 20.0) -> Tensor:
    """Gaussian rows, a few of which hold much of the direction."""
    x = torch.randn(rows, len(v), generator=torch.Generator().manual_seed(seed))
    x[::10] += size * v
    return x


def outliers(A: Tensor) -> tuple[Tensor, Tensor]:
    count = max(math.ceil(1e-5 * A.numel()), 16)
    flat = A.abs().flatten().topk(count).indices
    return flat // A.shape[1], flat % A.shape[1]


def closed_pcdr(parts: list[Tensor], totals: list[Tensor]) -> list[float]:
    """PCDR_1..k from the parts ``[K, N, O]`` of every batch's activations, by the definition."""
    share, total = torch.zeros(len(parts[0])), 0.0
    for part, A in zip(parts, totals, strict=True):
        row, column = outliers(A)
        share += part.cumsum(0)[:, row, column].abs().sum(1)
        total += A[row, column].abs().sum().item()
    return (share / total).tolist()


def only(found: Audit) -> AuditRow:
    assert len(found.rows) == 1
    return found.rows[0]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_row_is_what_the_definitions_say(outputs: int, inputs: int) -> None:
    layer, v = spiked(outputs, inputs)
    batches = [inputs_along(v, rows, seed=rows) for rows in (60, 90, 33)]
    row = only(audit(layer, batches))

    W, X = layer.weight.detach().double(), torch.cat(batches).double()
    A = X @ W.T
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert row.sigma == pytest.approx(S[:3].tolist(), rel=1e-4)
    assert row.sigma_over_median == pytest.approx((S[0] / S.median()).item(), rel=1e-4)
    assert row.stable_rank == pytest.approx((S.square().sum() / S[0] ** 2).item(), rel=1e-4)
    assert row.output_max == pytest.approx(A.abs().max().item(), rel=1e-5)
    assert row.output_ratio == pytest.approx((A.abs().max() / A.square().mean().sqrt()).item(), rel=1e-5)
    assert row.input_max == pytest.approx(X.abs().max().item(), rel=1e-5)
    assert row.input_ratio == pytest.approx((X.abs().max() / X.square().mean().sqrt()).item(), rel=1e-5)

    each = [x.double() @ W.T for x in batches]
    weight_parts = [torch.stack([S[r] * torch.outer(x.double() @ Vh[r], U[:, r]) for r in range(3)]) for x in batches]
    assert row.pcdr == pytest.approx(closed_pcdr(weight_parts, each), abs=1e-3)

    values, vectors = torch.linalg.eigh(X.T @ X)  # the metric of the data: left singular vectors of W C^(1/2)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    directions = torch.linalg.svd(W @ root, full_matrices=False).U[:, :3]
    data_parts = [torch.stack([torch.outer(a @ u, u) for u in directions.T]) for a in each]
    assert row.pcdr_data == pytest.approx(closed_pcdr(data_parts, each), abs=2e-3)
    assert (row.kind, row.shape) == ("linear", [outputs, inputs])


def reference_error(layer: nn.Linear, X: Tensor, bits: int = 4) -> float:
    """By torch's own operators: weights per row symmetric (-7..7), inputs per tensor asymmetric (0..15).

    Of the channels' own errors the median.
    """
    limit, W = 2 ** (bits - 1) - 1, layer.weight.detach()
    scale = W.abs().amax(1) / limit
    Wq = torch.fake_quantize_per_channel_affine(W, scale, torch.zeros(len(W), dtype=torch.int32), 0, -limit, limit)
    steps = 2**bits - 1
    lo, hi = min(X.min().item(), 0.0), max(X.max().item(), 0.0)
    Xq = torch.fake_quantize_per_tensor_affine(X, (hi - lo) / steps, round(-lo / ((hi - lo) / steps)), 0, steps)
    exact = X @ W.T
    return float(np.median(((Xq @ Wq.T - exact).norm(dim=0) / exact.norm(dim=0)).numpy()))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantization_error_is_that_of_torchs_fake_quantization(bits: int) -> None:
    layer, v = spiked(24, 40)
    batches = [inputs_along(v, 50, seed=seed) for seed in range(4)]
    row = only(audit(layer, batches, spec=f"w{bits}a{bits}"))
    assert row.error == pytest.approx(reference_error(layer, torch.cat(batches), bits), rel=1e-3)


def test_the_error_of_a_sample_is_near_that_of_all_rows() -> None:
    layer, _ = spiked(24, 40)
    batches = [torch.randn(3000, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    row = only(audit(layer, batches))
    assert row.error == pytest.approx(reference_error(layer, torch.cat(batches)), rel=0.03)


def test_the_error_is_not_hidden_by_the_outlier_that_makes_it() -> None:
    """One input of 100 takes the 4-bit grid. Most of its output is one channel, and all others become noise."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    layer.weight.data = torch.randn(32, 64, generator=generator) / 8
    x = torch.randn(4000, 64, generator=generator)
    calm = only(audit(layer, [x])).error
    layer.weight.data[:, 7] = 0.0
    layer.weight.data[3, 7] = 1.0
    x[::50, 7] = 100.0
    row = only(audit(layer, [x]))
    Xq = torch.fake_quantize_per_tensor_affine(x, 105 / 15, 1, 0, 15)
    whole = (Xq - x) @ layer.weight.detach().T
    assert whole.norm() / (x @ layer.weight.detach().T).norm() < 0.5  # over everything at once it looks harmless
    assert calm is not None and calm < 0.4
    assert row.error is not None and row.error > 0.9


def test_channels_that_are_always_zero_have_no_say_in_the_error() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 12, bias=False)
    layer.weight.data = torch.randn(12, 16, generator=generator)
    x = torch.randn(500, 16, generator=generator)
    kept = only(audit(nn_of(layer.weight.data[:5]), [x])).error
    layer.weight.data[5:] = 0.0
    assert only(audit(layer, [x])).error == pytest.approx(kept)
    layer.weight.data[:] = 0.0
    assert only(audit(layer, [x])).error == 0.0


def nn_of(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W.clone()
    return layer


def test_each_side_can_be_quantized_alone_and_in_other_ways() -> None:
    layer, v = spiked(24, 40)
    x = [inputs_along(v, 64)]
    errors = {spec: only(audit(layer, x, spec=spec)).error or 0.0 for spec in ("w4a4", "w4a16", "w16a4", "w8a8")}
    assert min(errors.values()) > 0
    assert errors["w8a8"] < errors["w4a16"] < errors["w4a4"]
    assert errors["w8a8"] < errors["w16a4"] < errors["w4a4"]
    token = {"base": "w4a4", "activation": {"granularity": "token"}}
    per_token = only(audit(layer, x, spec=token))
    assert per_token.error is not None and per_token.error < errors["w4a4"]
    assert per_token.histogram is None  # no grid holds for all tokens
    percentile = only(audit(layer, x, spec=QuantSpec.parse("w4a4").with_observer("percentile:99")))
    assert percentile.error is not None and percentile.error != errors["w4a4"]


def test_sampled_positions_are_sorted_distinct_and_one_of_every_part() -> None:
    assert sample_positions(10, 16).tolist() == list(range(10))
    found = sample_positions(100_003, 512)
    assert torch.equal(found, sample_positions(100_003, 512))
    assert len(found.unique()) == 512 and found.min() >= 0 and found.max() < 100_003
    ends = torch.arange(513) * 100_003 // 512
    assert bool(((found >= ends[:-1]) & (found < ends[1:])).all())
    assert len(sample_positions(513, 512).unique()) == 512
    assert len({position % 64 for position in found.tolist()}) == 64  # not in step with sequences of 64 tokens


# -- selection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pcdr", "data", "ratio", "expected"),
    [
        ([0.96, 0.99, 1.0], [1.0, 1.0, 1.0], 3.0, ("weight", 1)),
        ([0.5, 0.95, 1.0], [1.0, 1.0, 1.0], 300.0, ("weight", 2)),
        ([0.5, 0.9, 0.949], [0.1, 0.97, 1.0], 300.0, ("data", 2)),
        ([0.5, 0.9, 0.949], [0.1, 0.97, 1.0], 13.9, (None, None)),
        ([0.1, 0.1, 0.1, 0.99], [0.2, 0.2, 0.2, 0.99], 300.0, (None, None)),  # not within three components
        ([2.08, 2.1, 2.2], [1.0, 1.0, 1.0], 500.0, ("weight", 1)),
    ],
)
def test_the_rule_of_selection(pcdr: list[float], data: list[float], ratio: float, expected: Any) -> None:
    assert select(pcdr, data, ratio) == expected


def test_a_planted_spike_is_selected_by_the_weight_and_noise_is_not() -> None:
    layer, v = spiked(24, 40)
    row = only(audit(layer, [inputs_along(v, 200)]))
    assert (row.selected, row.selected_by, row.components) == (True, "weight", 1)
    torch.manual_seed(0)
    noise = only(audit(nn.Linear(40, 24), [torch.randn(200, 40)]))
    assert (noise.selected, noise.selected_by, noise.components) == (False, None, None)


def test_what_only_the_inputs_excite_is_selected_by_the_data() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, bias=False)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    x = 0.05 * torch.randn(400, 96)
    x[::100] += 300 * Vh[40]  # a middling component of the weight, which the inputs excite on one token of a hundred
    with torch.no_grad():
        layer.weight.copy_(U @ torch.diag(S) @ Vh)
    row = only(audit(layer, [x]))
    assert row.pcdr is not None and max(row.pcdr) < 0.1
    assert row.output_ratio is not None and row.output_ratio > 14
    assert (row.selected_by, row.components) == ("data", 1)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_generator_gives_what_a_list_gives() -> None:
    layer, v = spiked(24, 40)
    batches = [inputs_along(v, 50, seed=seed) for seed in range(3)]

    def stream() -> Iterator[Tensor]:
        yield from batches

    assert audit(layer, stream()).records() == audit(layer, batches).records()


def test_no_more_batches_are_looked_at_than_asked_for() -> None:
    layer, v = spiked(24, 40)
    batches = [inputs_along(v, 50, seed=seed) for seed in range(3)]

    def endless() -> Iterator[Tensor]:
        while True:
            yield from batches

    expected = audit(layer, batches[:2])
    assert audit(layer, batches, max_batches=2).records() == expected.records()
    assert audit(layer, endless(), max_batches=2).records() == expected.records()
    assert expected.run["batches"] == 2 and expected.run["tokens"] == 100


def test_what_is_kept_does_not_grow_with_the_batches() -> None:
    layer, v = spiked(24, 40)
    (target,) = find_targets(layer)

    def kept(count: int) -> int:
        survey = Survey(target, QuantSpec.parse("w4a4"))
        for seed in range(count):
            x = inputs_along(v, 50, seed=seed)
            survey.add(x, x @ layer.weight.detach().T)
        return sum(value.numel() for value in vars(survey).values() if isinstance(value, Tensor))

    assert kept(1) == kept(20) == 24 * 24
    assert SAMPLE_ROWS < 10_000


def test_the_result_repeats_and_the_global_generator_is_left_alone() -> None:
    layer, v = spiked(24, 40)
    state = torch.get_rng_state()
    first, second = (audit(layer, [inputs_along(v, 5000)]).records() for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    layer, v = spiked(24, 40)
    x = inputs_along(v, 100)
    whole, half = only(audit(layer, [x])), only(audit(layer.to(dtype), [x.to(dtype)]))
    assert half.sigma == pytest.approx(whole.sigma, rel=0.02)
    assert half.pcdr == pytest.approx(whole.pcdr, abs=0.05)
    assert half.error == pytest.approx(whole.error, rel=0.1)


def test_a_zero_weight_and_constant_inputs_are_no_trouble() -> None:
    layer = nn.Linear(8, 6)
    nn.init.zeros_(layer.weight)
    row = only(audit(layer, [torch.ones(20, 8)]))
    assert row.sigma == [0.0, 0.0, 0.0] and row.stable_rank == 0.0 and row.sigma_over_median is None
    assert row.pcdr == [0.0, 0.0, 0.0] and row.error == 0.0 and row.output_ratio == 0.0 and not row.selected
    thin = only(audit(nn.Linear(8, 1), [torch.randn(20, 8)]))
    assert len(thin.sigma) == len(thin.pcdr or []) == 1


def test_k_decides_how_many_components_are_looked_at() -> None:
    layer, v = spiked(24, 40)
    row = only(audit(layer, [inputs_along(v, 100)], k=5))
    assert len(row.sigma) == len(row.pcdr or []) == len(row.pcdr_data or []) == 5


def test_a_histogram_counts_every_input_and_shows_the_quantizers_grid() -> None:
    layer, v = spiked(24, 40)
    batches = [inputs_along(v, 100, seed=seed) for seed in range(3)]
    shape = only(audit(layer, batches)).histogram
    assert shape is not None
    X = torch.cat(batches)
    assert sum(shape["counts"]) == X.numel() and len(shape["edges"]) == len(shape["counts"]) + 1
    assert shape["edges"][0] <= X.min() and X.max() <= shape["edges"][-1]
    assert all(a < b for a, b in zip(shape["edges"], shape["edges"][1:], strict=False))
    assert len(shape["grid"]) == 16 and 0.0 in shape["grid"]
    assert shape["grid"][-1] - shape["grid"][0] == pytest.approx((X.max() - X.min()).item(), rel=1e-5)
    expected = torch.histogram(X.double().flatten(), torch.tensor(shape["edges"], dtype=torch.float64)).hist
    moved = (expected.cumsum(0) - torch.tensor(shape["counts"]).cumsum(0)).abs().max().item()
    assert moved < 0.02 * X.numel()  # the values are counted at a relative precision of 2^-9
    single = binned(torch.tensor([2.0]), torch.tensor([7]), (2.0, 2.0), [0.0, 1.0])
    assert sum(single["counts"]) == 7


# -- several checkpoints -----------------------------------------------------------------------------------------------


def test_several_checkpoints_are_audited_on_the_same_batches() -> None:
    v = spiked(24, 40)[1]
    seen: list[str] = []

    def checkpoints() -> Iterator[tuple[str, nn.Module]]:
        for sigma in (1.0, 4.0, 12.0):
            seen.append(f"{sigma}")
            yield f"step {sigma}", spiked(24, 40, sigma=sigma)[0]

    trend = audit_many(checkpoints(), (inputs_along(v, 100, seed=seed) for seed in range(2)), k=2)
    assert list(trend.audits) == ["step 1.0", "step 4.0", "step 12.0"]
    (record,) = trend.records()
    assert record["sigma_1"] == sorted(record["sigma_1"]) and record["pcdr_1"] == sorted(record["pcdr_1"])
    assert record["selected"] == [False, False, True] or record["selected"][-1]
    assert [item["checkpoint"] for item in trend.summary()] == list(trend.audits)


def test_checkpoints_need_different_labels_and_there_must_be_one() -> None:
    layer, v = spiked(24, 40)
    with pytest.raises(InputError, match="two checkpoints are called 'a'"):
        audit_many([("a", layer), ("a", layer)], [inputs_along(v, 20)])
    with pytest.raises(InputError, match="no checkpoint"):
        audit_many({}, [inputs_along(v, 20)])


# -- bad input ---------------------------------------------------------------------------------------------------------


class Shrinking:
    """Batches of which fewer come the second time."""

    def __init__(self) -> None:
        self.left = 3

    def __iter__(self) -> Iterator[Tensor]:
        self.left -= 1
        return iter([torch.randn(5, 8)] * self.left)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        (iter([]), "no batches"),
        (torch.randn(4, 8), "not one Tensor"),
        ({"x": torch.randn(4, 8)}, "not one dict"),
        ("texts", "not one str"),
        (3, "not one int"),
        ([torch.randn(4, 9)], r"^batch 0 does not fit Linear: .*\d"),
        ([torch.randn(4, 8), {"y": torch.randn(4, 8)}], "^batch 1 does not fit Linear: .*'y'"),
        ([3], "batch 0 is a int"),
        (Shrinking(), "2 and then 1"),
    ],
)
def test_batches_that_cannot_be_used_are_refused_in_one_line(batches: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        audit(nn.Linear(8, 8), batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": True}, "k=True"),
        ({"max_batches": 0}, "max_batches=0"),
        ({"kinds": ("norm",)}, "kinds='norm'"),
        ({"kinds": ("dense",)}, "unknown kind"),
        ({"spec": "w3"}, "unknown quantization spec"),
        ({"spec": "w16a16"}, "full precision"),
        ({"include": "*.fc3"}, "no weight of the model matches"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(nn.Linear(8, 8), [torch.randn(4, 8)], **settings)


def test_what_is_no_model_or_has_no_weights_or_is_quantized_is_refused() -> None:
    with pytest.raises(InputError, match="needs a torch module, not str"):
        audit("bert", [torch.randn(4, 8)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="no linear or conv weights"):
        audit(nn.LayerNorm(8), [torch.randn(4, 8)])
    block = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    quantized = quantize(block, {"base": "w8a8", "attention": False}, calibration=[torch.randn(4, 8)])
    with pytest.raises(InputError, match="quantized already"):
        audit(quantized, [torch.randn(4, 8)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_and_activations_that_are_not_finite_are_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(InputError, match="the input of 0 holds NaN or Inf"):
        audit(model, [torch.randn(4, 8), torch.full((4, 8), value)])
    with torch.no_grad():
        model[1].bias[0] = value  # pyright: ignore[reportIndexIssue]
    with pytest.raises(InputError, match="the input of 2 holds NaN or Inf"):
        audit(model, [torch.randn(4, 8)])
    with torch.no_grad():
        model[2].weight[1, 2] = value  # pyright: ignore[reportIndexIssue]
    with pytest.raises(InputError, match=r"2\.weight holds 1 NaN or Inf .*\[1, 2\]"):
        audit(model, [torch.randn(4, 8)])


def test_nothing_seen_is_an_error_and_says_why() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match="nothing was seen of the 1 weights of Idle; e.g. fc.weight: no batch reached"):
        audit(Idle(), [torch.randn(4, 8)])
