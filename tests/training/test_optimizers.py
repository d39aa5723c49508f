"""Muon with AdamW as one optimizer: which weights go where, and that schedules, hooks and states reach both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.training.optimizers import hidden_matrices, make_optimizer


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    return nn.ModuleDict({"patches": nn.Conv2d(3, 6, 2), "blocks": blocks, "head": nn.Linear(6, 2)})


def groups_of(model: nn.Module) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "lr": 0.01, "weight_decay": 0.1},
        {"params": others, "lr": 0.02, "weight_decay": 0.0},
    ]


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def states(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_only_matrices_of_blocks_are_hidden() -> None:
    model = model_of()
    names = {name for name, p in model.named_parameters() if id(p) in hidden_matrices(model)}
    assert names == {"blocks.0.weight", "blocks.1.weight"}


def test_each_part_is_what_torch_does_alone() -> None:
    model, other = model_of(), model_of()
    optimizer = make_optimizer("muon", model, groups_of(model), 0.01)
    hidden = [p for name, p in other.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    rest = [p for name, p in other.named_parameters() if not name.startswith("blocks") and p.ndim >= 2]
    vectors = [p for p in other.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": rest, "lr": 0.01, "weight_decay": 0.1}, {"params": vectors, "lr": 0.02}])
    adamw.param_groups[1]["weight_decay"] = 0.0
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(other, seed)
        optimizer.step()
        muon.step()
        adamw.step()
    for a, b in zip(states(model), states(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_schedule_reaches_both() -> None:
    model = model_of()
    optimizer = make_optimizer("muon", model, groups_of(model), 0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = states(model)
    give_gradients(model, 0)
    optimizer.step()
    for a, b in zip(states(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_loaded_state_continues_exactly() -> None:
    model = model_of()
    optimizer = make_optimizer("muon", model, groups_of(model), 0.01)
    give_gradients(model, 0)
    optimizer.step()
    other = model_of()
    other.load_state_dict(model.state_dict())
    continued = make_optimizer("muon", other, groups_of(other), 0.01)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    for each, steps in ((model, optimizer), (other, continued)):
        give_gradients(each, 1)
        steps.step()
    for a, b in zip(states(model), states(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_block_is_an_error() -> None:
    model = nn.ModuleDict({"head": nn.Linear(6, 2)})
    with pytest.raises(InputError, match="use optimizer adamw"):
        make_optimizer("muon", model, groups_of(model), 0.01)
