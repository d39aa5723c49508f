"""Small transformers and the steps that tests take with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.decay.spectral_decay import SelectiveSpectralDecay

WIDTH, HEADS, VOCABULARY, CLASSES = 32, 4, 40, 5

SITE: dict[str, Any] = {"metric": "site", "mode": "decoupled", "power": 1.0, "strength": 0.05, "refresh_every": 1}
EVERYTHING: tuple[Any, ...] = ("linear", "norm", "embedding")
WAYS: list[dict[str, Any]] = [
    {"metric": "site", "mode": "decoupled", "outlier_ratio": 2.0},
    {"metric": "weight", "mode": "decoupled", "kinds": EVERYTHING, "outlier_ratio": 2.0},
    {"metric": "weight", "mode": "coupled", "kinds": EVERYTHING, "outlier_ratio": 2.0},
    {"metric": "data", "mode": "decoupled", "kinds": EVERYTHING, "outlier_ratio": 2.0},
    {"metric": "data", "mode": "coupled", "kinds": EVERYTHING, "outlier_ratio": 2.0},
]
WAY_NAMES = [f"{way['metric']}-{way['mode']}" for way in WAYS]


class Attention(nn.Module):
    """Self-attention with separate projections, or one fused Linear named qkv."""

    def __init__(self, fused: bool, dropout: float) -> None:
        super().__init__()
        self.fused, self.dropout = fused, dropout
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, dropout_p=dropout)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc1, GELU, fc2; or gate and up, in either order, and down."""

    def __init__(self, gated: str | None) -> None:
        super().__init__()
        self.gated = gated
        if gated:
            self.gate, self.up, self.down = (
                nn.Linear(WIDTH, 64, bias=False),
                nn.Linear(WIDTH, 64, bias=False),
                nn.Linear(64, WIDTH, bias=False),
            )
        else:
            self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated == "gate first":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.gated == "up first":
            return self.down(self.up(x) * F.silu(self.gate(x)))
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, pre: bool, fused: bool, gated: str | None, dropout: float) -> None:
        super().__init__()
        self.pre = pre
        self.attn, self.mlp = Attention(fused, dropout), Mlp(gated)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.pre:
            x = x + self.drop(self.attn(self.norm1(x), attention_mask))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attn(x, attention_mask)))
        return self.norm2(x + self.drop(self.mlp(x)))


class Encoder(nn.Module):
    """Tokens in, class scores of the mean token out. A 2-D mask reaches the blocks as a 4-D one, as in transformers."""

    def __init__(
        self, pre: bool = True, fused: bool = False, gated: str | None = None, dropout: float = 0.0, depth: int = 2
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.norm0 = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(pre, fused, gated, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH) if pre else nn.Identity()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.norm0(self.tokens(ids))
        wide = attention_mask
        if attention_mask is not None and attention_mask.ndim == 2:
            wide = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, wide)
        return self.head(self.norm(x)).mean(1)


class Two(nn.Module):
    """Two layers in a row, by name."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def tokens(seed: int, batch: int = 4, length: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def spiked(out: int, in_: int, sigmas: list[float], seed: int = 0, noise: float = 0.01) -> Tensor:
    """A Gaussian matrix with large singular values planted, float64."""
    generator = torch.Generator().manual_seed(seed)

    def basis(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, len(sigmas), generator=generator, dtype=torch.float64)).Q

    W = noise * torch.randn(out, in_, generator=generator, dtype=torch.float64)
    return W + (basis(out) * torch.tensor(sigmas, dtype=torch.float64)) @ basis(in_).mT


def still_step(model: nn.Module, optimizer: torch.optim.Optimizer, *inputs: Tensor, **named: Tensor) -> None:
    """A forward pass and a step of the optimizer with gradients of zero: only the decay can move the weights."""
    optimizer.zero_grad()
    (model(*inputs, **named) * 0).sum().backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    first: int = 0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Plain training of an `Encoder`: step number n always sees the same batch and the same dropout."""
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        labels = torch.randint(CLASSES, (4,), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(tokens(step)), labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@contextmanager
def removed(decay: SelectiveSpectralDecay) -> Iterator[SelectiveSpectralDecay]:
    try:
        yield decay
    finally:
        decay.remove()


def fresh(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The same random model every time."""
    torch.manual_seed(seed)
    return build()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def normed(norm_gains: dict[int, float] | None = None) -> Two:
    """A norm, some of whose gains are large, before a linear layer: the smallest site."""
    model = Two(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6))
    with torch.no_grad():
        for channel, gain in ({5: 40.0} if norm_gains is None else norm_gains).items():
            model.first.weight[channel] = gain  # type: ignore[index, operator]
    return model


def gain(model: nn.Module, channel: int = 5) -> float:
    return model.get_submodule("first").weight[channel].item()  # type: ignore[index, operator, union-attr, return-value]


@contextmanager
def deciding(model: nn.Module, optimizer: Any, **settings: Any) -> Iterator[SelectiveSpectralDecay]:
    with removed(SelectiveSpectralDecay(model, optimizer, **{**SITE, "outlier_ratio": 5.0, **settings})) as decay:
        yield decay


X = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(7))


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    each = [len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k and v is not None]
    return sum(each) + sum(len(v) for k, v in vars(optimizer).items() if k.endswith("_hooks"))
