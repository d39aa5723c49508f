"""What methods add to a forward: exact, copied, pickled, converted and resumed with the model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tests.quant.tiny_families import apart, build, job
from torch import nn

from s2d.errors import InputError
from s2d.quant import quantize
from s2d.quant.modules import online
from s2d.quant.modules.linear import QuantizedLinear, swap_in
from s2d.quant.numerics.hadamard import factors
from s2d.quant.ptq import svdquant

pytestmark = pytest.mark.filterwarnings("ignore:.*is post-norm")
METHODS = ["smoothquant", "rotation", "svdquant", "rotation+awq+svdquant"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svdquant, "STRENGTHS", (0.5,))
    monkeypatch.setattr("s2d.quant.ptq.awq.STEPS", 2)


@torch.no_grad()
def test_a_linear_with_everything_is_the_plain_linear() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 20).double(), torch.randn(5, 48, dtype=torch.float64)
    weight, wanted = layer.weight.clone(), layer(x)
    swap_in(layer, QuantizedLinear, {"weight_quantizer": None, "input_quantizer": None}, "layer")
    added = online.make_online(layer)
    assert added is layer and online.make_online(layer) is layer and torch.equal(layer(x), wanted)
    added.rotate_input(*factors(48))
    assert torch.allclose(layer(x), wanted, atol=1e-12)
    assert torch.allclose(added.transform_input(x).norm(dim=1), x.norm(dim=1))
    for seed in (0, 1):  # scales multiply
        added.smooth_input(torch.rand(48, generator=torch.Generator().manual_seed(seed)).double() + 0.5)
    added.split_off(torch.randn(3, 48).double(), torch.randn(20, 3).double())
    assert torch.allclose(layer(x), wanted, atol=1e-12)
    assert torch.allclose(added.plain_weight(), weight, atol=1e-12)
    assert online.describe(nn.Sequential(layer)) == {
        "0": {"left": [12, 12], "right": [4, 4], "smooth": [48], "down": [3, 48], "up": [20, 3]}
    }
    online.detach(nn.Sequential(layer))
    assert torch.allclose(layer(x), wanted, atol=1e-12) and set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_copies_and_pickles(name: str, method: str) -> None:
    case = build(name)
    quantized = quantize(case.model, "w4a4", calibration=case.batches, method=method)
    output = case.output(quantized)
    assert torch.equal(case.output(copy.deepcopy(quantized)), output)
    assert torch.equal(case.output(pickle.loads(pickle.dumps(quantized))), output)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_sixteen_bit_models(name: str, method: str) -> None:
    case = build(name)
    plain = case.output()
    model = copy.deepcopy(case.model).bfloat16()
    batches = [{k: v.bfloat16() if k == "pixel_values" else v for k, v in batch.items()} for batch in case.batches]
    quantized = quantize(model, "w8a8", calibration=batches, method=method)
    assert apart(case.output(quantized, batches[0]).float(), plain) < 0.3
    assert {p.dtype for p in quantized.parameters()} == {torch.bfloat16}


def test_a_quantized_model_can_be_converted() -> None:
    case = build("vit")
    quantized = quantize(case.model, "w8a8", calibration=case.batches, method="rotation+svdquant")
    single = case.output(quantized)
    assert (
        apart(case.output(quantized.double(), {"pixel_values": case.batches[0]["pixel_values"].double()}), single) < 0.1
    )


@pytest.mark.parametrize("method", ["svdquant+gptq", "rotation+gptq"])
def test_an_interrupted_call_goes_on(method: str, tmp_path: Path) -> None:
    case = build("vit")
    whole = quantize(case.model, "w4a4", calibration=case.batches, method=method)
    for _ in range(2):
        again = quantize(case.model, "w4a4", calibration=case.batches, method=method, resume=tmp_path)
        assert torch.equal(case.output(again), case.output(whole))


def test_described_work_that_does_not_fit_is_refused() -> None:
    work = job(build("vit"))
    for described, message in [
        ({"layers.9.mlp": {"left": [1, 1]}}, r"layers\.9\.mlp, which this model does not have"),
        ({"layers.0.layernorm_after": {"left": [1, 1]}}, "where it cannot be"),
    ]:
        with pytest.raises(InputError, match=message):
            online.attach(work.model, described)
