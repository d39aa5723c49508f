"""An outlier planted in one expert is shrunk in that expert alone, below the limit, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.audit.test_audit_experts import Noting
from tests.quant.modules.test_experts import MODELS, TOKENS, language_model, output, owners
from torch import Tensor, nn

from s2d import SelectiveSpectralDecay

LIMIT = 8.0


class Only(SelectiveSpectralDecay):
    """Shrinks experts alone: a tiny random model has outliers of its own elsewhere."""

    def shrink(self, target: Any, *rest: Any) -> None:
        if "experts" in target.name:
            super().shrink(target, *rest)


def site(model: nn.Module, name: str, batch: Any = TOKENS) -> tuple[str, dict[int, Tensor]]:
    """What the last down_proj reads, by expert; from a loop over the experts, not from the graph."""
    seen = copy.deepcopy(model).eval()
    path, module = list(owners(seen))[-1]
    loop = Noting(module, MODELS[name][1])
    seen.set_submodule(path, loop)
    output(seen, batch)
    return path, {e: torch.stack([x for x, _ in p]) for (w, e), p in loop.noted.items() if w == "down_proj"}


def ratio(read: dict[int, Tensor], expert: int, channel: int) -> float:
    return float(read[expert][:, channel].abs().max() / torch.cat(list(read.values())).square().mean().sqrt())


def rows(parameter: Tensor, transposed: bool) -> Tensor:
    """``[E, out, in]`` of a stack, or ``[E, out, 1]`` of its biases."""
    return parameter.unsqueeze(2) if parameter.ndim == 2 else parameter.mT if transposed else parameter


def planted(name: str, experts: str) -> tuple[nn.Module, Any, int, int, int]:
    """A model, its module of experts, and where the outlier is: expert, row and channel."""
    model = language_model(name, experts).train()
    model.config.use_cache = False  # type: ignore[union-attr]
    for key, parameter in model.named_parameters():
        if key.endswith("gate_up_proj_bias"):
            nn.init.normal_(parameter, std=0.02)
    path, read = site(model, name)
    expert = max(read, key=lambda e: len(read[e]))
    channel = int(read[expert].abs().amax(0).argmax())
    width = read[expert].shape[1]
    row = 2 * channel if name == "GptOss" else width + channel  # gate and up take turns, or up comes second
    others = torch.cat(list(read.values())).square().mean().sqrt()
    factor = 10 * LIMIT * float(others / read[expert][:, channel].abs().max())
    module: Any = model.get_submodule(path)
    with torch.no_grad():
        for each in ("gate_up_proj", "gate_up_proj_bias"):
            if hasattr(module, each):
                rows(getattr(module, each), MODELS[name][1])[expert, row] *= factor
    return model, module, expert, row, channel


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of a training in which nothing but the decay moves a number."""
    with torch.no_grad():
        model(**TOKENS)
    optimizer.step()


def still(model: nn.Module) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.SGD(model.parameters(), lr=1e-30)


@pytest.mark.parametrize(
    "case",
    ["Mixtral eager", "Mixtral grouped_mm", "Mixtral batched_mm", "DeepseekV3 grouped_mm", "GraniteMoe grouped_mm"]
    + [f"GptOss {experts}" for experts in ("eager", "grouped_mm", "batched_mm")],
)
def test_an_outlier_of_one_expert_is_shrunk_in_it_alone(case: str) -> None:
    name, experts = case.split()
    model, module, expert, row, channel = planted(name, experts)
    assert ratio(site(model, name)[1], expert, channel) > 1.5 * LIMIT
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = still(model)
    decay = Only(model, optimizer, strength=0.1, outlier_ratio=LIMIT, refresh_every=5)
    for _ in range(31):
        step(model, optimizer)
    path, read = site(model, name)
    mine = [entry["selected"] for entry in decay.history if entry["weight"] == f"{path}.gate_up_proj"]
    assert mine[0] == 1 and mine[-1] == 0 and ratio(read, expert, channel) < LIMIT
    for key, value in model.state_dict().items():
        if not key.startswith(f"{path}.gate_up_proj"):
            assert torch.equal(value, before[key]), key
            continue
        same = (rows(value, MODELS[name][1]) == rows(before[key], MODELS[name][1])).all(2)
        assert not bool(same[expert, row])
        same[expert, row] = True
        assert bool(same.all()), key
    assert f"{path}.down_proj" in decay.skipped and f"{path}.gate_up_proj" not in decay.skipped
    decay.remove()


def test_a_resumed_decay_goes_on_with_the_same_expert() -> None:
    model, module, expert, row, _ = planted("Mixtral", "grouped_mm")
    twin = copy.deepcopy(model)
    optimizer, other = still(model), still(twin)
    settings: dict[str, Any] = {"strength": 0.1, "outlier_ratio": LIMIT, "refresh_every": 5}
    decay = Only(model, optimizer, **settings)
    for _ in range(7):
        step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    resumed = Only(twin, other, **settings)
    resumed.load_state_dict(decay.state_dict())
    assert resumed.selected == decay.selected and any("experts" in name for name in decay.selected)
    for _ in range(6):
        step(model, optimizer)
        step(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert resumed.selected == decay.selected
    decay.remove()
    resumed.remove()
