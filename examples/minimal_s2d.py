"""Selective Spectral Decay in one file: the algorithm of the paper, to read or to copy. Plain PyTorch, nothing else.

"Selective Spectral Decay" (S2D), arXiv 2602.14432. A Linear with W = sum_r sigma_r u_r v_r^T maps x to A = W x. Where
its largest activations come from the first singular components alone, these are penalised during fine-tuning:

    PCDR_k = sum_E |sum_{r<=k} sigma_r u_r[o] (v_r . x)| / sum_E |A|        over the outliers E of a batch
    k      = the smallest k <= 3 with PCDR_k >= 0.95, otherwise 0           every 100 steps
    L      = L_task + lambda / (n + 1) * sum_{r<=k} sigma_r^(n+1)           n = 2, lambda = 5e-4
    dL/dW  = dL_task/dW + lambda * sum_{r<=k} sigma_r^n u_r v_r^T           added before every step of the optimizer

Usage, between the backward pass and the step (after unscaling and clipping, if you do so):

    s2d = S2D(model)
    loss.backward(); s2d.add_gradients(); optimizer.step(); optimizer.zero_grad()

The paper leaves two things open. Which activations are outliers: here the largest 1e-5 of a layer's |A|, at least 16.
And what sigma_r is between two SVDs: here u_r . W v_r, as a stale one would overshoot.

The package s2d trains the same by SelectiveSpectralDecay(model, optimizer, preset="paper"), a test compares them; it
adds what a file of this size leaves out: padding, convolutions, fused qkv, many GPUs, and SVDs that cost little.

Shapes: N tokens, O outputs, I inputs, K components, E outliers.
"""

import math

import torch
from torch import Tensor, nn


def outliers(A_NO: Tensor, fraction: float = 1e-5, fewest: int = 16) -> tuple[Tensor, Tensor]:
    """Rows and columns [E] of the activations of largest magnitude."""
    count = min(max(math.ceil(fraction * A_NO.numel()), fewest), A_NO.numel())
    flat_E = A_NO.abs().flatten().topk(count).indices
    return flat_E // A_NO.shape[1], flat_E % A_NO.shape[1]


def pcdr(U_OK: Tensor, S_K: Tensor, V_IK: Tensor, X_EI: Tensor, A_E: Tensor, column_E: Tensor) -> Tensor:
    """PCDR_1..K [K]: the share of the outliers A_E that the first 1..K components make; above 1 they overshoot."""
    part_EK = (X_EI @ V_IK) * S_K * U_OK[column_E]
    return part_EK.cumsum(1).abs().sum(0) / A_E.abs().sum().clamp_min(1e-30)


class S2D:
    """Adds the gradient of the selective spectral penalty to the Linears of a model."""

    def __init__(
        self,
        model: nn.Module,
        strength: float = 5e-4,  # lambda
        power: float = 2.0,  # n; 1 is L2 decay of the selected components
        threshold: float = 0.95,  # tau
        max_rank: int = 3,  # K_max
        refresh_every: int = 100,  # m, steps between two SVDs
    ) -> None:
        self.strength, self.power, self.threshold = strength, power, threshold
        self.max_rank, self.refresh_every = max_rank, refresh_every
        self.layers = {
            name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad
        }
        self.selected: dict[str, tuple[Tensor, Tensor]] = {}  # u [O, k] and v [I, k] of the layers that need it
        self.step_count = 0
        self._watch()

    def _watch(self) -> None:
        """Have every layer keep its outliers, until the next step."""
        self.seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in self.layers}
        self.handles = [m.register_forward_hook(self._keep(self.seen[name])) for name, m in self.layers.items()]

    @staticmethod
    def _keep(seen: list[tuple[Tensor, Tensor, Tensor]]):
        @torch.no_grad()
        def hook(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            if output.requires_grad:  # a training pass
                X_NI, Y_NO = inputs[0].flatten(0, -2), output.flatten(0, -2)
                row_E, column_E = outliers(Y_NO)
                bias_E = 0.0 if layer.bias is None else layer.bias[column_E]  # no component of W makes it
                seen.append((X_NI[row_E], Y_NO[row_E, column_E] - bias_E, column_E))

        return hook

    @torch.no_grad()
    def _select(self) -> None:
        """SVD and PCDR of every layer, for the batches since the last step."""
        for handle in self.handles:
            handle.remove()
        self.selected = {}
        for name, seen in self.seen.items():
            if seen:
                U, S, Vh = torch.linalg.svd(self.layers[name].weight, full_matrices=False)
                U_OK, S_K, V_IK = U[:, : self.max_rank], S[: self.max_rank], Vh[: self.max_rank].mT
                enough_K = pcdr(U_OK, S_K, V_IK, *map(torch.cat, zip(*seen, strict=True))) >= self.threshold
                if enough_K.any():
                    k = int(enough_K.int().argmax()) + 1  # the first that is true
                    self.selected[name] = U_OK[:, :k].clone(), V_IK[:, :k].clone()

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Call it after `backward` and before the optimizer's `step`."""
        if self.step_count % self.refresh_every == 0:
            self._select()
        for name, (U_Ok, V_Ik) in self.selected.items():
            W_OI = self.layers[name].weight
            if W_OI.grad is None:  # it took no part in this step
                continue
            sigma_k = (U_Ok * (W_OI @ V_Ik)).sum(0).clamp_min(0)
            W_OI.grad += self.strength * (U_Ok * sigma_k**self.power) @ V_Ik.mT
        self.step_count += 1
        if self.step_count % self.refresh_every == 0:
            self._watch()
