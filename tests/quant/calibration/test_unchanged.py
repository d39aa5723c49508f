"""Folds are confirmed by the outputs of the model and of every block; what the graph contradicts is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quant.tiny_families import build, job
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant import quantize
from s2d.quant.calibration.unchanged import function_kept


@torch.no_grad()
@pytest.mark.parametrize(("factor", "kept"), [(1.0 + 3e-6, True), (1.0 + 3e-5, False)])
def test_outputs_may_change_by_a_hundred_thousandth(factor: float, kept: bool) -> None:
    work = job(build("vit"))
    changing = function_kept(work, "somemethod")
    changing.__enter__()
    work.model.layers[1].mlp.fc2.weight.mul_(factor)
    work.model.layers[1].mlp.fc2.bias.mul_(factor)
    work.model.layers[1].attention.o_proj.weight.mul_(factor)
    if kept:
        changing.__exit__(None, None, None)
    else:
        with pytest.raises(InputError, match=r"somemethod would change what ViTModel computes \(layers\.1 by"):
            changing.__exit__(None, None, None)


@torch.no_grad()
def test_a_head_that_hides_its_blocks_hides_no_fold() -> None:
    case = build("timm-vit")
    case.model.head.weight.zero_()  # as EVA-02 begins: the bias alone is the output
    plain = case.output()
    work = job(case)
    with pytest.raises(InputError, match=r"\(blocks\.0 by"), function_kept(work, "somemethod"):
        work.model.blocks[0].norm1.weight.mul_(2.0)
        assert torch.equal(case.output(work.model), plain)


class WithCache(nn.Module):
    """Returns its keys and values, by the new name, as a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> dict[str, Any]:
        made = self.inner(**{**batch, "use_cache": True})
        cache = next(value for value in made.values() if hasattr(value, "layers"))
        return {"logits": made["logits"], "cache": tuple((layer.keys, layer.values) for layer in cache.layers)}


def test_scaled_values_in_a_cache_are_no_change() -> None:
    case = build("llama")
    quantize(WithCache(case.model).eval(), "w8a8", calibration=case.batches, method="smoothquant")


def another_layer(model: nn.Module, extra: Any) -> None:
    """Give the blocks of a ViT a forward with something more in it."""
    plain = type(model.layers[0])

    class Layer(plain):  # type: ignore[misc,valid-type]
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return extra(self, hidden, plain.forward(self, hidden, *args, **kwargs))

    for layer in model.layers:
        layer.__class__ = Layer


def test_a_second_reader_of_the_stream_is_named() -> None:
    case = build("vit")
    another_layer(case.model, lambda layer, hidden, output: output + 0.1 * hidden.tanh())
    with pytest.raises(InputError, match=r"stream of layers\.0 to layers\.1: tanh in layers\.[01] reads it as well"):
        quantize(case.model, "w8a8", calibration=case.batches, method="rotation")


def test_a_bias_that_something_else_reads_takes_no_shift() -> None:
    case = build("vit")
    another_layer(case.model, lambda layer, hidden, output: output + layer.layernorm_before.bias)
    with pytest.raises(InputError, match=r"repq would change what ViTModel computes \(layers\.0 by"):
        quantize(case.model, "w4a4", calibration=case.batches, method="repq")
