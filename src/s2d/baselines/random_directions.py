"""The control of spectral decay: the same number of directions and the same shrinkage, but random directions.

Not from a paper. If shrinking *any* directions helped, this would do as well as shrinking those that make outliers. A
spectral decay with the given settings selects components as usual. Where it would then shrink K components of a weight,
K random ones are shrunk by one factor, so that the change has the same Frobenius norm. For channels (rows or gains,
with their biases) these are K other channels, otherwise K orthonormal random directions of the outputs. They are drawn
anew when K changes and after every refresh of the decay.

The amounts come from the decay, computed at every step for *this* model. As the outliers stay, they are larger than in
a run of the decay itself; a smaller `strength` compensates for that. ``asked`` and ``done``, in `history` after
`remove`, are the Frobenius norms summed over steps and weights. A random component that is too small is shrunk to zero,
and the rest is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.baselines import base
from s2d.decay.selection import Components
from s2d.decay.settings import DecaySettings
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.distributed.sharding import Block, is_dtensor
from s2d.targets.weights import Target


@dataclass(frozen=True)
class Settings(base.Settings):
    """Settings of the imitated decay; the defaults are those of `DecaySettings`.

    Attributes:
        metric: Metric of the decay.
        power: Power of the decay.
        strength: Strength of the decay.
        outlier_ratio: Outlier ratio of the decay.
        refresh_every: Steps between refreshes of the decay.
    """

    metric: Literal["site", "data", "weight"] = field(default="site", metadata={"choices": ("site", "data", "weight")})
    power: float = DecaySettings.power
    strength: float = DecaySettings.strength
    outlier_ratio: float | None = DecaySettings.outlier_ratio
    refresh_every: int = DecaySettings.refresh_every


@base.register("random-directions")
class RandomDirections(base.Baseline):
    """The control: spectral decay's amounts on random directions."""

    Settings = Settings

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings, *, seed: int) -> None:
        """Attach the decay."""
        super().__init__(model, optimizer, settings, seed=seed)
        self._decay = _Control(model, optimizer, seed=seed, mode="decoupled", **vars(settings))

    def forget(self) -> None:
        """As the decay."""
        self._decay.forget()

    def state_dict(self) -> dict[str, Any]:
        """The decay's, and the random state."""
        return {"decay": self._decay.state_dict(), **self._decay.random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self._decay.load_state_dict(state["decay"])
        self._decay.load_random_state(state)

    def remove(self) -> None:
        """Take every hook out."""
        self._decay.remove()
        self.history = [{"asked": self._decay.asked, "done": self._decay.done}]


class _Control(SelectiveSpectralDecay):
    """Selects as the decay does; shrinks random components by the same amount."""

    def __init__(self, *args: Any, seed: int, **settings: Any) -> None:
        super().__init__(*args, seed=seed, **settings)
        if sharded := next((target.name for target in self.targets if is_dtensor(target.parameter)), None):
            self.remove()
            raise base.InputError(f"{sharded} is sharded; baselines work on whole weights, so compare on one device")
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: dict[str, Tensor] = {}
        self._drawn_at: dict[str, int] = {}
        self.asked = self.done = 0.0

    def shrink(
        self, target: Target, W: Block, components: Components, amount: float, bias: Block | None,
        along: Tensor | None, along_bias: Tensor | None,
    ) -> None:  # fmt: skip
        """Shrink a copy, to measure the change; then shrink random components of the weight."""
        whole, shrunk = W.local, W.local.clone()
        super().shrink(target, Block.of(shrunk), components, amount, None, along, along_bias)
        wanted = float(torch.linalg.vector_norm(shrunk - whole))
        drawn = self._draw(target, whole, components)
        shrink = shrink_channels if components.channels is not None else shrink_span
        self.asked += wanted
        self.done += shrink(whole, drawn, wanted, None if bias is None else bias.local)

    def _draw(self, target: Target, W: Tensor, components: Components) -> Tensor:
        """Channels ``[K]`` that are not selected (where enough are left), or directions ``[O, K]``."""
        looked = self.step_count // self.settings.refresh_every
        known = self._drawn.get(target.name)
        count, rows = len(components), len(W)
        if known is None or known.shape[-1] != count or self._drawn_at[target.name] != looked:
            if components.channels is not None:
                free = torch.ones(rows, dtype=torch.bool)
                free[components.channels.cpu()] = False
                pool = free.nonzero().flatten() if int(free.sum()) >= count else torch.arange(rows)
                known = pool[torch.randperm(len(pool), generator=self._generator)[:count]]
            else:
                known = torch.linalg.qr(torch.randn(rows, count, generator=self._generator)).Q
            self._drawn[target.name], self._drawn_at[target.name] = known, looked
        return known.to(W.device)

    def random_state(self) -> dict[str, Any]:
        """The drawn components, the generator's state, and the sums."""
        return {
            "random": self._generator.get_state(),
            "drawn": dict(self._drawn),
            "drawn_at": dict(self._drawn_at),
            "sums": [self.asked, self.done],
        }

    def load_random_state(self, state: dict[str, Any]) -> None:
        """Restore the state from `random_state`."""
        self._generator.set_state(state["random"])
        self._drawn, self._drawn_at = dict(state["drawn"]), dict(state["drawn_at"])
        self.asked, self.done = state["sums"]


def shrink_channels(W: Tensor, channels: Tensor, wanted: float, bias: Tensor | None) -> float:
    """Scale rows of ``W [O, I]`` (or gains ``[O]``) alike so that W changes by `wanted` in Frobenius norm. In place.

    Returns:
        The Frobenius norm of the change: less than `wanted` where the rows are too small.
    """
    whole = float(torch.linalg.vector_norm(W[channels]))
    share = min(1.0, wanted / whole) if whole > 0 else 0.0
    W[channels] *= 1 - share
    if bias is not None:
        bias[channels] *= 1 - share
    return share * whole


def shrink_span(W: Tensor, U: Tensor, wanted: float, bias: Tensor | None) -> float:
    """W <- W - share U U^T W with the share that changes ``W [O, I]`` by `wanted`; the bias likewise. In place.

    Args:
        W: The weight.
        U: Orthonormal ``[O, K]``.
        wanted: Frobenius norm.
        bias: ``[O]`` or None.

    Returns:
        The Frobenius norm of the change: less than `wanted` where W is too small in the span.
    """
    U = U.to(W.dtype)
    part = U.mT @ W
    whole = float(torch.linalg.vector_norm(part))
    share = min(1.0, wanted / whole) if whole > 0 else 0.0
    W.sub_(share * (U @ part))
    if bias is not None:
        bias.sub_(share * (U @ (U.mT @ bias)))
    return share * whole
