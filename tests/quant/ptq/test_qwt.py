"""QwT: least squares against numpy's, on the inputs of the quantized blocks and the outputs of the original ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.quant.tiny_models import Case
from torch import Tensor, nn

from s2d import quant
from s2d.checkpoint import load, save
from s2d.quant.calibration.corrections import RIDGE, Moments
from s2d.quant.modules.online import OnlineBlock
from s2d.quant.ptq.qwt import compensation, with_ones


def lstsq(x: Tensor, y: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Numpy's solution of ``y = C x + c``; the ridge as rows below the data, with nothing to give."""
    extended = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    weight = (ridge * extended.square().sum(0).mean()).sqrt() * torch.eye(extended.shape[1])
    below = torch.zeros(extended.shape[1], y.shape[1])
    solved = numpy.linalg.lstsq(torch.cat([extended, weight]).numpy(), torch.cat([y.double(), below]).numpy())[0]
    return torch.from_numpy(solved[:-1].T.copy()), torch.from_numpy(solved[-1].copy())


@pytest.mark.parametrize("ridge", [1e-12, 0.1])
def test_the_compensation_is_numpys_least_squares(ridge: float) -> None:
    torch.manual_seed(0)
    x, error = torch.randn(200, 6) * torch.tensor([9.0, 1, 1, 1, 1, 0.2]) + 1.0, torch.randn(200, 6)
    moments = Moments("block")
    for part, other in zip(x.split(70), error.split(70), strict=True):
        moments.take(with_ones(part), other)
    found = compensation(moments, ridge)
    assert found is not None
    for value, expected in zip(found, lstsq(x, error, ridge), strict=True):
        assert torch.allclose(value, expected, atol=1e-5)


def calls(model: nn.Module, block: nn.Module, batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """What a block takes and gives, over the tokens that no mask hides, ``[N, D]`` each."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((hidden, output if isinstance(output, Tensor) else output[0]))

    handle = block.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    real = [batch.get("attention_mask", torch.ones(seen[0][0].shape[:2])).bool() for batch in batches]
    x, y = ([each[mask] for each, mask in zip(side, real, strict=True)] for side in zip(*seen, strict=True))
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize(("name", "path"), [("plain-sdpa", "blocks"), ("bert-sdpa", "encoder.layer")])
def test_each_block_is_compensated_behind_those_before_it(make: Callable[[str], Case], name: str, path: str) -> None:
    case = make(name)
    model = quant.quantize(case.model, "w4a4", calibration=case.batches, method="qwt")
    assert quant.record(model).method == "rtn+qwt"
    for index, block in enumerate(model.get_submodule(path)):
        assert isinstance(block, OnlineBlock)
        original = case.model.get_submodule(f"{path}.{index}")
        _, wanted = calls(case.model, original, case.batches)
        x, compensated = calls(model, block, case.batches)
        C, c = block.compensation, block.compensation_bias
        block.compensation = block.compensation_bias = None
        _, rounded = calls(model, block, case.batches)
        block.compensation, block.compensation_bias = C, c
        for value, expected in zip((C, c), lstsq(x, wanted - rounded, RIDGE), strict=True):
            assert torch.allclose(value, expected.float(), atol=1e-4)
        assert (wanted - compensated).square().sum() < (wanted - rounded).square().sum()


@torch.no_grad()
@pytest.mark.parametrize("rounding", ["rtn", "erq", "rotation+gptq"])
def test_saved_is_what_is_in_memory_and_taken_out_leaves_the_plain_model(
    make: Callable[[str], Case], tmp_path: Path, rounding: str
) -> None:
    case = make("vit-sdpa")
    model, without = (
        quant.quantize(case.model, "w4a8", calibration=case.batches, method=method)
        for method in (f"{rounding}+qwt", rounding)
    )
    quant.save(model, tmp_path)
    assert torch.equal(case.output(quant.load(tmp_path, case.model)), case.output(model))
    compensated, rounded = ((case.output(each) - case.output()).norm() for each in (model, without))
    assert compensated < rounded
    quant.remove(model)
    assert not any(isinstance(module, OnlineBlock) for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in case.model.modules()]
    if rounding == "rtn":
        assert torch.equal(case.output(model), case.output())


def test_a_timm_model_with_compensation_comes_back(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    images = [(torch.randn(4, 3, 16, 16),) for _ in range(2)]
    quantized = quant.quantize(model, "w4a8", calibration=images, method="qwt")
    save(quantized, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").model(images[0][0]), quantized(images[0][0]))
