"""A budget: the decay may change the loss by a small share of the change that the optimizer's own steps make.

Both changes are known to first order from the gradients of training, without an extra pass. Shrinking changes the loss
by <gradient, dW>, and a step changes it by <gradient of the next batch, step>. The gradient of the step's own batch is
unsuitable, as the step follows the noise of that batch. Where the decay would exceed its share, its strength falls. It
falls to zero where training hardly changes the loss: at small learning rates, or when the model has converged.

The size of a step's change counts, not its gain. At usual learning rates training oscillates across a valley: the loss
rises along each step, although it falls from step to step (docs/results/vision.md). A share of the gain would stop the
decay where it costs nothing.

Without labels, where the model as it was is the teacher, training has nothing to gain that could pay for the decay: its
loss begins at zero, and it only repairs. There a budget is the default (`WITHOUT_LABELS`; docs/results/label-free.md).

Weights are sampled: some thousand entries of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.distributed.parameters import gradient_of, shard_groups, stored_part
from s2d.distributed.sharding import Groups, all_reduce, ranks_in

# The share in training without labels.
WITHOUT_LABELS = 0.3
# Entries of a parameter that are looked at.
ENTRIES = 2048
# Factor of the running means on the earlier measurements.
MEMORY = 0.8


class Budget:
    """How much of its strength a decay may use.

    Attributes:
        pace: The share of the strength that is allowed, between 0 and 1.
        change: Running mean of a step's change of the loss.
        cost: Running mean of the change by the shrinking after a step, at full strength.
    """

    def __init__(self, share: float, optimizers: Sequence[Optimizer], everyone: Groups) -> None:
        """Begin at full strength.

        Args:
            share: The decay's allowed change of the loss, as a share of the change by training.
            optimizers: The optimizers whose steps are measured.
            everyone: All ranks that train the model.
        """
        self.share, self.pace = share, 1.0
        self._optimizers, self._everyone = optimizers, everyone
        self._before: dict[int, Tensor] = {}
        self._moves: dict[int, Tensor] = {}
        self.change = self.cost = 0.0
        self._due: Tensor | float = 0.0

    def look(self) -> None:
        """Measure the coming step."""
        self._before = {number: _sampled(_parameters(each)) for number, each in enumerate(self._optimizers)}
        self._moves, self._due = {}, 0.0

    def looks(self, optimizer: Optimizer) -> bool:
        """Whether this step of an optimizer is measured."""
        return self._optimizers.index(optimizer) in self._before

    def moved(self, optimizer: Optimizer, cost: Tensor | float) -> None:
        """Note that an optimizer has stepped and that its weights are about to be shrunk.

        Args:
            optimizer: One of the optimizers.
            cost: Change of the loss by shrinking at full strength, to first order, from this rank's part; see `copies`.
        """
        number = self._optimizers.index(optimizer)
        self._moves[number] = _sampled(_parameters(optimizer)) - self._before.pop(number)
        self._due = self._due + cost

    def judge(self, scale: float = 1.0) -> None:
        """Finish the measurement of the last step, if there is one, with the gradients of the next batch.

        Args:
            scale: Factor on the loss, if the gradients still contain it.
        """
        if not self._moves:
            return
        change: Tensor | float = 0.0
        for number, move in self._moves.items():
            parameters = _parameters(self._optimizers[number])
            found = [gradient_of(parameter) for parameter in parameters]
            gradients = _sampled(p if g is None else g for p, g in zip(parameters, found, strict=True))
            if len(gradients) != len(move):
                continue  # parameters were added or removed
            change = change + (gradients * move * self._weights(parameters)).sum() / scale
        told = torch.tensor([float(change), float(self._due)], dtype=torch.float64)
        self._moves = {}
        if ranks_in(self._everyone) > 1:
            device = _parameters(self._optimizers[0])[0].device
            told = all_reduce(told.to(device), self._everyone).cpu()
        change, cost = told.tolist()
        if not (math.isfinite(change) and math.isfinite(cost)):
            return
        self.change = MEMORY * self.change + (1 - MEMORY) * abs(change)
        self.cost = MEMORY * self.cost + (1 - MEMORY) * cost
        self.pace = 1.0 if self.cost <= self.share * self.change else self.share * self.change / self.cost

    def _weights(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The factor of each sampled entry in the sum; copies on other ranks share it. Zero without a gradient."""
        counts = [len(_strided(p)) for p in parameters]
        each = [
            copies(shard_groups(p), self._everyone) * stored_part(p).numel() / max(count, 1) * (p.grad is not None)
            for p, count in zip(parameters, counts, strict=True)
        ]
        place = parameters[0].device
        return torch.tensor(each, device=place).repeat_interleave(torch.tensor(counts, device=place))

    def state(self) -> dict[str, Any]:
        """Plain data to continue from."""
        moves = {number: move.cpu() for number, move in self._moves.items()}
        return {"pace": self.pace, "known": [self.change, self.cost, float(self._due)], "moves": moves}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.pace, (self.change, self.cost, self._due) = state["pace"], state["known"]
        self._before = {}
        self._moves = {
            number: move.to(_parameters(self._optimizers[number])[0].device) for number, move in state["moves"].items()
        }


def copies(divided: Groups, everyone: Groups) -> float:
    """The share of one rank in a sum over all ranks: ranks of other groups hold copies."""
    return ranks_in(divided) / ranks_in(everyone)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _sampled(tensors: Iterable[Tensor]) -> Tensor:
    """Entries of many tensors, one behind the other, in float32."""
    parts = [_strided(tensor) for tensor in tensors]
    return torch.cat([part.to(parts[0].device, torch.float32) for part in parts])


def _strided(tensor: Tensor) -> Tensor:
    """About `ENTRIES` entries of this rank's part, evenly spread over rows and columns."""
    local = stored_part(tensor.detach())
    flat = local.to_dense().reshape(-1) if local.is_sparse else local.reshape(-1)
    if len(flat) <= ENTRIES:
        return flat
    step = len(flat) // ENTRIES | 1
    while math.gcd(step, local.shape[-1]) > 1:  # a stride with a common divisor would visit only a few columns
        step += 2
    return flat[::step]
