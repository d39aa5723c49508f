"""LoRA: its factors are left alone; the merged weight is conditioned, after the training or (frozen=True) during it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

from s2d.decay.spectral_decay import SelectiveSpectralDecay  # noqa: E402
from s2d.errors import InputError  # noqa: E402
from s2d.targets.lora import AdaptedTarget, with_adapters  # noqa: E402
from s2d.targets.weights import find_targets  # noqa: E402


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    model[0].weight.data[3] = 40.0
    return model


def adapted(**options: Any) -> nn.Module:
    config = {"r": 4, "target_modules": ["1", "3"], "init_lora_weights": False, **options}
    return peft.get_peft_model(plain(), peft.LoraConfig(**config))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for step in range(number):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()


def test_adapters_alone_are_refused_with_the_way_out() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(InputError, match="frozen=True .* LoRA"):
        SelectiveSpectralDecay(model, optimizer)


def test_a_merged_adapter_is_conditioned() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps(model, optimizer, 4)
    x = torch.randn(8, 64)
    before = model(x).detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-4)
    merged.requires_grad_(True)
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    decay = SelectiveSpectralDecay(merged, optimizer, strength=0.2, refresh_every=1)
    steps(merged, optimizer, 12)
    decay.remove()
    assert merged[0].weight.abs().max() < 20


@pytest.mark.parametrize("transposed", [False, True])
def test_the_merged_weight_is_pefts_own(transposed: bool) -> None:
    model = adapted()
    if transposed:
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        layer = nn.Sequential(pytorch_utils.Conv1D(8, 64))
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, fan_in_fan_out=True)
        model = peft.get_peft_model(layer, config)
    found = [t for t in with_adapters(model, find_targets(model, exclude="*lora_*")) if isinstance(t, AdaptedTarget)]
    merged = {t.name.replace("base_model.model.", "").replace(".base_layer", ""): t.matrix() for t in found}
    truth = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert found and all(
        torch.allclose(W, truth[name].T if transposed else truth[name], atol=1e-5) for name, W in merged.items()
    )


def test_adapters_that_are_merged_or_switched_off_are_not_added_twice() -> None:
    model = adapted()
    target = next(t for t in with_adapters(model, find_targets(model)) if isinstance(t, AdaptedTarget))
    merged = target.matrix()
    model.merge_adapter()
    assert torch.allclose(target.matrix(), merged, atol=1e-6)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(target.matrix(), target.parameter)


@pytest.mark.parametrize("metric", ["site", "data", "weight"])
def test_conditioning_while_adapting_is_conditioning_the_merged_model(metric: Any) -> None:
    """Without gradients only the decay acts: on the merged view, and on a model that was merged before."""
    model = adapted(lora_dropout=0.0)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    before = factors(model)
    settings: dict[str, Any] = {
        "metric": metric, "strength": 0.3, "refresh_every": 1, "threshold": 0.1, "outlier_ratio": 1.5
    }  # fmt: skip
    for each, parameters, more in ((merged, merged.parameters(), {}), (model, trained(model), {"frozen": True})):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        decay = SelectiveSpectralDecay(each, optimizer, **settings, **more)
        for step in range(6):
            each.train()(torch.randn(32, 64, generator=torch.Generator().manual_seed(step)))
            optimizer.step()
        assert any(record["selected"] for record in decay.history)
        decay.remove()
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())
    start = plain().state_dict()
    for name, value in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[name], rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(value, start[name]) for name, value in merged.state_dict().items())


def test_adapters_learn_while_the_outlier_shrinks() -> None:
    model = adapted(init_lora_weights=True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    decay = SelectiveSpectralDecay(model, optimizer, frozen=True, strength=0.2, refresh_every=1)
    before = factors(model)
    steps(model, optimizer, 12)
    assert any(not torch.equal(value, before[name]) for name, value in factors(model).items())
    assert decay.selected or decay.history
    decay.remove()
    assert model.merge_and_unload()[0].weight.abs().max() < 20


def test_the_state_carries_what_checkpoints_of_adapters_do_not() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, SelectiveSpectralDecay]:
        model = adapted()
        optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
        return model, optimizer, SelectiveSpectralDecay(model, optimizer, frozen=True, strength=0.2, refresh_every=2)

    whole, optimizer, _ = start()
    steps(whole, optimizer, 5)
    expected = {name: value.clone() for name, value in whole.state_dict().items()}
    model, optimizer, decay = start()
    steps(model, optimizer, 3)
    adapters, state = factors(model), copy.deepcopy((optimizer.state_dict(), decay.state_dict()))
    assert state[1]["frozen"].keys() == {"base_model.model.0.weight"}  # what was shrunk, not the whole base
    model, optimizer, decay = start()  # the published base again, as PEFT loads it
    for name, parameter in model.named_parameters():
        if name in adapters:
            parameter.data.copy_(adapters[name])
    optimizer.load_state_dict(state[0])
    decay.load_state_dict(state[1])
    for step in (3, 4):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_what_is_no_plain_sum_is_left_out_by_name() -> None:
    model = adapted(use_dora=True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    decay = SelectiveSpectralDecay(model, optimizer, frozen=True)
    reasons = {name: reason for name, reason in decay.skipped.items() if "base_layer" in name}
    assert len(reasons) == 2 and all("Dora" in reason for reason in reasons.values())


def test_a_loss_cannot_reach_frozen_weights() -> None:
    model = adapted()
    with pytest.raises(InputError, match="decoupled"):
        SelectiveSpectralDecay(model, torch.optim.AdamW(trained(model)), preset="paper", frozen=True)
