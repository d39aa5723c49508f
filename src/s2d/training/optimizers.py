"""Optimizers of a fine-tuning or a training from scratch.

AdamW, and Muon (Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks") as torch has it, for
the matrices of the blocks with AdamW for everything else: embeddings, patches, norms, biases and heads. Muon's learning
rate is scaled so that its updates are as large as AdamW's (Liu et al., 2025, arXiv 2502.16982), so both take the same
`lr`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from s2d.errors import InputError
from s2d.targets.weights import find_targets

OptimizerName: TypeAlias = Literal["adamw", "muon"]
_FLAG = "muon"


class MuonWithAdamW(Optimizer):
    """Muon for the groups with ``muon: True``, AdamW for the others; one optimizer for hooks, schedules and states."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float) -> None:
        """Groups as for any optimizer.

        Raises:
            ValueError: A group for Muon holds other tensors than matrices.
        """
        ours = [group for group in groups if group.get(_FLAG)]
        others = [group for group in groups if not group.get(_FLAG)]
        self._muon = torch.optim.Muon(ours, lr=lr, adjust_lr_fn="match_rms_adamw") if ours else None
        self._adamw = torch.optim.AdamW(others, lr=lr) if others else None
        parts = [part for part in (self._muon, self._adamw) if part is not None]
        super().__init__([group for part in parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, ours in ((self._muon, True), (self._adamw, False)):
            if part is not None:  # the groups and states are this optimizer's: schedules and loading replace them here
                part.param_groups = [group for group in self.param_groups if bool(group.get(_FLAG)) is ours]
                part.state = self.state
                part.step()
        return loss


def make_optimizer(name: OptimizerName, model: nn.Module, groups: Sequence[dict[str, Any]], lr: float) -> Optimizer:
    """An optimizer for a model's parameter groups.

    Args:
        name: ``adamw`` or ``muon``.
        model: Says which parameters are matrices of blocks.
        groups: Each with ``params``, ``lr`` and ``weight_decay``; for Muon they are split in two where needed.
        lr: Learning rate of groups without their own.

    Raises:
        InputError: Muon, and the model has no matrices in numbered blocks that are trained.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"muon needs torch 2.9 or newer, and this is {torch.__version__}; pip install -U torch")
    hidden = hidden_matrices(model)
    split: list[dict[str, Any]] = []
    for group in groups:
        for ours in (True, False):
            members = [p for p in group["params"] if (id(p) in hidden) is ours]
            if members:
                split.append({**group, "params": members, _FLAG: ours})
    if not any(group[_FLAG] for group in split):
        raise InputError(f"muon: no matrix in a block of {type(model).__name__} is trained; use optimizer adamw")
    return MuonWithAdamW(split, lr)


def hidden_matrices(model: nn.Module) -> set[int]:
    """``id`` of each two-dimensional weight of a linear layer in a numbered block."""
    found = find_targets(model, kinds=("linear",))
    return {id(t.parameter) for t in found if t.depth is not None and t.parameter.ndim == 2}
