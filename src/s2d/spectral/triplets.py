"""Singular triplets: what the decompositions return, and weights read as matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Triplets:
    """The k leading singular triplets of a matrix, or of a batch of matrices: W ~ U diag(S) V^T.

    Attributes:
        U: Left singular vectors as columns, ``[..., m, k]``. Like all others float32, or float64 for float64 weights.
            Orthonormal to 1e-6; to 1e-3 at worst, where singular values of the block differ by a factor of 100.
        S: Singular values in descending order, ``[..., k]``.
        V: Right singular vectors as columns, ``[..., n, k]``. The entry of largest magnitude of each is positive.
        residual: ``max_i ||W^T u_i - s_i v_i|| / s_1`` over the k pairs *before* the last half step (for these,
            ``W v_i = s_i u_i`` holds by construction), ``[...]``. The returned pairs are half a power step closer. By
            Weyl's theorem every s_i is within ``residual * s_1`` of a singular value. 0 for an exact SVD.
        iterations: Power steps taken (applications of W^T W to the block), each reading the weight about once; the
            largest of a batch. 0 where an exact SVD was chosen from the start.
        exact: An exact SVD was used, by request, because the matrix is small, or as the fall-back.
        fallbacks: Number of matrices that did not converge and fell back to an exact SVD.
        basis: The right block that the next warm start continues from, ``[..., n, p]`` with p >= k: V (a view of it)
            and the oversampling columns.
        edge: The last singular value of the block when it was last found from scratch, ``[...]``. It estimates the
            largest singular value outside the block. A warm start whose s_k falls below it searches from scratch.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    iterations: int
    exact: bool
    fallbacks: int
    basis: Tensor
    edge: Tensor


def fix_signs(U: Tensor, V: Tensor) -> None:
    """In place: the entry of largest magnitude of every row of V becomes positive; U follows."""
    signs = V.gather(-1, V.abs().argmax(dim=-1, keepdim=True)).sign()
    U *= signs
    V *= signs


def unbatch(batch: Triplets) -> list[Triplets]:
    """The triplets of every matrix of a batch, in order."""
    U, V, basis = (x.reshape(-1, *x.shape[-2:]) for x in (batch.U, batch.V, batch.basis))
    S, residual = batch.S.reshape(-1, batch.S.shape[-1]), batch.residual.reshape(-1)
    tensors = zip(U, S, V, residual, basis, batch.edge.reshape(-1), strict=True)
    return [Triplets(u, s, v, r, batch.iterations, batch.exact, 0, b, e) for u, s, v, r, b, e in tensors]


def rebatch(found: Sequence[Triplets], batch: torch.Size) -> Triplets:
    """The triplets of single matrices as those of a batch of this shape: the inverse of `unbatch`."""
    U, S, residual, basis, edge = (
        torch.stack(parts).reshape(*batch, *parts[0].shape)
        for parts in zip(*((t.U, t.S, t.residual, t.basis, t.edge) for t in found), strict=True)
    )
    steps, exact = max(t.iterations for t in found), any(t.exact for t in found)
    fallbacks = sum(t.fallbacks for t in found)
    return Triplets(U, S, basis[..., : S.shape[-1]], residual, steps, exact, fallbacks, basis, edge)
