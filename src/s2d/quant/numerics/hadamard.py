"""Hadamard matrices and other rotations that spread one large channel over all of them.

A matrix H of +1 and -1 with ``H H^T = n I`` turns a vector with one large entry into one whose entries are all alike.
Orders n: 1 and 2; q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for a prime q = 1 mod 4 (Paley 1933); twice any order
(Sylvester 1867). That makes 2^k, 12 * 2^k, 20 * 2^k, 28 * 2^k, 36 * 2^k and most widths that models have; 172 and a few
others need constructions that are not implemented. For an order without a matrix rotations fall back to a random
orthogonal one (dense), or to blocks of a power of two (online).

Everything is float64; the global random state is not touched.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _hadamard(n: int) -> Tensor | None:
    if n in (1, 2):
        return torch.ones(1, 1, dtype=torch.float64, device="cpu") if n == 1 else _SYLVESTER.clone()
    if n < 1 or n % 4:
        return None
    # Doubling first: small bases make fast transforms. A large prime order is built only when nothing smaller is there.
    half = _hadamard(n // 2)
    if half is not None:
        return torch.kron(half, _SYLVESTER)
    if (n - 1) % 4 == 3 and _is_prime(n - 1):
        return _paley_one(n - 1)
    if (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        return _paley_two(n // 2 - 1)
    return None


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix ``[n, n]`` of +1 and -1 (float64), None when no construction here gives that order."""
    found = _hadamard(n)
    return None if found is None else found.clone()


def random_rotation(n: int, generator: torch.Generator, *, keep_ones: bool = False) -> Tensor:
    """A random orthogonal matrix that spreads single channels: signs times a Hadamard matrix, divided by sqrt(n).

    Where no Hadamard matrix of the order is known it is uniformly random (the Q of a Gaussian matrix).

    Args:
        n: Its order.
        generator: Of the signs.
        keep_ones: Make the vector of ones an eigenvector: ``Q 1 = 1`` and ``1^T Q = 1^T``, so a vector's mean is the
            mean of what it is turned into. One reflection does it; it changes entries by O(1/n), against 1/sqrt(n).

    Returns:
        Q ``[n, n]``, float64, orthogonal to 1e-14.
    """
    matrix = _hadamard(n)
    if matrix is None:
        gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
        rotation, triangle = torch.linalg.qr(gaussian)
        rotation = rotation * triangle.diagonal().sign()
    else:
        # Signs on both sides: on one side alone, one row of a Sylvester matrix would stay a row of ones.
        signs = torch.randint(0, 2, (2, n), generator=generator, device="cpu").double() * 2.0 - 1.0
        rotation = signs[0][:, None] * matrix * signs[1] / math.sqrt(n)
    if keep_ones and n > 1:
        ones = torch.ones(n, dtype=torch.float64, device="cpu")
        # The reflection that takes Q 1 to 1, after Q.
        normal = rotation @ ones - ones
        if float(normal.norm()) > 1e-9:
            normal /= normal.norm()
            rotation = rotation - 2.0 * torch.outer(normal, normal @ rotation)
    return rotation


def factors(n: int) -> tuple[Tensor, Tensor]:
    """Two small matrices A ``[a, a]`` and B ``[b, b]`` whose Kronecker product is an orthogonal ``[a * b, a * b]``.

    With `apply_factors`, a vector is turned at ``a + b`` products an entry in place of ``a * b``. The product is a
    Hadamard matrix over sqrt(n); where none is known, A is the identity and B of the largest power of two in n: blocks.
    """
    if _hadamard(n) is None:
        block = n & -n
        return torch.eye(n // block, dtype=torch.float64, device="cpu"), _normalized(block)
    base = n
    while base % 2 == 0 and _hadamard(base // 2) is not None:
        base //= 2
    powers = n // base
    # As many doublings go to the left as bring it closest to sqrt(n).
    choices = [2**k for k in range(powers.bit_length())]
    left = min(choices, key=lambda size: base * size + powers // size)
    return _normalized(base * left), _normalized(powers // left)


def apply_factors(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``x (A kron B)`` along the last dimension, without building the product.

    Args:
        x: ``[..., a * b]``.
        left: A ``[a, a]``.
        right: B ``[b, b]``.
    """
    grid = x.unflatten(-1, (left.shape[0], right.shape[0]))
    # Not as matmul, which stands for the products of an attention where attention is quantized.
    grid = F.linear(grid, right.T).transpose(-2, -1)
    return F.linear(grid, left.T).transpose(-2, -1).flatten(-2)


_SYLVESTER = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")


def _normalized(n: int) -> Tensor:
    matrix = _hadamard(n)
    assert matrix is not None
    return matrix / math.sqrt(n)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q of Paley: entry (i, j) is the Legendre symbol of i - j modulo the prime q."""
    symbol = torch.full((q,), -1.0, dtype=torch.float64, device="cpu")
    symbol[torch.arange(q, dtype=torch.int64, device="cpu").square() % q] = 1.0
    symbol[0] = 0.0
    index = torch.arange(q, device="cpu")
    return symbol[(index[:, None] - index[None, :]) % q]


def _bordered(q: int, corner: float) -> Tensor:
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64, device="cpu")
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = _jacobsthal(q)
    return matrix


def _paley_one(q: int) -> Tensor:
    """Order q + 1, q = 3 mod 4: the identity and a skew-symmetric matrix."""
    return torch.eye(q + 1, dtype=torch.float64, device="cpu") + _bordered(q, -1.0)


def _paley_two(q: int) -> Tensor:
    """Order 2 (q + 1), q = 1 mod 4: the symmetric conference matrix, its zeros and signs replaced by 2 x 2 blocks."""
    conference = _bordered(q, 1.0)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    return torch.kron(conference, _SYLVESTER) + torch.kron(
        torch.eye(q + 1, dtype=torch.float64, device="cpu"), diagonal
    )
