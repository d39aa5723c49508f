"""Schedule-free optimizers train weights between two sequences, and the decay has to move all three.

Defazio et al., "The Road Less Scheduled", 2024, arXiv 2405.15682, equations 1 to 3: gradients are taken at
``y = (1 - beta) z + beta x``, z takes the steps, x averages z. Every step pulls y back towards z, so a decay of y alone
is undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def moving_together(optimizer: Optimizer, parameters: Iterable[nn.Parameter | None]) -> Iterator[None]:
    """While active, what is added to a parameter is added to its z too, and so to x, which follows from both."""
    held = []
    if hasattr(optimizer, "eval") or any("scheduled_lr" in group for group in optimizer.param_groups):
        for parameter in parameters:
            z = None if parameter is None else optimizer.state.get(parameter, {}).get("z")
            if parameter is not None and isinstance(z, Tensor):
                held.append((parameter.detach(), parameter.detach().clone(), z))
    yield
    for now, before, z in held:
        z.add_((now - before).to(z))
