"""Integer products of torch against the simulated model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quant import tiny_families

import s2d
from s2d.errors import InputError
from s2d.export.torch_int import TorchLinear, TorchOnlineLinear, integer_model


@pytest.mark.parametrize("spec", ["w4a4", "w4a8", "w8a8", {"weight": {"bits": 4}, "activation": {"format": "int8"}}])
@pytest.mark.parametrize(
    ("name", "method"), [("vit", "rtn"), ("bert", "rtn"), ("llama", "rtn"), ("outlying", "rotation")]
)
def test_each_product_is_that_of_the_simulated_layer(name: str, method: str, spec: Any) -> None:
    family = tiny_families.outlying() if name == "outlying" else tiny_families.build(name)
    model = s2d.quantize(family.model, spec, calibration=family.batches, method=method)
    made = integer_model(model)
    products = {name: each for name, each in made.named_modules() if isinstance(each, (TorchLinear, TorchOnlineLinear))}
    assert len(products) >= 12
    for name, product in products.items():
        layer: Any = model.get_submodule(name)
        with torch.no_grad():
            x = torch.randn(2, 9, layer.in_features) * 2
            expected, found = layer.quantized_product(x), product.quantized_product(x)
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


def test_the_whole_model_computes_the_same_and_the_original_stays() -> None:
    family = tiny_families.build("vit")
    model = s2d.quantize(family.model, "w8a8", calibration=family.batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = integer_model(model)(**family.batches[0]).last_hidden_state
        expected = model(**family.batches[0]).last_hidden_state
    assert float(torch.nn.functional.cosine_similarity(found.flatten(0, 1), expected.flatten(0, 1)).min()) > 0.999
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(InputError, match="not quantized"):
        integer_model(tiny_families.build("vit").model)
