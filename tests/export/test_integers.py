"""Codes of sites and of embedding tables, against the quantizers themselves and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import s2d
from s2d.errors import InputError
from s2d.export.integers import embedding_codes, integer_activation, integer_weight
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.numerics.quantizer import spread


class Mlp(nn.Module):
    """Two Linears in a numbered block, so that they are sites."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def integer_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantized(spec: object) -> nn.Module:
    torch.manual_seed(0)
    return s2d.quantize(Mlp(), spec, calibration=[{"x": torch.randn(8, 5, 64)}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "weight", [{}, {"granularity": "tensor"}, {"granularity": "group-32"}], ids=["channel", "tensor", "group"]
)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weight_codes_times_scales_are_what_the_quantizer_gives(bits: int, weight: dict[str, object]) -> None:
    model = quantized({"weight": {"bits": bits, **weight}, "activation": {"bits": 8}})
    layers = integer_layers(model)
    assert list(layers) == ["blocks.0.0", "blocks.0.2"]
    for layer in layers.values():
        assert layer.weight_quantizer is not None
        found = integer_weight(layer.weight, layer.weight_quantizer)
        assert found.codes.dtype == torch.int8 and int(found.codes.abs().max()) <= 2 ** (bits - 1) - 1
        values = found.codes.float() * spread(found.scale, layer.weight.shape)
        assert torch.equal(values, layer.weight_quantizer(layer.weight))


def test_activations_begin_at_zero_whether_signed_or_not() -> None:
    for format, top in (("uint4", 15), ("int4", 14)):
        model = quantized({"weight": {"bits": 4}, "activation": {"format": format}})
        quantizer = model.get_submodule("blocks.0.0").input_quantizer
        found = integer_activation(quantizer)  # type: ignore[arg-type]
        assert found.scale is not None and found.zero_point is not None
        x = torch.randn(4, 5, 64) * 3
        assert found.top == top
        codes = (torch.round(x / found.scale) + found.zero_point).clamp(0, top)
        torch.testing.assert_close((codes - found.zero_point) * found.scale, quantizer(x))  # type: ignore[operator]


@pytest.mark.parametrize(("spec", "nearest"), [("fp8", "w8a8"), ("mxfp4", "w4a4"), ("nvfp4", "w4a4")])
def test_formats_without_a_kernel_are_refused_with_the_nearest_that_has_one(spec: str, nearest: str) -> None:
    layer = next(iter(integer_layers(quantized(spec)).values()))
    with pytest.raises(InputError, match=rf"blocks\.0\.0.*nearest spec.*{nearest}"):
        integer_weight(layer.weight, layer.weight_quantizer)  # type: ignore[arg-type]


def test_embedding_rows_have_scales_of_their_own_at_8_bits() -> None:
    table = torch.randn(40, 48) * torch.logspace(-3, 3, 40)[:, None]
    found = embedding_codes(table, 8)
    torch.testing.assert_close(found.scale[:, 0], table.abs().amax(1) / 127)
    assert float(((found.codes * found.scale - table).abs() / found.scale).max()) <= 0.5 + 1e-4


def test_embedding_groups_of_columns_are_closer_than_rows_at_4_bits() -> None:
    torch.manual_seed(0)
    table = torch.randn(40, 96)
    table[:, 3] *= 20.0
    groups, rows = embedding_codes(table, 4), embedding_codes(table, 4, group=96)
    assert groups.scale.shape == (40, 3) and rows.scale.shape == (40, 1)

    def error(found: object) -> float:
        values = found.codes.float().unflatten(1, (found.scale.shape[1], -1)) * found.scale[..., None]  # type: ignore[attr-defined]
        return float((values.flatten(1) - table).square().sum())

    assert error(groups) < 0.5 * error(rows)
    assert embedding_codes(torch.randn(20, 33), 4).scale.shape == (20, 1)  # 32 does not divide 33
