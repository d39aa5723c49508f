"""How the error of a rounded model grows from block to block: R of "Beyond Outliers".

Vlassis et al., ICLR 2026, arXiv 2509.23500: with h_l what block l gives at full precision and h^q_l when rounded,

    R_l = mean over tokens of |h^q_l - h_l|^2 / |h_l|^2

Over models of six optimizers, R_L of the last block foretold the score after rounding (correlation -0.89), where the
largest value over the mean, and kurtosis, did not. The paper's parts of R_l (what came in, what the
block added) are not computed. The formula was read in secondary sources, not in the paper itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from s2d.models.blocks import blocks_of
from s2d.models.masks import token_mask
from s2d.models.running import evaluating, main_output, real_tokens, run
from s2d.models.tracing import trace, unwrapped
from s2d.quant import quantize
from s2d.quant.spec import QuantSpec


def propagated_errors(model: nn.Module, batches: Iterable[Any], spec: QuantSpec) -> dict[str, float]:
    """R of every block, by name, in the order in which they run; everything rounded to nearest.

    Args:
        model: A plain model; it stays as it is.
        batches: They set the ranges, and they are compared.
        spec: What is rounded, with its observers.

    Raises:
        InputError: As `s2d.quantize`; among others attention that no plan covers.
    """
    batches, model = list(batches), unwrapped(model)
    graph = trace(model, batches[0])
    rounded = quantize(model, spec, calibration=batches)
    blocks = blocks_of(model, graph)
    total, tokens = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
    plain: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: plain.setdefault(name, []).append(main_output(output))

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            pair = (plain[name].pop(0), main_output(output))
            h, h_q = (real_tokens(each, mask(name, "output"), "input").flatten(0, -2).double() for each in pair)
            size = h.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            total[name] += float(((h_q - h).square().sum(-1) / size).sum())
            tokens[name] += len(h)

        return hook

    hooks = [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    hooks += [rounded.get_submodule(name).register_forward_hook(compare(name)) for name in blocks]
    try:
        with token_mask(rounded, graph) as mask, evaluating(model), evaluating(rounded):
            for index, batch in enumerate(batches):
                run(model, batch, index)
                run(rounded, batch, index)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total[name] / count for name, count in tokens.items() if count}
