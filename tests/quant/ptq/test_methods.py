"""Joining methods, the stages, and what a job offers them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from tests.quant.tiny_models import PlainTransformer
from torch import nn

from s2d.errors import InputError
from s2d.quant import methods, ptq, quantize, record
from s2d.quant.calibration.observe import Job
from s2d.quant.modules.sites import quantizers_of
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.ptq import get_methods, register


@pytest.fixture
def scaled() -> Iterator[str]:
    """A transform for the length of one test: halves what feeds fc2 and doubles its weight; fc1 is followed by GELU."""
    methods()

    @register("scaled", "doubles v and halves the projection", stage="transform")
    def scaled(job: Job) -> None:
        assert job.stage == "transform" and not any(quantizer.enabled for quantizer in job.quantizers.values())
        with torch.no_grad():
            for block in job.model.blocks:  # type: ignore[union-attr]
                block.attn.qkv.weight[32:] *= 2.0
                block.attn.qkv.bias[32:] *= 2.0
                block.attn.proj.weight /= 2.0

    yield "scaled"
    ptq._METHODS.drop("scaled")


def test_every_method_has_a_stage() -> None:
    stages = {name: entry.stage for name, entry in ptq._METHODS.all().items()}
    assert stages.keys() == methods().keys()
    assert set(stages.values()) == {"transform", "rounding", "correction"}
    assert stages["rtn"] == stages["gptq"] == "rounding"


def test_transforms_come_first_and_one_rounding_last(scaled: str) -> None:
    assert [entry.name for entry in get_methods("scaled")] == ["scaled", "rtn"]
    assert [entry.name for entry in get_methods(" scaled + gptq ")] == ["scaled", "gptq"]
    for text, message in (
        ("gptq+scaled", r"'gptq\+scaled': transforms come first.*; write scaled\+gptq"),
        ("rtn+gptq", "rtn and gptq both round the weights; choose one"),
        ("scaled+scaled", "names one method twice"),
        ("scaled+magic", "unknown quantization method 'magic'; choose from .*gptq.*, or join with +"),
        ("", "unknown quantization method ''"),
        ("gptq+", "unknown quantization method ''"),
    ):
        with pytest.raises(InputError, match=message):
            get_methods(text)


@torch.no_grad()
def test_a_joined_method_is_recorded_and_carried_out(scaled: str) -> None:
    torch.manual_seed(0)
    model, x = PlainTransformer().eval(), torch.randn(4, 7, 16)
    for method in ("scaled", "scaled+gptq"):
        quantized = quantize(model, "w8a8", calibration=[x], method=method)
        assert record(quantized).method == ("scaled+rtn" if method == "scaled" else method)
        assert not torch.equal(quantized.blocks[0].attn.qkv.weight[32:], model.blocks[0].attn.qkv.weight[32:])
        assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()
    plain = quantize(model, "w8a8", calibration=[x], method="rtn")
    assert torch.equal(plain.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_an_unknown_protocol() -> None:
    with pytest.raises(InputError, match="unknown protocol 'fair'; use own or unified"):
        quantize(PlainTransformer(), "w8a8", calibration=[torch.randn(2, 7, 16)], protocol="fair")


@torch.no_grad()
def test_the_unified_protocol_gives_every_rounding_the_same_activation_ranges() -> None:
    torch.manual_seed(0)
    model, x = PlainTransformer().eval(), [torch.randn(4, 7, 16) for _ in range(2)]
    ranges = []
    for method in ("rtn", "gptq", "gptaq"):
        quantized = quantize(model, "w4a8", calibration=x, method=method, protocol="unified")
        ranges.append({q.name: q.scale for q in quantizers_of(quantized) if not q.name.endswith("weight")})
    for other in ranges[1:]:
        assert ranges[0].keys() == other.keys()
        assert all(torch.equal(scale, other[name]) for name, scale in ranges[0].items())


def test_replacing_a_quantizer(scaled: str) -> None:
    del scaled
    replaced: list[str] = []

    class Doubling(Quantizer):
        def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * x

    @register("doubling", "for one test", stage="transform")
    def doubling(job: Job) -> None:
        for site, quantizer in list(job.quantizers.items()):
            if site.what in ("input", "probs"):
                job.replace_quantizer(site, Doubling(quantizer.format, "tensor", name=site.name))
                replaced.append(site.name)

    try:
        model = quantize(PlainTransformer().eval(), "w8a8", calibration=[torch.randn(2, 7, 16)], method="doubling")
    finally:
        ptq._METHODS.drop("doubling")
    found = [quantizer.name for quantizer in quantizers_of(model) if isinstance(quantizer, Doubling)]
    assert sorted(found) == sorted(replaced) and len(found) == 2 * (4 + 1)


def test_random_numbers_depend_on_the_seed_and_the_name() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        job = Job(nn.Identity(), None, [], {}, None, seed, False)  # type: ignore[arg-type]
        return torch.rand(4, generator=job.generator(name))

    assert torch.equal(draw(0, "blocks.0"), draw(0, "blocks.0"))
    assert not torch.equal(draw(0, "blocks.0"), draw(0, "blocks.1"))
    assert not torch.equal(draw(0, "blocks.0"), draw(1, "blocks.0"))


class Shortcut(nn.Module):
    """A 3x3 and a 1x1 convolution that read the same pixels, and a grouped one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.short = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(4, 8, 1, stride=2)
        self.deep, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.deep((self.conv(x) + self.short(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("method", sorted(set(methods()) - {"rotation"}))
def test_convolutions_that_read_the_same_pixels_are_rounded_each_by_its_patches(method: str) -> None:
    torch.manual_seed(0)
    model, x = Shortcut().eval(), torch.randn(32, 4, 6, 6)
    spec = {"base": "w8a8", "overrides": {"*": "w8a8"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize(model, spec, calibration=[x], method=method)
    with torch.no_grad():
        assert float((quantized(x) - model(x)).norm() / model(x).norm()) < 0.03
