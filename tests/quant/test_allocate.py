"""Bit allocation: the knapsack against trying everything, the budget to the bit, and planted sensitive layers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.quant.tiny_models import Case, PlainTransformer
from torch import nn

from s2d import quant
from s2d.errors import InputError
from s2d.quant import QuantSpec
from s2d.quant import allocate as module
from s2d.quant.allocate import allocate, knapsack, parse_budget, sensitivity
from s2d.quant.calibration.observe import Batches

CHOICES = (3, 4, 6, 8)


def planted() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """Two blocks; the first fc1 has rows with an outlier each, so that few bits ruin it, and the output hangs on it."""
    torch.manual_seed(0)
    model = PlainTransformer(dim=32).eval()
    with torch.no_grad():
        model.blocks[0].fc1.weight[:, 5] *= 40.0
        model.blocks[0].norm2.weight[5] *= 0.02
        model.blocks[0].fc2.weight *= 3.0
    return model, [{"x": torch.randn(16, 7, 32)} for _ in range(2)]


def distance(model: nn.Module, spec: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    quantized = quant.quantize(model, spec, calibration=batches)
    with torch.no_grad():
        return float((quantized(**batches[0]) - model(**batches[0])).square().mean())


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_finds_the_best_of_all(seed: int) -> None:
    dice = random.Random(seed)
    layers = 5
    sizes = [dice.choice([4, 6, 8, 24]) for _ in range(layers)]
    errors = [sorted((dice.random() for _ in CHOICES), reverse=True) for _ in range(layers)]
    budget = dice.uniform(3, 8)

    def used(bits: tuple[int, ...] | list[int]) -> int:
        return sum(size * b for size, b in zip(sizes, bits, strict=True))

    def error(bits: tuple[int, ...] | list[int]) -> float:
        return sum(row[CHOICES.index(b)] for row, b in zip(errors, bits, strict=True))

    room = budget * sum(sizes)
    best = min(error(bits) for bits in itertools.product(CHOICES, repeat=layers) if used(bits) <= room)
    found = knapsack(errors, sizes, CHOICES, budget)
    assert used(found) <= room and error(found) == pytest.approx(best)


def test_coarse_units_keep_the_budget_and_come_near(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(1)
    sizes = [dice.randint(1000, 9999) for _ in range(20)]
    errors = [sorted((dice.random() for _ in CHOICES), reverse=True) for _ in sizes]
    totals = []
    for units in (200_000, 300):
        monkeypatch.setattr(module, "_MOST_UNITS", units)
        found = knapsack(errors, sizes, CHOICES, 4.5)
        assert sum(s * b for s, b in zip(sizes, found, strict=True)) <= 4.5 * sum(sizes)
        totals.append(sum(row[CHOICES.index(b)] for row, b in zip(errors, found, strict=True)))
    assert totals[0] <= totals[1] <= 1.05 * totals[0]


def test_equal_errors_take_the_fewer_bits_and_ends_are_reached() -> None:
    assert knapsack([[0.0, 0.0], [1.0, 0.0]], [5, 5], (4, 8), 8.0) == [4, 8]
    assert knapsack([[2.0, 1.0], [1.0, 0.0]], [5, 5], (4, 8), 4.0) == [4, 4]
    assert knapsack([[2.0, 1.0], [1.0, 0.0]], [5, 5], (4, 8), 99.0) == [8, 8]


@pytest.mark.parametrize("budget", [3.0, 3.7, 4.0, 4.5, 6.0, 8.0])
def test_the_budget_holds_to_the_weight(budget: float) -> None:
    model, batches = planted()
    found = sensitivity(model, calibration=batches[:1])
    spec = found.allocate(budget)
    planned = [site for site in quant.plan(model, spec) if site.what == "weight" and site.format]
    bits = [(site.bits, site.shape[0] * site.shape[1]) for site in planned]
    average = sum(b * n for b, n in bits) / sum(n for _, n in bits)
    assert average <= budget and average == pytest.approx(found.average_bits(spec))
    # Nothing that would help is left unspent: no layer could take its next width and stay within.
    total = sum(n for _, n in bits)
    for b, n in bits:
        if b < 8:
            step = next(c for c in CHOICES if c > b) - b
            assert average + step * n / total > budget or budget == 8.0


def test_it_beats_the_same_bits_for_all() -> None:
    model, batches = planted()
    spec = allocate(model, "4 bits", calibration=batches)
    assert distance(model, spec, batches) < 0.5 * distance(model, "w4a4", batches)
    chosen = spec.override_for("blocks.0.fc1", "weight")
    assert chosen is not None and chosen[1].weight is not None and chosen[1].weight.format.bits > 4


def test_what_is_measured_is_the_error_of_that_layer_alone() -> None:
    model, batches = planted()
    found = sensitivity(model, calibration=batches, choices=(4,), activations="base", base="w8a16")
    only = {"base": "w16a16", "overrides": {"blocks.1.fc2": {"weight": {"bits": 4}}}}
    quantized = quant.quantize(model, only, calibration=batches)
    plain = torch.cat([model(**batch) for batch in batches])
    other = torch.cat([quantized(**batch) for batch in batches])
    expected = (other - plain).square().sum() / (plain - plain.mean(0)).square().sum()
    layer = next(layer for layer in found.layers if layer.name == "blocks.1.fc2")
    assert layer.errors[4] == pytest.approx(float(expected.detach()), rel=1e-4) and layer.weights == 64 * 32


def test_a_loss_can_be_what_is_measured() -> None:
    model, batches = planted()

    def loss(trial: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(trial(**batch), model(**batch).argmax(1))

    spec = allocate(model, 5, calibration=batches, loss=loss)
    assert distance(model, spec, batches) < distance(model, "w5a5", batches)


def test_the_skip_list_names_the_culprit_and_why() -> None:
    model, batches = planted()
    first = sensitivity(model, calibration=batches, activations="base", base="w4a8").skip()[0]
    assert first.module == "blocks.0.fc1" and first.share > 0.5 and "from its weight" in first.reason
    wild = PlainTransformer(dim=32).eval()
    with torch.no_grad():
        wild.blocks[1].norm2.weight[3] = 60.0
        wild.blocks[1].fc1.weight[:, 3] *= 1 / 60
    first = sensitivity(wild, calibration=batches).skip()[0]
    assert first.module == "blocks.1.fc1" and "from its input" in first.reason


def test_the_base_keeps_its_say(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    base = {
        "base": "w4a8",
        "weight": {"bits": 4, "observer": "mse"},
        "activation": {"granularity": "token"},
        "overrides": {"*.layer.0.intermediate.dense": "keep"},
    }
    kept = "encoder.layer.0.intermediate.dense"
    found = sensitivity(case.model, calibration=case.batches, base=base, choices=(4, 8), activations="base")
    assert kept not in {layer.name for layer in found.layers}
    spec = found.allocate("6 bits")
    sites = quant.planned(case.model, spec, case.batches)
    weights = [site for site in sites if site.what == "weight" and site.format]
    assert {site.observer for site in weights} == {"mse"} and {site.bits for site in weights} == {4, 8}
    inputs = [site for site in sites if site.what == "input" and site.format]
    assert {(site.bits, site.granularity) for site in inputs} == {(8, "token")}
    assert all(site.format is None for site in sites if site.module == kept)
    assert {site.bits for site in sites if site.what in ("q", "k", "v", "probs")} == {8}
    assert QuantSpec.parse(spec.to_dict()) == spec


def test_a_generator_will_do_and_the_model_is_left_alone() -> None:
    model, batches = planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = allocate(model, 4, calibration=(batch for batch in batches), choices=(4, 8))
    assert spec == allocate(model, 4, calibration=batches, choices=(4, 8))
    assert not quant.is_quantized(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(Batches(batches)) == 2


@pytest.mark.parametrize(
    ("text", "bits"), [("4.5 bits", 4.5), ("4.5", 4.5), (4.5, 4.5), ("3bit", 3.0), (5, 5.0), (" 8 bits ", 8.0)]
)
def test_budgets_are_read(text: str | float, bits: float) -> None:
    assert parse_budget(text) == bits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "little"}, "a budget is a number of bits"),
        ({"budget": -4}, "a budget is a number of bits"),
        ({"budget": 2.5}, "below the smallest choice, 3"),
        ({"choices": (4, 9)}, "there is no 9-bit integer format"),
        ({"choices": ()}, "choices is empty"),
        ({"base": "w16a8"}, "no integer weights"),
        ({"base": "mxfp4"}, "no integer weights"),
        ({"activations": "weights"}, "choose follow or base"),
        ({"calibration": []}, "empty"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    model, batches = planted()
    with pytest.raises(InputError, match=message) as caught:
        allocate(model, **{"calibration": batches, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama-sdpa", "vit-sdpa"])
def test_layers_side_by_side_that_read_one_activation_get_one_width(name: str, make: Callable[[str], Case]) -> None:
    case = make(name)
    found = sensitivity(case.model, calibration=case.batches[:1], choices=(3, 8))
    families = [{part.rpartition(".")[2].split("_")[0] for part in names} for names in found.together]
    one_block = [{"q", "k", "v"}, {"gate", "up"}] if "llama" in name else [{"q", "k", "v"}]
    assert families == one_block * 2
    spec = found.allocate(5.0)
    bits = {layer.name: module._weight_bits(spec, layer.name) for layer in found.layers}
    assert all(len({bits[each] for each in names}) == 1 for names in found.together)
    assert found.average_bits(spec) <= 5.0 and len(set(bits.values())) == 2
