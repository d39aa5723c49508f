"""Evaluation: the only place where models, plain, conditioned or quantized, are scored."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.heads import encoder_of
from s2d.models.image_heads import number_of_classes
from s2d.tasks import Split, Task


def evaluate(model: nn.Module | Loaded, task: Task, *, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
    """Score a model on a split of a task.

    Args:
        model: A model of this task (from ``task.build``, trained or quantized since), or one as `s2d.load` gives it.
        task: Data and metrics.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        batch_size: Examples at once; it changes the time, not the result.

    Returns:
        Metric names and values, the task's primary one among them.

    Raises:
        InputError: The model lacks what the task needs, such as a classification head that was trained.
    """
    if isinstance(model, Loaded):
        model = model_for(model, task)
    return task.evaluate(model, split=split, batch_size=batch_size)


def model_for(loaded: Loaded, task: Task) -> nn.Module:
    """The model of a task on a loaded checkpoint, in evaluation mode, without any untrained part.

    Raises:
        InputError: The checkpoint would need a new head.
    """
    built = task.build(loaded)
    known = set(loaded.model.state_dict())
    random = [name for name in built.state_dict() if not name.startswith("encoder.") and name not in known]
    if task.new_head or random:
        raise InputError(
            f"{loaded.source} has no trained head for task {task.name} "
            f"({task.new_head or f'{random[0]} would be random'}); "
            f"train one first: s2d condition {loaded.source} --task {task.name} --data DATA --out FOLDER"
        )
    return built.eval()


def is_bare(loaded: Loaded, task: Task) -> bool:
    """Whether a checkpoint is only an encoder, which needs a head for the task. It prepares the task."""
    model = loaded.model
    if encoder_of(model) is not model or number_of_classes(model) or hasattr(model, "get_text_features"):
        return False
    if hasattr(model, "encode_text"):  # two towers, as those with get_text_features
        return False
    task.build(loaded)
    return bool(task.new_head)


def encoder_inputs(encoder: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """The keywords of a task's model, renamed for its encoder alone: timm and transformers name images differently.

    Raises:
        InputError: Several inputs, not all of which the encoder knows by name.
    """
    accepted = inspect.signature(encoder.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()) or inputs.keys() <= accepted.keys():
        return inputs
    if len(inputs) > 1:
        unknown = ", ".join(inputs.keys() - accepted.keys())
        raise InputError(f"{type(encoder).__name__} does not take {unknown}; quantize it without --task")
    return tuple(inputs.values())
