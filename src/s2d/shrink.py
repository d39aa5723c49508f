"""Shrinking: the closed forms of spectral decay, on plain tensors.

Source: "Selective Spectral Decay" (S2D), arXiv 2602.14432, for the penalty and its gradient; the decoupled forms follow
d sigma / dt = -sigma^n exactly, so that no step overshoots, and depend on the subspaces alone, not on their bases.

Shapes: O outputs, I inputs, K components.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2d.selection import Components


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


def spectral_penalty(sigma: Tensor, strength: float, power: float) -> Tensor:
    """The paper's loss, ``lambda / (n + 1) * sum sigma^(n+1)``, a scalar (arXiv 2602.14432)."""
    return strength / (power + 1) * sigma.pow(power + 1).sum()


def shrink_singular(W: Tensor, components: Components, amount: float, power: float) -> None:
    """W <- W - U (s - s') V^T, with s the present values u^T W v, not those of the last refresh. In place.

    Args:
        W: ``[O, I]``.
        components: With U and V.
        amount: See `decayed`.
        power: See `decayed`.
    """
    assert components.U is not None and components.V is not None
    U, V = components.U, components.V
    s = ((W.to(U.dtype) @ V) * U).sum(0).clamp_min(0)  # a component that training turned around is left alone
    W.sub_(((U * (s - decayed(s, amount, power))) @ V.mT).to(W.dtype))


def shrink_directions(W: Tensor, components: Components, amount: float, power: float, bias: Tensor | None) -> None:
    """W <- (I - U diag(rho) U^T) W and the same for the bias, rho = 1 - s'/s in the metric of the data. In place."""
    assert components.U is not None
    U = components.U
    kept = retained(components.S, amount, power)
    rho = 1 - kept
    W.sub_(((U * rho) @ (U.mT @ W.to(U.dtype))).to(W.dtype))
    if bias is not None:
        bias.sub_(((U * rho) @ (U.mT @ bias.to(U.dtype))).to(bias.dtype))
    components.S = components.S * kept


def shrink_rows(W: Tensor, components: Components, amount: float, power: float, bias: Tensor | None) -> None:
    """Scale the selected rows (or gains) and their biases by s'/s. In place.

    Args:
        W: ``[O, I]``, or a gain ``[O]``.
        components: With channels.
        amount: See `decayed`.
        power: See `decayed`.
        bias: ``[O]`` or None.
    """
    assert components.channels is not None
    kept = retained(components.S, amount, power)
    shape = (-1, *[1] * (W.ndim - 1))
    W[components.channels] *= kept.to(W.dtype).view(shape)
    if bias is not None:
        bias[components.channels] *= kept.to(bias.dtype)
    components.S = components.S * kept


def penalty_gradient(W: Tensor, components: Components, power: float, metric: str) -> Tensor:
    """The gradient of ``sum sigma^(n+1) / (n + 1)`` at the selected components, ``[O, I]``.

    Weight metric: ``sum s^n u v^T`` with the present ``s = u^T W v`` (a stale one would overshoot). Data metric: with
    sigma^2 = u^T W C W^T u, ``sum s^(n-1) u (C W^T u)^T``.
    """
    assert components.U is not None and components.V is not None
    U, V = components.U, components.V
    if metric == "weight":
        s = ((W.to(U.dtype) @ V) * U).sum(0).clamp_min(0)
        return (U * s.pow(power)) @ V.mT
    return (U * components.S.pow(power - 1)) @ V.mT
