"""R of every block against the definition, written out for a model whose blocks can be run by hand."""

from __future__ import annotations

import pytest
import torch
from tests.quant.tiny_models import PlainTransformer
from torch import Tensor

import s2d
from s2d import quant
from s2d.audit.findings import Audit
from s2d.audit.rounded_copy import propagated_errors
from s2d.quant.spec import QuantSpec


@torch.no_grad()
def test_r_is_the_relative_squared_error_of_a_token_behind_each_block() -> None:
    torch.manual_seed(0)
    model = PlainTransformer().eval()
    batches = [torch.randn(size, 7, 16) * torch.rand(size, 7, 1) for size in (2, 5)]  # tokens of all lengths
    found = propagated_errors(model, iter(batches), QuantSpec.parse("w4a4"))
    rounded = quant.quantize(model, "w4a4", calibration=batches)
    plain, low = torch.cat(batches), torch.cat(batches)
    for index, (block, other) in enumerate(zip(model.blocks, rounded.blocks, strict=True)):
        plain, low = block(plain), other(low)
        shares: Tensor = (low - plain).square().sum(-1) / plain.square().sum(-1)
        assert found[f"blocks.{index}"] == pytest.approx(shares.mean().item(), rel=1e-4)


def test_an_audit_gives_each_weight_the_r_of_its_block() -> None:
    torch.manual_seed(0)
    model, batches = PlainTransformer().eval(), [torch.randn(4, 7, 16) for _ in range(2)]
    audit = s2d.audit(model, batches, propagation=True)
    expected = propagated_errors(model, batches, QuantSpec.parse("w4a4"))
    for row in audit.rows:
        block = ".".join(row.weight.split(".")[:2])
        assert row.propagated == expected.get(block)
    assert audit.run["propagated"] == expected and list(expected) == ["blocks.0", "blocks.1"]
    assert Audit.from_json(audit.to_json()).rows == audit.rows
    assert any(column.header == "R" for column in audit.table().columns)
    assert all(row.propagated is None for row in s2d.audit(model, batches).rows)
