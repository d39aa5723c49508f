"""The closed forms of spectral decay, on plain tensors.

Source: "Selective Spectral Decay" (S2D), arXiv 2602.14432, for the penalty and its gradient. The decoupled forms follow
d sigma / dt = -sigma^n exactly, so that no step overshoots. They depend on the subspaces alone, not on their bases.

A weight may be this rank's part of a sharded weight. The quantities of the whole weight are then summed over ranks
between `measured` and the step, for many weights in one message.

Shapes: O outputs, I inputs, K components, o and i outputs and inputs of this rank's part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2d.decay.selection import Components
from s2d.distributed.sharding import Block, Groups


def decayed(sigma: Tensor, amount: float, power: float) -> Tensor:
    """Follow d sigma / dt = -sigma^power for a time ``amount``: the closed form, which never overshoots.

    Args:
        sigma: Non-negative singular values, any shape.
        amount: lambda times the schedule's factor, at least 0.
        power: n >= 1. n = 1: ``sigma e^-amount``; n = 2: ``sigma / (1 + amount sigma)``.

    Returns:
        Between 0 and ``sigma``.
    """
    return sigma * retained(sigma, amount, power)


def retained(sigma: Tensor, amount: float, power: float) -> Tensor:
    """The share of sigma that `decayed` leaves, between 0 and 1; defined for sigma = 0 as well."""
    if power == 1.0 or amount == 0:
        return torch.full_like(sigma, math.exp(-amount))
    return torch.exp(-torch.log1p(amount * (power - 1) * sigma.pow(power - 1)) / (power - 1))


def measured(W: Tensor | Block, components: Components, metric: str) -> Tensor:
    """This rank's contribution to the quantities of the whole weight that a step needs.

    Args:
        W: ``[O, I]``.
        components: Components of any kind.
        metric: As in `s2d.decay.DecaySettings`.

    Returns:
        A tensor to be summed over `summed_over`. For singular components: their present values ``u^T W v`` ``[K]``. For
        directions: ``U^T W`` ``[K, i]`` of this rank's columns. For channels: an empty tensor ``[0]``.
    """
    block = Block.of(W)
    if components.U is None:
        return block.local.new_zeros(0)
    if metric != "weight":
        return components.U[block.rows].mT @ block.local.to(components.U.dtype)
    assert components.V is not None
    return block.between(components.U, components.V)


def summed_over(W: Block, components: Components, metric: str) -> Groups:
    """The ranks whose `measured` values add up."""
    if components.U is None:
        return ()
    return W.groups if metric == "weight" else W.row_groups


def shrink_singular(
    W: Tensor | Block,
    components: Components,
    amount: float,
    power: float,
    present: Tensor | None = None,
    draw: torch.Generator | None = None,
) -> None:
    """W <- W - U (s - s') V^T, with s the present values u^T W v, not those of the last refresh. In place.

    Args:
        W: ``[O, I]``.
        components: With U and V.
        amount: See `decayed`.
        power: See `decayed`.
        present: s, where it is known; see `measured`.
        draw: Rounds at random, as half precision needs; see `subtract`.
    """
    assert components.U is not None and components.V is not None
    block, s = Block.of(W), measured(W, components, "weight") if present is None else present
    U, V, s = components.U[block.rows], components.V[block.columns], s.clamp_min(0)  # negative s: left as it is
    subtract(block.local, (U * (s - decayed(s, amount, power))) @ V.mT, draw)


def shrink_directions(
    W: Tensor | Block,
    components: Components,
    amount: float,
    power: float,
    bias: Tensor | Block | None = None,
    present: Tensor | None = None,
    present_bias: Tensor | None = None,
    draw: torch.Generator | None = None,
) -> None:
    """W <- (I - U diag(rho) U^T) W and the same for the bias, rho = 1 - s'/s in the metric of the data. In place.

    Args:
        W: ``[O, I]``.
        components: With U.
        amount: See `decayed`.
        power: See `decayed`.
        bias: ``[O]`` or None.
        present: ``U^T W``, where it is known; see `measured`.
        present_bias: ``U^T b`` ``[K, 1]``, likewise.
        draw: Rounds at random, as half precision needs; see `subtract`.
    """
    assert components.U is not None
    kept = retained(components.S, amount, power)
    for part, known in ((W, present), (bias, present_bias)):
        if part is not None:
            block = Block.of(part)
            along = measured(block, components, "data") if known is None else known
            subtract(block.local, (components.U[block.rows] * (1 - kept)) @ along, draw)
    components.S = components.S * kept


def shrink_rows(
    W: Tensor | Block,
    components: Components,
    amount: float,
    power: float,
    bias: Tensor | Block | None,
    offset: float = 0.0,
    owed: Tensor | None = None,
) -> None:
    """Scale the selected rows (or gains) and their biases by s'/s. In place.

    Half precision cannot represent a factor near 1. Such factors accumulate until their effect is as large as the
    spacing of the numbers. The rounding error is carried over, so that the product of all factors is right.

    Args:
        W: ``[O, I]``, or a gain ``[O]``.
        components: With channels.
        amount: See `decayed`.
        power: See `decayed`.
        bias: ``[O]`` or None.
        offset: Number added to a gain before it multiplies; the sum is shrunk.
        owed: ``[2, O]`` logarithms of the factors still due to the rows and biases, updated; for half precision.
    """
    kept = retained(components.S, amount, power)
    for number, part in enumerate((W, bias)):
        if part is None:
            continue
        block = Block.of(part)
        here, rows = channels_here(block, components)
        added = offset if number == 0 else 0.0
        if owed is None:
            scale = kept[here].to(block.local.dtype)[:, None]
            # This form keeps 0 exact for a plain gain.
            block.local[rows] = block.local[rows] * scale + added * (scale - 1)
            continue
        assert components.channels is not None
        place = number, components.channels[here]
        old = block.local[rows].float() + added
        due = owed[place] + torch.log(kept[here].float())
        # The numbers of a row have different relative spacings and move together; a gain goes to the nearest number.
        spacing = torch.finfo(block.local.dtype).eps if old.shape[1] > 1 else 0.0
        factor = torch.where(due <= -spacing, due.exp(), 1.0)
        rounded = (old * factor[:, None] - added).to(block.local.dtype)
        block.local[rows] = rounded
        size = old.square().sum(1)
        reached = torch.where(size > 0, ((rounded.float() + added) * old).sum(1) / size, factor)
        owed[place] = (due - torch.log(reached.clamp_min(1e-30))).clamp_max(0.01)
    components.S = components.S * kept


def slope_rows(
    W: Tensor | Block,
    gradient: Tensor | Block,
    components: Components,
    power: float,
    offset: float = 0.0,
) -> Tensor:
    """The derivative of the loss by the amount of `shrink_rows`; this rank's part, a scalar.

    Args:
        W: ``[O, I]``, a gain or a bias ``[O]``.
        gradient: Gradient of W.
        components: With channels.
        power: See `decayed`.
        offset: See `shrink_rows`.
    """
    block = Block.of(W)
    here, rows = channels_here(block, components)
    values, gradients = block.local[rows].float() + offset, Block.of(gradient).local[rows].float()
    return -((values * gradients).sum(1) * components.S[here].pow(power - 1)).sum()


def subtract(local: Tensor, change: Tensor, draw: torch.Generator | None = None) -> None:
    """``local -= change``, in place.

    Args:
        local: Any shape, any floating dtype.
        change: The same shape.
        draw: Round up or down at random, unbiased. Otherwise changes below the spacing of half precision are lost.
    """
    if draw is None:
        local.sub_(change.to(local.dtype))
        return
    wanted, kind = local.float() - change.float(), torch.finfo(local.dtype)
    _, exponent = torch.frexp(wanted)
    spacing = torch.ldexp(torch.full_like(wanted, kind.eps / 2), exponent).clamp_min(kind.tiny * kind.eps)
    up = torch.rand(wanted.shape, generator=draw, device=wanted.device)
    local.copy_(torch.floor(wanted / spacing + up) * spacing)


def channels_here(W: Block, components: Components) -> tuple[Tensor | slice, Tensor]:
    """Which selected channels lie in this rank's part, and their row numbers there."""
    assert components.channels is not None
    if len(W.local) == len(W):
        return slice(None), components.channels
    rows = components.channels - W.rows.start
    here = (rows >= 0) & (rows < len(W.local))
    return here, rows[here]


def penalty_gradient(
    W: Tensor | Block, components: Components, power: float, metric: str, present: Tensor | None = None
) -> Tensor:
    """The gradient of ``sum sigma^(n+1) / (n + 1)`` at the selected components, ``[O, I]``; this rank's part.

    With `present` known (see `measured`), only the position of W counts, not its values; W may then be a gradient.

    Weight metric: ``sum s^n u v^T`` with the present ``s = u^T W v`` (a stale one would overshoot). Data metric: with
    sigma^2 = u^T W C W^T u, ``sum s^(n-1) u (C W^T u)^T``.
    """
    assert components.U is not None and components.V is not None
    block = Block.of(W)
    U, V = components.U[block.rows], components.V[block.columns]
    if metric == "weight":
        s = measured(block, components, metric) if present is None else present
        return (U * s.clamp_min(0).pow(power)) @ V.mT
    return (U * components.S.pow(power - 1)) @ V.mT
