"""Bias correction: rounding shifts the mean of each layer's output; the layer's bias takes the shift back.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv 1906.04721,
appendix D (with data): layer after layer, all layers before it rounded and corrected already,

    b <- b + E[y] - E[y^],    y the layer's output in the full-precision model, y^ in the quantized one

E is over all real tokens of the calibration data. Layers that read one activation (q, k, v) are corrected together.

Cost: some five passes of every block and a copy of the model while it works; nothing at run time. Left alone: layers
without a bias, layers outside the blocks, convolutions. When not to use it: ranges of tokens at 8 bits shift nothing.

Shapes: O outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2d.models.running import evaluating, real_tokens
from s2d.quant.calibration.observe import Job
from s2d.quant.calibration.walk import Block, Call, walk
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.numerics.quantizer import switched_on
from s2d.quant.ptq import register


@register(
    "bias-correction", "bias correction: each bias takes back the shift of its layer's mean", "correction", passes=5.0
)
def bias_correction(job: Job) -> None:
    """Correct every biased Linear of the blocks, in the order in which they run."""
    assert job.original is not None
    bare: list[str] = []
    for block in walk(job, reference=True):
        assert block.reference is not None
        layers = block.linears()
        bare += [name for name, layer in layers.items() if layer.bias is None]
        waiting = {name: layer for name, layer in layers.items() if layer.bias is not None}
        wanted, _ = means(block, {name: job.original.get_submodule(name) for name in waiting}, block.reference)
        while waiting:
            with switched_on(block.quantizers.values()), evaluating(block.module):
                found, first = means(block, {name: job.model.get_submodule(name) for name in waiting}, block.inputs)
            for name in first:
                correct(waiting.pop(name), wanted[name] - found[name])
            if not first:
                break  # never called with this data
    if bare:
        more = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
        warnings.warn(f"bias-correction: {bare[0]}{more} have no bias and are left as they are", stacklevel=2)


def correct(layer: QuantizedLinear, shift_O: Tensor) -> None:
    """Add the shift to the layer's bias, in place."""
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.add_(shift_O.to(layer.bias))


def means(block: Block, modules: Mapping[str, nn.Module], calls: list[Call]) -> tuple[dict[str, Tensor], list[str]]:
    """The mean output ``[O]`` (float64) of each module over the real tokens of all calls of its block.

    Args:
        block: The block, or that of the full-precision model runs in its place.
        modules: Modules inside one of the two, by name.
        calls: Calls of the one that they are inside.

    Returns:
        The means of those that ran, and the names of those that read the same as the first: no other ran before them.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    inputs: dict[str, Any] = {}  # of the first call; held, so that no other tensor takes the place of one

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            inputs.setdefault(name, args[0] if args else None)
            tokens = real_tokens(output, block.padding()(name, "output"), "input").flatten(0, -2).double()
            sums[name] = sums[name] + tokens.sum(0) if name in sums else tokens.sum(0)
            counts[name] = counts.get(name, 0) + len(tokens)

        return see

    original = block.job.original
    assert original is not None
    inside = {id(each) for each in block.module.modules()}
    own = all(id(each) in inside for each in modules.values())
    module = block.module if own else original.get_submodule(block.name)
    handles = [each.register_forward_hook(watch(name)) for name, each in modules.items()]
    try:
        for _ in block.stream(calls, module):
            pass
    finally:
        for handle in handles:
            handle.remove()
    read = next(iter(inputs.values()), None)
    first = [name for name, given in inputs.items() if given is read]
    return {name: total / counts[name] for name, total in sums.items()}, first
