"""PCDR: the share of a weight's outlier activations that comes from its leading components.

The principal component dominance ratio of a weight ``W`` with singular triplets ``(sigma_r, u_r, v_r)`` over its
outputs ``A_ij = sum_r sigma_r u_ri (v_r . x_j)`` is, from "Selective Spectral Decay" (arXiv 2602.14432),

    PCDR_k = sum over outliers of |sum_{r<=k} sigma_r u_ri (v_r . x_j)|  /  sum over outliers of |A_ij|.

Which activations count as outliers is our choice: the top fraction (1e-5) of ``|A|``, at least 16 entries, of every
batch. An average over all entries would divide by outputs near zero. The denominator is the activation itself, so the
leading triplets suffice. Values above 1 are possible: the leading components overshoot and others cancel them.

Shapes: N tokens (rows), O outputs, I inputs, K components, E outlier entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2d.distributed.sharding import Groups, Part, all_reduce
from s2d.errors import InputError
from s2d.spectral.statistics import OUTLIER_FRACTION, _pieces, outlier_entries, token_rows
from s2d.spectral.svd import top_singular
from s2d.spectral.triplets import Triplets


@dataclass
class Dominance:
    """PCDR_1..K of one weight, streamed over batches in memory that does not grow.

    Attributes:
        triplets: The leading triplets of the weight, K of them.
        fraction: The share of each batch's activations that are outliers.
    """

    triplets: Triplets
    fraction: float = OUTLIER_FRACTION

    def __post_init__(self) -> None:
        self._explained = torch.zeros_like(self.triplets.S)
        self._total = torch.zeros((), dtype=self.triplets.S.dtype, device=self.triplets.S.device)

    def update(self, X: Tensor, Y: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            X: Inputs of the weight, ``[..., I]``.
            Y: Its outputs without bias, ``[..., O]``.
            mask: ``[...]``, true for real tokens.
        """
        X_NI, Y_NO = token_rows(X.detach(), mask), token_rows(Y.detach(), mask)
        if len(Y_NO) == 0:
            return
        row_E, column_E = outlier_entries(Y_NO, self.fraction)
        self.add(X_NI[row_E], Y_NO[row_E, column_E], column_E)

    def add(self, X_EI: Tensor, value_E: Tensor, column_E: Tensor) -> None:
        """Add outlier entries that are already known: their inputs, values and output channels."""
        dtype = self.triplets.S.dtype
        part_EK = (X_EI.to(dtype) @ self.triplets.V) * self.triplets.S * self.triplets.U[column_E]
        self._explained += part_EK.cumsum(-1).abs().sum(0)
        self._total += value_E.to(dtype).abs().sum()

    def ratios(self) -> Tensor:
        """PCDR_1..K over everything seen, ``[K]``; zeros if every activation was zero."""
        return self._explained / self._total if self._total > 0 else torch.zeros_like(self._explained)


@torch.no_grad()
def pcdr(
    W: Tensor,
    X: Tensor,
    k: int = 3,
    mask: Tensor | None = None,
    *,
    fraction: float = OUTLIER_FRACTION,
    triplets: Triplets | None = None,
) -> Tensor:
    """PCDR_1..k of a weight over the outliers of ``X W^T``.

    Args:
        W: ``[O, I]``.
        X: Inputs ``[..., I]``.
        k: How many leading components.
        mask: ``[...]``, true for real tokens.
        fraction: The share of ``|X W^T|`` that are outliers (at least 16 entries).
        triplets: The leading triplets of ``W``, if they are known.

    Returns:
        ``[k]``. 1 means that the first k components alone make the outliers.

    Raises:
        InputError: The shapes do not fit, or an input is not finite.
    """
    if X.shape[-1] != W.shape[-1]:
        raise InputError(
            f"inputs of width {X.shape[-1]} do not fit a weight of shape {list(W.shape)}; W is [out, in], X [..., in]"
        )
    if mask is not None and mask.shape != X.shape[:-1]:
        raise InputError(
            f"a mask of shape {list(mask.shape)} does not fit inputs of shape {list(X.shape)}; "
            "it has all but the last dimension"
        )
    found = top_singular(W, k) if triplets is None else triplets
    inputs = token_rows(X.detach(), mask).to(found.S.dtype)
    if not bool(torch.isfinite(inputs).all()):
        raise InputError("the inputs hold NaN or Inf; look for the first module whose output is not finite")
    dominance = Dominance(found, fraction)
    dominance.update(inputs, inputs @ W.detach().to(found.S.dtype).mT)
    return dominance.ratios()[:k]


@torch.no_grad()
def principal_components(
    Y_NO: Tensor,
    k: int,
    warm: Tensor | None = None,
    steps: int = 3,
    seed: int = 0,
    *,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Leading directions of the outputs: left singular vectors of ``W C^(1/2)``, C the second moment of the inputs.

    ``W C W^T`` is the second moment of the outputs, so no C is formed. Each step is two skinny products with ``Y``,
    taken in one pass. A decomposition of the result sorts the directions.

    Args:
        Y_NO: Outputs of a weight.
        k: How many directions.
        warm: Directions ``[O, k]`` of an earlier batch, to continue from.
        steps: Power steps; one is enough when warm.
        seed: Seed of the random start.
        bias: ``[O]``, subtracted from the outputs first.
        kept: Indices of the rows to use, see `kept_rows`; all by default.
        part: Which part of the outputs these are; all by default. The directions are those of the whole, and all its
            ranks must call this.

    Returns:
        Directions, orthonormal ``[O, k]``, in order of falling energy, and the root mean square ``[k]`` of the outputs
        along each (the singular values of ``W C^(1/2)``), float32.
    """
    part = Part(Y_NO.shape[1]) if part is None else part
    offset = None if bias is None else bias.float()
    if warm is None or warm.shape[1] != k:
        generator = torch.Generator().manual_seed(seed)
        U = torch.linalg.qr(torch.randn(part.width, k, generator=generator, device="cpu")).Q.to(Y_NO.device)
    else:
        U, steps = warm.to(Y_NO.device, torch.float32), 1
    energy = U.new_zeros(k)
    for _ in range(steps):
        V_KO = part.narrowed(U, 0).mT.contiguous()  # skinny products are much faster with their vectors as rows
        moment_KO = torch.zeros_like(V_KO)
        known_KN = projections(Y_NO, U, bias, kept, part).mT if part.column_groups else None
        first = 0
        for piece in _pieces(Y_NO, kept, offset):
            along = V_KO @ piece.mT if known_KN is None else known_KN[:, first : first + len(piece)]
            moment_KO.addmm_(along, piece)
            first += len(piece)
        moment_KO = all_reduce(part.widened(moment_KO), part.groups)
        U, energy, _ = torch.linalg.svd(moment_KO.mT, full_matrices=False)
    count = torch.tensor(len(Y_NO) if kept is None else len(kept), device=U.device)
    return U, (energy / all_reduce(count, part.row_groups).clamp_min(1)).sqrt()


def projections(
    Y_NO: Tensor, U_OK: Tensor, bias: Tensor | None = None, kept: Tensor | None = None, part: Part | None = None
) -> Tensor:
    """``(Y - bias) U`` over the rows of index `kept`, in one pass, ``[M, K]`` float32; U is that of all columns."""
    part = Part(Y_NO.shape[1]) if part is None else part
    V_KO, offset = part.narrowed(U_OK, 0).mT.contiguous(), None if bias is None else bias.float()
    parts = [V_KO @ piece.mT for piece in _pieces(Y_NO, kept, offset)]
    whole = all_reduce(torch.cat(parts, 1), part.column_groups) if parts else U_OK.new_zeros(U_OK.shape[1], 0)
    return whole.mT


def outlier_shares(part_EK: Tensor, value_E: Tensor, groups: Groups = ()) -> Tensor:
    """The share of the outlier entries that each output direction makes.

    Args:
        part_EK: The contribution of each direction to each entry, ``(u . y) u_o`` for an orthonormal ``u``.
        value_E: The entries.
        groups: Ranks with further entries.

    Returns:
        ``[K]``: sum of ``sign(A) * (component's part of A)`` over ``sum |A|``. The cumulative sum is PCDR in the metric
        of the data.
    """
    made, total = (part_EK * value_E.sign()[:, None]).sum(0), value_E.abs().sum()[None]
    made, total = all_reduce(torch.cat([made, total]), groups).split([len(made), 1])
    return made / total.clamp_min(torch.finfo(part_EK.dtype).tiny)
