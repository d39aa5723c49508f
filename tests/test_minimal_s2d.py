"""The paper in one file trains as the package's paper preset does: two programs, one algorithm, the same weights."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.scripts import script
from torch import Tensor, nn

import s2d

FILE = Path(__file__).parents[1] / "examples" / "minimal_s2d.py"
REFRESH, STEPS, WIDTH = 4, 22, 24


@pytest.fixture(scope="module")
def minimal() -> Any:
    return script("examples/minimal_s2d.py")


class Block(nn.Module):
    """Self-attention and an MLP, before each a norm, as in a vision transformer."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # A bias of k changes no attention: its gradient is rounding noise, which Adam would make steps of.
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def make(kind: str) -> nn.Module:
    """A small model in two of whose weights one direction makes the outliers."""
    torch.manual_seed(0)
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
        planted = [model[2], model[4]]
    else:
        model = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 5))
        planted = [model[0].fc2, model[1].fc2]
    with torch.no_grad():
        for layer in planted:
            out, in_ = layer.weight.shape
            u = torch.nn.functional.normalize(torch.randn(out), dim=0)
            layer.weight += 4 * u[:, None] / in_**0.5  # along the mean of what an activation function lets through
    return model


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (16, WIDTH) if kind == "mlp" else (4, 6, WIDTH)
    return [
        (torch.randn(shape, generator=generator), torch.randint(0, 5, shape[:-1], generator=generator))
        for _ in range(STEPS)
    ]


def trained(kind: str, minimal: Any, how: str, **settings: Any) -> tuple[nn.Module, list[dict[str, int]]]:
    """The model after some steps of AdamW, and what was selected at each: so many components of which layer."""
    model = make(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    small = minimal.S2D(model, refresh_every=REFRESH, **settings) if how == "file" else None
    large = (
        s2d.SelectiveSpectralDecay(model, optimizer, preset="paper", refresh_every=REFRESH, **settings)
        if how == "package"
        else None
    )
    selections = []
    for x, labels in batches(kind):
        nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten()).backward()
        if small is not None:
            small.add_gradients()
        optimizer.step()
        optimizer.zero_grad()
        if small is not None:
            selections.append({name: u.shape[1] for name, (u, _) in small.selected.items()})
        if large is not None:
            selections.append({name.removesuffix(".weight"): count for name, count in large.selected.items()})
    return model, selections


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.parametrize("settings", [{}, {"strength": 0.02, "power": 1.0, "threshold": 0.8}], ids=["paper", "other"])
def test_the_file_and_the_package_train_the_same_weights(kind: str, settings: dict[str, float], minimal: Any) -> None:
    short, selected = trained(kind, minimal, "file", **settings)
    long, theirs = trained(kind, minimal, "package", **settings)
    assert selected == theirs and all(selected[::REFRESH]), "something is selected, and the same"
    assert distance(short, long) < 1e-5
    plain, _ = trained(kind, minimal, "neither")
    assert distance(short, plain) > 1e-3, "the decay did something"


def test_the_penalty_has_this_gradient(minimal: Any) -> None:
    """The gradient that is added, against autograd through the singular values themselves."""
    model = make("mlp").double()
    decay = minimal.S2D(model, strength=0.1, power=2.0, threshold=0.0, max_rank=1)
    x = torch.randn(16, WIDTH, dtype=torch.float64)
    model(x).sum().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    penalty = sum(torch.linalg.svdvals(layer.weight)[0] ** 3 for layer in other if isinstance(layer, nn.Linear))
    (other(x).sum() + 0.1 / 3 * penalty).backward()
    decay.add_gradients()
    for mine, truth in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad)


def test_an_evaluation_does_not_select(minimal: Any) -> None:
    model = make("mlp")
    decay = minimal.S2D(model, threshold=0.0)
    with torch.no_grad():
        model(torch.randn(16, WIDTH))
    decay.add_gradients()
    assert decay.selected == {}
    assert not any(layer._forward_hooks for layer in model), "it is in nobody's way between two looks"


def test_the_file_is_short_and_stands_alone() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) <= 120
    code = f"import runpy, sys; runpy.run_path({str(FILE)!r}); print('s2d' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["False"]
