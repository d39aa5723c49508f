"""Block subspace iteration on a weight, or on the part of it that this rank holds.

One function, `power_steps`, reads a weight: two products with a few vectors. Everything else here is small and dense.
A sharded weight (see `s2d.distributed.sharding`) adds a sum over ranks of these two products.

Sources and deviations: see `s2d.spectral.svd`, which holds the public functions.

Shapes: B matrices of a group, m rows, n columns, p columns of the block, k triplets asked for. A block of p vectors is
stored as *rows* ([p, n], contiguous): a matrix product with a skinny operand is up to ten times faster that way than
with the vectors as columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s2d.distributed.sharding import Block, all_reduce

# A power step takes this many bytes of the weight at a time, so that its second product finds them in the cache. On an
# accelerator kernel launches cost more than memory traffic.
_PIECE_BYTES_CPU = 3 << 19
_PIECE_BYTES_ACCELERATOR = 64 << 20

# Gram matrices: columns in float64 at a time; smallest ratio of the block's smallest to largest singular value allowed.
_GRAM_COLUMNS = 768
_GRAM_CONDITION = 1e-2

# The Chebyshev filter. Singular values above this multiple of the block's smallest converge fast enough by themselves.
# The others are amplified at most this much at a time (fp32 resolves 1e7), by a polynomial of at most this degree.
_FILTER_LEAD = 4.0
_FILTER_GAIN = 1e4
_FILTER_DEGREE = 12


def power_steps(Ws: Sequence[Block], V: Tensor) -> tuple[Tensor, Tensor]:
    """Both skinny products of a power step, Y = V W^T and Z = Y W, in one pass over each W.

    Where the weights are divided over ranks, each rank multiplies by its block, and the products are summed. Where only
    rows or only columns are divided, this is one message for the whole group, of ``B p (m + n)`` numbers.

    Args:
        Ws: B weights of one shape, dtype and placement.
        V: ``[B, p, n]``, the same on every rank.

    Returns:
        Y ``[B, p, m]`` and Z ``[B, p, n]``, whole on every rank.
    """
    B, p, n = V.shape
    first = Ws[0]
    m, groups = first.shape[0], first.groups
    if not groups:
        Y, Z = V.new_empty(B, p, m), torch.empty_like(V)
        for row, W in enumerate(Ws):
            _power_step(W.local, V[row], Y[row], Z[row])
        return Y, Z
    message = V.new_zeros(B * p * (m + n))
    Y, Z = message[: B * p * m].view(B, p, m), message[B * p * m :].view(B, p, n)
    if not first.column_groups:  # the rows of Y are complete here, so Z can be computed at once
        for row, W in enumerate(Ws):
            own = V.new_empty(p, len(W.local))
            _power_step(W.local, V[row], own, Z[row])
            Y[row, :, W.rows] = own
        all_reduce(message, groups)
        return Y, Z
    for row, W in enumerate(Ws):
        given, part = V[row, :, W.columns].contiguous(), Y[row, :, W.rows]
        for rows, A in _pieces(W.local, V.dtype):
            part[:, rows] = given @ A.mT
    all_reduce(message[: B * p * m], groups)
    for row, W in enumerate(Ws):
        given, part = Y[row, :, W.rows].contiguous(), Z[row, :, W.columns]
        for rows, A in _pieces(W.local, V.dtype):
            part += given[:, rows] @ A
    all_reduce(message[B * p * m :], groups)
    return Y, Z


def power_step(W: Block, V: Tensor) -> tuple[Tensor, Tensor]:
    """`power_steps` of one weight: V ``[p, n]`` to Y ``[p, m]`` and Z ``[p, n]``."""
    Y, Z = power_steps([W], V[None])
    return Y[0], Z[0]


def _power_step(W: Tensor, V: Tensor, Y: Tensor, Z: Tensor) -> None:
    """Y = V W^T and Z = Y W of this rank's part.

    W ``[m, n]`` of any floating dtype is converted piece by piece to that of the blocks V ``[p, n]``, Y ``[p, m]`` and
    Z ``[p, n]``, of which the last two are overwritten.
    """
    Z.zero_()
    for rows, A in _pieces(W, V.dtype):
        part = Y[:, rows]
        torch.mm(V, A.mT, out=part)
        Z.addmm_(part, A)


def _pieces(W: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, in another dtype."""
    on_cpu = W.device.type == "cpu"
    budget = _PIECE_BYTES_CPU if on_cpu else _PIECE_BYTES_ACCELERATOR
    rows = -(-W.shape[0] // max(1, round(W.numel() * dtype.itemsize / budget)))
    for first in range(0, W.shape[0], max(rows, 1)):
        A = W[first : first + rows]
        if A.dtype != dtype:
            A = A.to(dtype)
        elif on_cpu:
            A.sum()  # a streaming read fetches the piece faster than the products would: 15 to 25 % of the whole step
        yield slice(first, first + len(A)), A


def _gram(X: Tensor, dtype: torch.dtype) -> Tensor:
    """X X^T of a block ``[B, p, n]`` in another precision, a piece at a time so that the copies stay small."""
    total = X.new_zeros(*X.shape[:-1], X.shape[-2], dtype=dtype)
    for part in X.split(_GRAM_COLUMNS, dim=-1):
        part = part.to(dtype)
        total += part @ part.mT
    return total


def rayleigh_ritz(V: Tensor, Y: Tensor, Z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Singular triplets of W restricted to the left space span(Y), from the products alone.

    With Q = T Y orthonormal, W^T Q = T Z; its singular values are the Ritz values. All p x p matrices are in float64,
    because a Gram matrix squares the condition number.

    Takes V ``[B, p, n]`` with orthonormal rows, Y ``[B, p, m]`` = V W^T and Z ``[B, p, n]`` = Y W. Returns U
    ``[B, k, m]``, S ``[B, p]``, the new V ``[B, p, n]``, the residual ``[B]`` of the Ritz pairs of the old V (relative
    to their largest), and whether the Gram matrices were well-conditioned enough, ``[B]``.
    """
    wide = torch.float32 if V.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    values, P = torch.linalg.eigh(_gram(Y, wide))
    D, P = values.clamp_min(0).sqrt().flip(-1), P.flip(-1)
    tiny = torch.finfo(wide).tiny ** 0.5  # matters only where everything is zero
    well = D[:, -1] > _GRAM_CONDITION * D[:, 0]
    T = P.mT / D.maximum(1e-9 * D[:, :1] + tiny)[..., None]

    gram = T @ _gram(Z, wide) @ T.mT
    values, R = torch.linalg.eigh((gram + gram.mT) / 2)
    S, R = values.clamp_min(0).sqrt().flip(-1), R.flip(-1)
    rotate = R.mT @ T

    dtype = V.dtype
    off = T[:, :k].to(dtype) @ Z
    off.baddbmm_((P.mT[:, :k] * D[:, :k, None]).to(dtype), V, alpha=-1)
    residual = torch.linalg.vector_norm(off, dim=-1).amax(dim=-1) / D[:, 0].clamp_min(tiny)
    del off  # the new V takes its place
    U = rotate[:, :k].to(dtype) @ Y
    V_new = (rotate / S.clamp_min(tiny)[..., None]).to(dtype) @ Z
    return U, S.to(dtype), V_new, residual.to(dtype), well


def rayleigh_ritz_qr(W: Block, V: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for one matrix by Householder QR: orthonormal whatever the rank, at one more pass over W.

    W is of moderate scale; returns U ``[k, m]``, S ``[p]``, the new V ``[p, n]`` and the residual, a scalar.
    """
    V = torch.linalg.qr(V.mT).Q.mT.contiguous()
    Y, _ = power_step(W, V)
    Q, R = torch.linalg.qr(Y.mT)
    left, D, right = torch.linalg.svd(R)
    Q = (Q @ left).mT.contiguous()
    Z, _ = power_step(W.mT, Q)
    off = Z[:k] - D[:k, None] * (right[:k].contiguous() @ V)
    residual = torch.linalg.vector_norm(off, dim=-1).amax() / D[0].clamp_min(torch.finfo(D.dtype).tiny)
    X, S, V_new = torch.linalg.svd(Z, full_matrices=False)
    return X.mT[:k] @ Q, S, V_new, residual


def filter_degree(S: Sequence[float], k: int, residual: float, tol: float) -> int:
    """Degree of the Chebyshev filter that should bring the k-th triplet to ``tol``. Below 2 a filter does not pay."""
    bound = S[-1]
    if bound <= 1e-6 * S[0]:
        return 0  # rounding noise: the block already holds the whole space

    def rate(s: float) -> float:  # a Chebyshev polynomial of degree d amplifies s by cosh(d * rate)
        return math.acosh(max(2 * (s / bound) ** 2 - 1, 1 + 1e-6))

    lead = sum(s > _FILTER_LEAD * bound for s in S)
    if lead >= len(S) - 1:
        return 0
    enough = math.ceil(math.acosh(max(2 * residual / tol, 1.0)) / rate(S[max(k - 1, lead)]))
    return min(enough, int(math.acosh(_FILTER_GAIN) / rate(S[lead])), _FILTER_DEGREE)


def filtered(W: Block, V: Tensor, S: Tensor, degree: int) -> Tensor:
    """Apply the Chebyshev polynomial in W^T W of a degree, small on [0, s_p^2] and growing fastest above.

    The far-leading rows would dominate the others; they are not filtered, and are projected out of the others. V
    ``[p, n]`` and S ``[p]`` are the Ritz vectors and values; returns ``[p, n]`` with orthonormal rows.
    """
    lead = int((S / S[-1] > _FILTER_LEAD).sum())
    leading, before = V[:lead], V[lead:]

    def apply(X: Tensor, factor: Tensor) -> Tensor:
        _, Z = power_step(W, X)
        Z *= factor
        return Z

    factor = 2 / S[-1].square()
    current = apply(before, factor) - before
    current -= (current @ leading.mT) @ leading
    for _ in range(degree - 1):
        after = apply(current, 2 * factor)
        after -= 2 * current
        after -= before
        after -= (after @ leading.mT) @ leading
        before, current = current, after
    return torch.linalg.qr(torch.cat([leading, current]).mT).Q.mT
