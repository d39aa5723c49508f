"""Leading singular triplets of weight matrices: exact, randomized, and warm-started from the last ones.

The decay needs the triplets of the same weights again and again, and the weights change little in between. So the last
block of right singular vectors is kept and taken one power step further, which reads the weight about once.

Sources: randomized range finder with power iterations, Halko, Martinsson, Tropp (2011), arXiv 0909.4061, algorithms
4.4 and 5.1; block subspace iteration with Rayleigh-Ritz, Saad, "Numerical Methods for Large Eigenvalue Problems",
chapter 5; its Chebyshev filter, Zhou, Saad, Tiago, Chelikowsky (2006), J. Comput. Phys. 219, algorithm 4.3.
Deviations: both skinny products of a power step are taken in one pass over the weight; bases are orthonormalised from
their Gram matrices, in float64 (Householder QR where those are too ill-conditioned); the filter does not change
far-leading directions; noise is added to the last column of a warm block, so that a direction growing outside is found;
the search restarts where the last one can no longer guarantee the order.

Shapes: B matrices of a group, m rows, n columns, p columns of the block, k triplets asked for. Inside this module a
block of p vectors is stored as *rows* ([p, n], contiguous): a matrix product with a skinny operand is up to ten times
faster that way than with the vectors as columns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s2d.distributed.sharding import Block, Groups, all_reduce
from s2d.errors import InputError
from s2d.spectral.subspace import filter_degree, filtered, power_steps, rayleigh_ritz, rayleigh_ritz_qr
from s2d.spectral.triplets import Triplets, fix_signs, rebatch, unbatch

METHODS = ("auto", "exact", "randomized", "warm")

# Up to this min(m, n) an exact SVD is cheaper than iterating.
_EXACT_UP_TO_COLD = 128
_EXACT_UP_TO_WARM = 32

_GROUP_SIZE = 32  # larger groups are split, which bounds their memory

# Relative size of the noise added to the last column of a warm block.
_STIR = 0.3

# Safe range of the products. Outside it sigma^2 might leave float32, and the weight is checked (never for real ones).
_SAFE_PRODUCT = (1e-15, 1e15)


def top_singular(
    W: Tensor,
    k: int = 3,
    *,
    warm: Triplets | None = None,
    method: str = "auto",
    tol: float = 2e-4,
    max_iterations: int = 100,
    oversample: int = 5,
    seed: int = 0,
    name: str = "W",
) -> Triplets:
    """Compute the k largest singular values of a matrix and their vectors.

    Args:
        W: ``[..., m, n]``, float64, float32, bfloat16 or float16; the last two are computed in float32. Never
            modified, and no gradient is recorded.
        k: Number of triplets, at least 1 and at most min(m, n).
        warm: The triplets of an earlier state of ``W`` (same shape), to continue from. Made with a smaller
            ``k + oversample``, they are not used.
        method: ``"auto"``: warm where ``warm`` is given, otherwise randomized, and exact where that is cheaper (a
            small matrix). ``"exact"``: ``torch.linalg.svd``. ``"randomized"``: from a random block, whatever ``warm``
            holds. ``"warm"``: from ``warm``.
        tol: Iterate until ``Triplets.residual`` is at most this. A singular vector is then within about
            ``tol * s_1 / gap`` of the true one, gap being the distance to the next singular value; singular values
            are far closer than ``tol``, as their error goes with the square of that angle.
        max_iterations: Power steps before a matrix falls back to the exact SVD (``Triplets.fallbacks``).
        oversample: Extra columns of the block, for faster convergence.
        seed: Seed of the random start. The same call gives the same bits; the global generator is not touched.
        name: Name of ``W`` in error messages.

    Returns:
        The triplets, with the batch dimensions of ``W``.

    Raises:
        InputError: ``W`` holds NaN or Inf, is not a floating-point matrix, or an argument is out of range.
    """
    _check_matrix(W, name)
    batch = W.shape[:-2]
    if warm is not None and warm.S.shape[:-1] != batch:
        raise InputError(
            f"{name} is a batch of {list(batch)}, its warm triplets of {list(warm.S.shape[:-1])}; pass its own"
        )
    matrices = [W] if W.ndim == 2 else list(W.detach().reshape(-1, *W.shape[-2:]).unbind(0))
    found = top_singular_many(
        matrices,
        k,
        warm=None if warm is None else unbatch(warm),
        method=method,
        tol=tol,
        max_iterations=max_iterations,
        oversample=oversample,
        seed=seed,
        names=[name] if W.ndim == 2 else [f"{name}[{i}]" for i in range(len(matrices))],
    )
    return found[0] if W.ndim == 2 else rebatch(found, batch)


@torch.no_grad()
def top_singular_many(
    Ws: Sequence[Tensor | Block],
    k: int = 3,
    *,
    warm: Sequence[Triplets | None] | None = None,
    method: str = "auto",
    tol: float = 2e-4,
    max_iterations: int = 100,
    oversample: int = 5,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[Triplets]:
    """Compute the k leading triplets of many matrices; those of equal shape share their small dense work.

    The weights themselves are never stacked or copied (except for an exact SVD, and 1.5 MB at a time for half
    precision). A warm refresh needs at most three times the skinny blocks, ``(m + n) * (k + oversample)`` numbers per
    matrix.

    Args:
        Ws: Matrices ``[m, n]``, of any mix of shapes, dtypes and devices. Of a DTensor, or a `Block`, only the
            local part is read; all its ranks must call this, and get the same bits. It is never decomposed exactly:
            where it does not converge, the last iterate is returned, and counted in ``fallbacks``.
        k: As in `top_singular`, for every matrix.
        warm: One earlier result (or None) per matrix.
        method: As in `top_singular`, like ``tol``, ``max_iterations`` and ``oversample``.
        seed: Seed of the random start. Every matrix gets the same start as it would alone.
        names: Names of the matrices in error messages; ``weight 0``, ``weight 1``, ... by default.

    Returns:
        One result per matrix, in order.

    Raises:
        InputError: As in `top_singular`; the message names the matrix.
    """
    matrices = [W if isinstance(W, Block) else W.detach() for W in Ws]
    labels = [f"weight {i}" for i in range(len(matrices))] if names is None else list(names)
    starts: list[Triplets | None] = [None] * len(matrices) if warm is None else list(warm)
    _check_arguments(matrices, labels, starts, k, method)
    if not (0 < tol < 1 and max_iterations >= 1 and oversample >= 0):
        raise InputError(
            f"tol={tol}, max_iterations={max_iterations}, oversample={oversample}; "
            "pass a tol between 0 and 1, at least one iteration, and no negative oversample"
        )

    blocks = [Block.of(W) for W in matrices]
    results: dict[int, Triplets] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (W, start) in enumerate(zip(matrices, starts, strict=True)):
        width = min(k + oversample, *W.shape)
        use_warm = start is not None and method != "randomized" and start.basis.shape[-1] >= width
        small = min(W.shape) <= (_EXACT_UP_TO_WARM if use_warm else _EXACT_UP_TO_COLD)
        place = (blocks[i].row_groups, blocks[i].column_groups)
        if method == "exact" and blocks[i].groups:
            raise InputError(
                f"{labels[i]} is sharded, and an exact SVD needs all of it; leave out method, or gather it"
            )
        if method == "exact" or (method == "auto" and small and not blocks[i].groups):
            results[i] = _exact(blocks[i].local, width, k, labels[i])
        else:
            local = blocks[i].local
            groups.setdefault((tuple(W.shape), local.dtype, local.device, place, use_warm), []).append(i)
    with _full_precision([block.local for block in blocks]):
        for (*_, use_warm), members in groups.items():
            for first in range(0, len(members), _GROUP_SIZE):
                chunk = members[first : first + _GROUP_SIZE]
                Ws_names = [blocks[i] for i in chunk], [labels[i] for i in chunk]
                group = _Group(*Ws_names, k, oversample, tol, max_iterations, seed)
                warm_ones = [start for i in chunk if (start := starts[i]) is not None] if use_warm else None
                results.update(zip(chunk, group.solve(warm_ones), strict=True))
    return [results[i] for i in range(len(matrices))]


def singular_values(W: Tensor) -> Tensor:
    """All singular values, largest first, from an exact decomposition: not for a training loop.

    Args:
        W: ``[..., m, n]``, as in `top_singular`, whose errors it raises.

    Returns:
        ``[..., min(m, n)]``.
    """
    _check_matrix(W, "W")
    _require_finite(W.detach(), "W")
    return torch.linalg.svdvals(W.detach().to(_work_dtype(W.dtype)))


class _Group:
    """Matrices of one shape, dtype and device, iterated together: each leaves when it has converged."""

    def __init__(
        self, Ws: list[Block], names: list[str], k: int, oversample: int, tol: float, max_iterations: int, seed: int
    ) -> None:
        self.Ws, self.names, self.k, self.tol, self.max_iterations, self.seed = Ws, names, k, tol, max_iterations, seed
        self.m, self.n = Ws[0].shape
        self.dtype, self.device = _work_dtype(Ws[0].local.dtype), Ws[0].local.device
        self.width = min(k + oversample, self.m, self.n)
        self.steps = [0] * len(Ws)
        self.edges: dict[int, Tensor] = {}  # for matrices that continue from a warm start
        self.done: dict[int, Triplets] = {}

    def solve(self, starts: list[Triplets] | None) -> list[Triplets]:
        """Iterate from the last triplets, or from a random block (None). Unconverged matrices get an exact SVD."""
        self.edges = {} if starts is None else {i: start.edge.to(self.device) for i, start in enumerate(starts)}
        active = list(range(len(self.Ws)))
        V = self._random_block(self.width).repeat(len(active), 1, 1) if starts is None else self._warm_block(starts)
        while active:
            Y, Z = power_steps([self.Ws[i] for i in active], V)
            for i in active:
                self.steps[i] += 1
            if refused := self._out_of_range(active, Y):
                self.done.update({active[row]: self._exactly(active[row]) for row in refused})
                kept = [row for row in range(len(active)) if row not in refused]
                active, V, Y, Z = [active[row] for row in kept], V[kept], Y[kept], Z[kept]
                if not active:
                    break
            U, S, V_new, residual, well = rayleigh_ritz(V, Y, Z, self.k)
            for row, sound in enumerate(well.tolist()):
                if not sound:
                    found = rayleigh_ritz_qr(self.Ws[active[row]], V[row], self.k)
                    U[row], S[row], V_new[row], residual[row] = found
            V = V_new
            del Y, Z, V_new
            left = self._continue(active, U, S, V, residual)
            active, V = [active[row] for row in left], V[left] if left else V
        return [self.done[i] for i in range(len(self.Ws))]

    def _out_of_range(self, active: list[int], Y: Tensor) -> list[int]:
        """Rows whose weight needs LAPACK, which scales first. Refuses NaN and Inf, which show in the products."""
        refused = []
        for row, size in enumerate(torch.linalg.vector_norm(Y, dim=(1, 2)).tolist()):
            if not _SAFE_PRODUCT[0] < size < _SAFE_PRODUCT[1]:
                W, name = self.Ws[active[row]], self.names[active[row]]
                largest = _require_finite(W.local, name, W.groups)
                if largest > 0 or not math.isfinite(size):  # a zero weight is fine, a damaged warm start is not
                    refused.append(row)
        return refused

    def _continue(self, active: list[int], U: Tensor, S: Tensor, V: Tensor, residual: Tensor) -> list[int]:
        """Record the matrices that converged or used up their steps, filter the others (in V); returns their rows."""
        fix_signs(U, V[:, : self.k])
        left: list[int] = []
        for row, (i, rest) in enumerate(zip(active, residual.tolist(), strict=True)):
            u, s, v, edge = U[row], S[row, : self.k], V[row], self.edges.get(i)
            converged = rest <= self.tol
            if converged and (edge is None or bool(s[-1] >= edge)):
                if edge is None:
                    edge = S[row, -1] * (self.k < self.width < min(self.m, self.n))
                self.done[i] = Triplets(u.mT, s, v[: self.k].mT, residual[row], self.steps[i], False, 0, v.mT, edge)
                continue
            if self.steps[i] >= self.max_iterations:
                self.done[i] = (
                    self._exactly(i)
                    if not self.Ws[i].groups
                    else Triplets(u.mT, s, v[: self.k].mT, residual[row], self.steps[i], False, 1, v.mT, S[row, -1])
                )
                continue
            left.append(row)
            if converged:  # these are singular triplets, but larger ones may lie outside the block
                V[row] = self._random_block(self.width)
                del self.edges[i]
            elif edge is None or self.steps[i] > 1:
                most = self.max_iterations - self.steps[i] - 1
                degree = min(filter_degree(S[row].tolist(), self.k, rest, self.tol), most)
                if degree > 1:
                    V[row] = filtered(self.Ws[i], V[row], S[row], degree)
                    self.steps[i] += degree
            # else: a change of the weight causes errors in all directions; one more plain step removes most of them
        return left

    def _exactly(self, i: int) -> Triplets:
        if self.Ws[i].groups:
            raise InputError(
                f"{self.names[i]} has values beyond {_SAFE_PRODUCT[1]:.0e} or none above {_SAFE_PRODUCT[0]:.0e}, which "
                "only an unsharded weight may; rescale it, or condition before sharding"
            )
        found = _exact(self.Ws[i].local, self.width, self.k, self.names[i])
        found.iterations, found.fallbacks = self.steps[i], 1
        return found

    def _random_block(self, width: int) -> Tensor:
        """``[width, n]`` orthonormal rows; the same for every matrix of the shape, whatever group it is in."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randn(width, self.n, generator=generator, device="cpu")
        return torch.linalg.qr(rows.mT).Q.mT.to(self.device, self.dtype).contiguous()

    def _warm_block(self, starts: list[Triplets]) -> Tensor:
        """The final blocks of the last results, ``[B, width, n]``, with noise added to their last row."""
        V = torch.stack([start.basis.mT[: self.width].to(self.device, self.dtype) for start in starts])
        if self.width in (self.k, self.n):
            return V  # no spare row, or the block is the whole space
        # The signs depend on the state: every refresh gets other noise, and the same call gets the same.
        noise = torch.copysign(self._random_block(1), V[:, -1:].roll(1, dims=-1))
        kept = V[:, :-1]
        noise = noise - (noise @ kept.mT) @ kept  # orthogonal to the others, so that converged rows stay converged
        last = V[:, -1:] + _STIR * noise
        V[:, -1:] = last / torch.linalg.vector_norm(last, dim=-1, keepdim=True)
        return V


def _exact(W: Tensor, width: int, k: int, name: str) -> Triplets:
    """LAPACK's SVD, in the tall orientation, which it decomposes about twice as fast."""
    _require_finite(W, name)
    A = W.to(_work_dtype(W.dtype))
    tall = A.shape[0] >= A.shape[1]
    left, S, right = torch.linalg.svd(A if tall else A.mT, full_matrices=False)
    U, V = (left.mT, right) if tall else (right, left.mT)
    U, V = U[:k].contiguous(), V[:width].contiguous()
    fix_signs(U, V[:k])
    zero = torch.zeros((), dtype=S.dtype, device=S.device)
    edge = S[width].clone() if k < width < len(S) else zero
    return Triplets(U.mT, S[:k].clone(), V[:k].mT, zero, 0, True, 0, V.mT, edge)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def _full_precision(matrices: Sequence[Tensor]) -> Iterator[None]:
    """Switch off autocast and reduced-precision products, under which the residual could never reach ``tol``."""
    with contextlib.ExitStack() as stack:
        for kind in {W.device.type for W in matrices}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        yield


def _require_finite(W: Tensor, name: str, groups: Groups = ()) -> float:
    """The largest magnitude in W, after refusing NaN and Inf. Of a sharded W, that of all ranks."""
    low, high = (float(x) for x in torch.aminmax(W)) if W.numel() else (0.0, 0.0)
    sound = math.isfinite(low) and math.isfinite(high)
    told = torch.tensor([max(-low, high) if sound else 0.0, float(not sound)], device=W.device)
    largest, damaged = all_reduce(told, groups, "max").tolist() if groups else (max(-low, high), not sound)
    if not damaged:
        return largest
    bad = (~torch.isfinite(W)).nonzero()
    found = f"{len(bad)} NaN or Inf of {W.numel()} values, the first at {bad[0].tolist()}" if len(bad) else "NaN or Inf"
    raise InputError(
        f"{name} holds {found}{' in one of its shards' if groups else ''}; "
        "reload the checkpoint, or lower the learning rate if training diverged"
    )


def _check_matrix(W: Tensor, name: str) -> None:
    if W.ndim < 2 or W.numel() == 0:
        raise InputError(f"{name} has shape {list(W.shape)}; pass a matrix [m, n] with at least one row and column")
    if W.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{name} is {W.dtype}; pass float64, float32, bfloat16 or float16 (W.float() converts)")
    if W.layout != torch.strided or W.device.type == "meta":
        raise InputError(f"{name} is a {W.layout} tensor on {W.device}; pass a dense one that holds its values")


def _check_arguments(
    Ws: Sequence[Tensor | Block], names: Sequence[str], starts: Sequence[Triplets | None], k: int, method: str
) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if not len(names) == len(starts) == len(Ws):
        raise InputError(f"{len(Ws)} matrices, {len(starts)} warm starts and {len(names)} names; pass one per matrix")
    for W, name, start in zip(Ws, names, starts, strict=True):
        if not isinstance(W, Block):
            if W.ndim != 2:
                raise InputError(f"{name} has shape {list(W.shape)}; pass a matrix [m, n], such as weight.flatten(1)")
            _check_matrix(W, name)
        if not 1 <= k <= min(W.shape):
            raise InputError(
                f"k is {k}, and {name} of shape {list(W.shape)} has {min(W.shape)} singular values; "
                f"pass k between 1 and {min(W.shape)}"
            )
        if start is None and method == "warm":
            raise InputError(f'{name} has no earlier triplets, which method="warm" needs; pass warm, or method="auto"')
        if start is not None and (start.U.shape[-2], *start.basis.shape[:-1]) != (W.shape[0], W.shape[1]):
            theirs = [start.U.shape[-2], start.basis.shape[-2]]
            raise InputError(f"{name} has shape {list(W.shape)}, its warm triplets are of {theirs}; pass its own")
