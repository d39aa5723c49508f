"""Bias correction: behind it every layer's mean output is that of the full-precision model; padding does not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quant.tiny_families import Case
from torch import Tensor, nn

from s2d import quant
from s2d.models.running import run
from s2d.quant.modules.linear import QuantizedLinear


def mean_outputs(case: Case, model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Mean output of each named layer over the real tokens, by whole forwards of the model."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    mask: list[Tensor | None] = [None]

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            real = mask[0]
            rows[name].append(output.flatten(0, -2) if real is None else output[real])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(see(name)) for name in names]
    for batch in case.batches:
        given = batch.get("attention_mask") if isinstance(batch, dict) else None
        mask[0] = None if given is None else given.bool()
        run(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().mean(0) for name, parts in rows.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain-sdpa", "bert-sdpa", "vit-sdpa"])
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_every_mean_is_that_of_full_precision(make: Callable[[str], Case], name: str, rounding: str) -> None:
    case = make(name)
    shifts = []
    for method in (rounding, f"{rounding}+bias-correction"):
        model = quant.quantize(case.model, "w4a4", calibration=case.batches, method=method)
        inside = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.bias is not None}
        layers = [n for n in inside if any(part.isdigit() for part in n.split("."))]  # those of the blocks
        wanted = mean_outputs(case, case.model, layers)
        found = mean_outputs(case, model, layers)
        shifts.append(max(float((wanted[n] - found[n]).abs().max()) for n in layers))
    assert shifts[1] < 1e-4 < 1e-3 < shifts[0]


@torch.no_grad()
def test_saved_is_what_is_in_memory(make: Callable[[str], Case], tmp_path: Path) -> None:
    case = make("vit-sdpa")
    model = quant.quantize(case.model, "w4a8", calibration=case.batches, method="gptq+bias-correction")
    quant.save(model, tmp_path)
    assert torch.equal(case.output(quant.load(tmp_path, case.model)), case.output(model))


def test_layers_without_a_bias_are_named(make: Callable[[str], Case]) -> None:
    case = make("llama-sdpa")
    with pytest.warns(UserWarning, match="have no bias and are left as they are"):
        quant.quantize(case.model, "w4a8", calibration=case.batches, method="rtn+bias-correction")
