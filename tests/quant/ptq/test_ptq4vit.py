"""PTQ4ViT: a gradient that is not zero, searches against brute force, and twins where they belong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tests.quant.ptq.test_repq import held_out_errors, with_random_norms
from tests.quant.tiny_models import Case, bert, plain, vit
from torch import Tensor, nn

from s2d.quant import load, quantize, save
from s2d.quant.modules.sites import quantizers_of
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.log_and_twin import TwinQuantizer
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer
from s2d.quant.ptq.ptq4vit import MULTIPLES, best_range, probe_loss, search_input, search_weight, weighted_error

UINT4, INT4 = FORMATS["uint4"], FORMATS["int4"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_papers_gradient_is_zero_and_the_probes_is_not() -> None:
    """The trap: KL against the model's own prediction is at its minimum where the gradient is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)).double()
    hidden = model[0](torch.randn(20, 8, dtype=torch.float64)).detach().requires_grad_(True)
    logits = model[2](model[1](hidden))
    kl = F.kl_div(logits.log_softmax(-1), logits.detach().softmax(-1), reduction="sum")
    (zero,) = torch.autograd.grad(kl, hidden, retain_graph=True)
    loss, kind = probe_loss(model, SimpleNamespace(logits=logits), None, generator())
    (ours,) = torch.autograd.grad(loss, hidden)
    assert kind == "categorical"
    assert zero.abs().max() < 1e-12 and ours.abs().mean() > 1e-3


def test_the_probes_squares_are_the_fisher_diagonal() -> None:
    """Averaged over draws, against ``J^T (diag p - p p^T) J`` and, for features, ``J^T J``."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 6), torch.randn(1, 4)
    draw = generator()
    sums = {"categorical": torch.zeros(4), "gaussian": torch.zeros(4)}
    for _ in range(1500):
        for kind in sums:
            point = x.clone().requires_grad_(True)
            logits = model(point)
            loss, found = probe_loss(
                model, SimpleNamespace(logits=logits) if kind == "categorical" else logits, None, draw
            )
            assert found == kind
            sums[kind] += torch.autograd.grad(loss, point)[0][0].square() / 1500
    jacobian, p = model.weight.detach(), model(x).detach().softmax(-1)[0]
    torch.testing.assert_close(
        sums["categorical"], (jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian).diagonal(), rtol=0.15, atol=0.01
    )
    power = model(x).detach().square().mean()
    torch.testing.assert_close(sums["gaussian"], (jacobian.T @ jacobian).diagonal() / power, rtol=0.15, atol=0.01)


def test_plain_tensors_are_logits_only_for_classifiers_and_padding_does_not_count() -> None:
    model = nn.Linear(4, 6)
    output = torch.randn(2, 3, 6, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss, kind = probe_loss(model, output, lambda x: mask, generator())
    (gradient,) = torch.autograd.grad(loss, output)
    assert kind == "gaussian" and not gradient[~mask].any() and gradient[mask].abs().min() > 0
    model.num_classes = 6
    assert probe_loss(model, torch.randn(2, 6, requires_grad=True), None, generator())[1] == "categorical"


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(50, 12, generator=generator()) ** 3
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)) ** 3
    g = torch.randn(50, 5, generator=torch.Generator().manual_seed(2)).exp()
    return x, weight, x @ weight.T, g


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_weight_search_equals_a_loop_over_rows_and_multiples(granularity: str) -> None:
    x, weight, target, g = problem()
    quantizer = WeightQuantizer(INT4, granularity, name="w", channels=5)
    search_weight(quantizer, weight, x, target, g)
    ours = weighted_error(x @ quantizer.fake_quantize(weight).T, target, g)
    largest = weight.abs().amax(1) if granularity == "channel" else weight.abs().max().expand(5)
    table = []
    for multiple in MULTIPLES:
        step = (multiple * largest / 7)[:, None]
        rounded = torch.round(weight / step).clamp(-7, 7) * step
        table.append((g * (x @ rounded.T - target)).square().sum(0))
    table = torch.stack(table)
    if granularity == "channel":
        torch.testing.assert_close(ours, table.amin(0), rtol=1e-3, atol=1e-6)
    else:
        torch.testing.assert_close(ours.sum(), table.sum(1).min(), rtol=1e-3, atol=1e-6)
    assert len(MULTIPLES) == 100 and MULTIPLES[0] == 0.01 and MULTIPLES[-1] == pytest.approx(1.1881)


def test_the_input_search_takes_the_best_multiple_and_leaves_a_twins_negative_side() -> None:
    x, weight, target, g = problem()
    quantizer = Quantizer(UINT4, "tensor", name="x")
    quantizer.set_range(x.min(), x.max())
    scale, zero = quantizer.scale.clone(), quantizer.zero_point.clone()
    search_input(quantizer, x, weight, target, g)
    ours = weighted_error(quantizer.fake_quantize(x) @ weight.T, target, g).sum()
    errors = []
    for multiple in MULTIPLES:
        step = multiple * scale
        rounded = ((torch.round(x / step) + zero).clamp(0, 15) - zero) * step
        errors.append((g * (rounded @ weight.T - target)).square().sum())
    torch.testing.assert_close(ours, torch.stack(errors).min(), rtol=1e-3, atol=1e-6)
    assert ours < errors[83]

    twin = TwinQuantizer(UINT4, name="x", split="sign")
    positive = F.gelu(x)
    twin.set_range(positive.min(), positive.max())
    low = twin.scale[0].item()
    search_input(twin, positive, weight, positive @ weight.T, g)
    assert twin.scale[0] == low and twin.scale[1] < positive.max() / 7


def test_weighted_ranges_equal_a_loop() -> None:
    values, weights = torch.randn(300, generator=generator()), torch.rand(300, generator=generator()).double()
    his = torch.linspace(0.2, 3.0, 20)

    def rounding(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return torch.round(x / hi * 7).clamp(-7, 7) * hi / 7

    _, hi = best_range(values, weights, -his, his, rounding)
    errors = [((rounding(values, -h, h) - values).double().square() * weights).sum() for h in his]
    assert hi == his[int(torch.stack(errors).argmin())]


def biased(case: Case) -> Case:
    """Hidden units that GELU cuts off on one side, as trained models have."""
    case = with_random_norms(case)
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if parameter.ndim == 2 and ("intermediate" in name or "fc1" in name):
                parameter.normal_(std=0.4)
    return case


def test_twins_stand_behind_softmax_and_gelu_and_nowhere_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = biased(vit())
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    quantized = quantize(case.model, "w6a6", calibration=case.batches, method="ptq4vit")
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in case.model.parameters())
    assert all(parameter.requires_grad for parameter in quantized.parameters())
    splits = {q.name: q.split for q in quantizers_of(quantized) if isinstance(q, TwinQuantizer)}
    assert {name.rpartition(".")[2]: split for name, split in splits.items()} == {"probs": "magnitude", "input": "sign"}
    behind_gelu = [name for name, split in splits.items() if split == "sign"]
    assert len(behind_gelu) == 2 and not any("attention" in name for name in behind_gelu)
    assert all(q.form == "piecewise" for q in quantizers_of(quantized) if isinstance(q, TwinQuantizer))
    save(quantized, tmp_path)
    with torch.no_grad():
        assert torch.equal(case.output(load(tmp_path, vit().model)), case.output(quantized))


def test_better_than_min_max_where_channels_behind_norms_are_spread() -> None:
    error = held_out_errors(("rtn", "ptq4vit"), "w4a4")
    assert error["ptq4vit"] < 0.8 * error["rtn"], error


def test_deterministic_under_a_seed_and_for_post_norm_models_too() -> None:
    torch.manual_seed(0)
    case = bert()
    first, second = (quantize(case.model, "w8a8", calibration=case.batches, method="ptq4vit") for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    with torch.no_grad():
        assert (case.output(first) - case.output()).norm() < 0.05 * case.output().norm()


@pytest.mark.parametrize("spec", ["w4a16", "fp8", "mxfp4", {"base": "w8a8", "activation": {"granularity": "token"}}])
def test_other_formats_keep_plain_quantizers(spec: str) -> None:
    case = plain("sdpa")
    quantized = quantize(case.model, spec, calibration=case.batches, method="ptq4vit")
    assert not any(isinstance(q, TwinQuantizer) for q in quantizers_of(quantized))


@pytest.mark.parametrize("shape", [(8, 32), (4, 5, 32)])
def test_a_model_without_blocks_is_searched_with_all_outputs_alike(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        found, wanted = quantize(model, "w8a8", calibration=[x], method="ptq4vit")(x), model(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
