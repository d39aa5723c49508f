"""What has to hold on every device, tried on the CPU always and on a GPU where there is one (``pytest -m gpu``)."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import s2d
from s2d import quant

pytestmark = pytest.mark.gpu
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def made(device: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).to(device, dtype)
    with torch.no_grad():
        model[0].weight[5] = 40.0  # type: ignore[operator]
    return model


def batch(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize("metric", ["site", "data", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gain_shrinks_by_the_closed_form(device: str, metric: Any, dtype: torch.dtype) -> None:
    model, x = made(device, dtype), batch(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = s2d.SelectiveSpectralDecay(
        model, optimizer, metric=metric, mode="decoupled", strength=0.05, outlier_ratio=3.0
    )
    for _ in range(20):
        (model(x).float().sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[0].weight[5].item() == pytest.approx(40 * math.exp(-1.0), rel=0.02)  # type: ignore[operator]
    decay.remove()


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("amp", [False, True])
def test_a_step_of_every_form_of_adamw(device: str, kind: dict[str, bool], amp: bool) -> None:
    model, x = made(device), batch(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **kind)
    decay = s2d.SelectiveSpectralDecay(model, optimizer, strength=0.05, outlier_ratio=3.0)
    for _ in range(7):
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[0].weight[5] < 30 and decay.step_count == 7  # type: ignore[operator]
    decay.remove()


def test_parameters_on_two_devices_are_shrunk_alike(device: str) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = made("cpu"), made(device)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x).sum() + self.second(x.to(device)).sum().cpu()

    model = Split()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = s2d.SelectiveSpectralDecay(model, optimizer, mode="decoupled", strength=0.05, outlier_ratio=3.0)
    for _ in range(5):
        (model(batch("cpu")) * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in (model.first, model.second):
        assert part[0].weight[5].item() == pytest.approx(40 * math.exp(-0.25), rel=1e-5)  # type: ignore[operator]
    decay.remove()


@pytest.mark.parametrize("method", list(s2d.methods()))
def test_a_quantized_model_stays_on_its_device_and_comes_back_from_disk(
    device: str, method: str, tmp_path: Path
) -> None:
    layer = nn.TransformerEncoderLayer(72, 4, 80, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device).eval()
    x = torch.randn(1, 16, 72, generator=torch.Generator().manual_seed(1)).to(device)
    quantized = s2d.quantize(model, "w4a8", calibration=[x], method=method)
    with torch.no_grad():
        y = quantized(x)
    assert y.device.type == device and torch.isfinite(y).all()
    quant.save(quantized, tmp_path / "q")
    again = quant.load(tmp_path / "q", copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(again(x), y)


def test_attention_and_training_on_the_grid(device: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).to(device).eval()
    x = batch(device)[None]
    trained = s2d.prepare_qat(model, "w4a4", calibration=[x]).train()
    trained(x).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in trained.parameters() if p.grad is not None)


def test_a_state_is_loaded_on_its_device(device: str) -> None:
    model, x = made(device), batch(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = s2d.SelectiveSpectralDecay(model, optimizer, outlier_ratio=3.0)
    (model(x).sum() * 0).backward()
    optimizer.step()
    state = decay.state_dict()
    decay.remove()
    again = s2d.SelectiveSpectralDecay(model, optimizer, outlier_ratio=3.0)
    again.load_state_dict(state)
    (model(x).sum() * 0).backward()
    optimizer.step()
    assert again.step_count == 2 and again.selected == decay.selected
    again.remove()
