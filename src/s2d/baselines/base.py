"""The contract of a rival of spectral decay: it acts on a model's training, as the decay does.

    rival = create("tweo", model, optimizer, weight=0.01)
    loss = task_loss + rival.loss()      # in each step; some add nothing
    ...                                  # others act behind the optimizer's step, by its hooks
    rival.remove()

A rival is one file in this folder whose class is decorated with `register`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.decay.learning_rates import PeakRates
from s2d.distributed.sharding import is_dtensor
from s2d.errors import InputError
from s2d.registry import Registry
from s2d.targets.weights import KINDS, Kind, Target, find_targets


@dataclass(frozen=True)
class Settings:
    """The settings of a baseline; each subclass has its own.

    Numbers are finite and not negative, integers at least 1. A text is one of ``choices`` in its field's metadata.
    """

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            InputError: Naming the setting, its value and the range.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "kinds":
                if not isinstance(value, list | tuple) or not value or not set(value) <= set(KINDS):
                    raise InputError(f"kinds={value!r} must be one or several of {', '.join(KINDS)}")
                object.__setattr__(self, "kinds", tuple(value))  # a list where the settings come from a recipe
            elif isinstance(field.default, str):
                allowed = field.metadata["choices"]
                if value not in allowed:
                    raise InputError(f"{field.name}={value!r} is unknown; choose from {', '.join(allowed)}")
            elif isinstance(field.default, int):
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise InputError(f"{field.name}={value!r} is out of range; it must be a whole number, at least 1")
            elif isinstance(field.default, float) or (field.default is None and value is not None):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not 0 <= value < math.inf:
                    raise InputError(f"{field.name}={value!r} is out of range; it must be a number, at least 0")


class Baseline:
    """A rival: its term in the loss, its action after an optimizer step, and its state for a resume.

    Attributes:
        name: The name it is registered under.
        Settings: The class of its settings.
        history: Occasional records, like those of the decay; may stay empty.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]]

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Any, *, seed: int) -> None:
        """Attach to a model and the optimizer that trains it.

        Args:
            model: Any module, in place.
            optimizer: Weights that it does not hold are not changed.
            settings: An instance of this class's `Settings`.
            seed: Seed of its random parts.
        """
        self.history: list[dict[str, Any]] = []
        self._rates = PeakRates([optimizer])
        self._handles: list[Any] = []

    def loss(self) -> Tensor | None:
        """The term to add to the task's loss of the present step, a scalar. Call it once, after the model."""
        return None

    def forget(self) -> None:
        """Note that the step that `loss` was called for is skipped."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact continuation needs: plain containers of tensors and numbers."""
        return {"peaks": self._rates.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._rates.load_state(state["peaks"])

    def remove(self) -> None:
        """Take every hook out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- for baselines that act after a step

    def _after_each_step(self, optimizer: Optimizer, act: Callable[[], None]) -> None:
        """Call `act` after every step, without a graph and in full precision."""

        def hook(stepped: Optimizer, *_: Any) -> None:
            self._rates.note(stepped)
            with torch.no_grad():
                act()

        self._handles.append(optimizer.register_step_post_hook(hook))

    def _trained(self, model: nn.Module, kinds: tuple[Kind, ...]) -> list[Target]:
        """The weights of some kinds that the optimizer trains.

        Raises:
            InputError: There are none, or one is sharded.
        """
        found = find_targets(model, kinds=kinds)
        held = [t for t in found if t.parameter.requires_grad and self._rates.trainer(t.parameter) is not None]
        if not held:
            raise InputError(f"{self.name}: the optimizer trains no {' or '.join(kinds)} weight of this model")
        if sharded := next((target.name for target in held if is_dtensor(target.parameter)), None):
            raise InputError(f"{sharded} is sharded; baselines work on whole weights, so compare on one device")
        return held


REGISTERED: Registry[type[Baseline]] = Registry("baseline", "s2d.baselines")
register = REGISTERED.register  # a rival's class; its docstring's first line describes it
