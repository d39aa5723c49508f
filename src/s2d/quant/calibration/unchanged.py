"""The check that a transform keeps the full-precision function: outputs of the model and of its blocks, compared.

The model's output alone can hide a fold that is wrong: a head with small weights and a large bias (EVA-02 before it is
trained) gives the same output whatever the blocks compute. So the output of every block is compared too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.blocks import blocks_of
from s2d.models.running import evaluating, main_output, run
from s2d.quant.calibration.observe import Job
from s2d.quant.modules.cached_steps import CACHES

# Allowed change, relative to the norm of what is compared: the rounding of moved weights in their own type. On a random
# model of 32 layers with massive channels it was 2.9e-6 in float32, 0.006 in float16, 0.03 in bfloat16.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
# What a forward returns beside its result: keys and values take part in folds, inner states change their basis.
_BESIDE = ("use_cache", "output_hidden_states", "output_attentions")
_STATES = (*CACHES, "hidden_states", "attentions")


@contextmanager
def function_kept(job: Job, method: str) -> Iterator[dict[str, Tensor]]:
    """While active, the model's weights may change, but its function may not; the first batch checks it.

    Yields:
        To be filled: the rotation Q ``[D, D]`` of each block whose output is ``y Q`` afterwards.

    Raises:
        InputError: An output changed by more than `TOLERANCE`; it is named.
    """
    before = _outputs(job)
    bases: dict[str, Tensor] = {}
    yield bases
    inside = tuple(f"{name}." for name in bases)
    for path, after in _outputs(job).items():
        if path in bases:
            after = (after.double() @ bases[path].cpu().double().T).to(after.dtype)
        if not path.startswith(inside):
            refuse_changed(job, method, path, before[path], after)


def refuse_changed(job: Job, method: str, path: str, before: Tensor, after: Tensor) -> None:
    """Raise InputError if an output at full precision is another one than before.

    Args:
        job: The call's job.
        method: Which method changed weights.
        path: The block, or the part of the model's output; empty for all of it.
        before: What it was.
        after: What it is now.
    """
    error = (after.double() - before.double()).norm() / before.double().norm().clamp(min=1e-12)
    if not float(error) <= TOLERANCE.get(before.dtype, TOLERANCE[torch.bfloat16]):
        raise InputError(
            f"{method} would change what {type(job.model).__name__} computes ({path or 'its output'} by "
            f"{float(error):.2g} of its norm): its blocks are not built as its family says; use a method that folds "
            "nothing, such as gptq"
        )


def _outputs(job: Job) -> dict[str, Tensor]:
    """For the first batch: every floating-point tensor in the model's output, and the output of each block, by path."""
    found: dict[str, Tensor] = {}

    def keep(path: str, value: Tensor) -> None:
        if value.is_floating_point():
            found[path] = value.detach().masked_fill(~torch.isfinite(value), 0.0).cpu()

    turns: dict[str, int] = {}

    def of_block(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            turns[name] = turns.get(name, 0) + 1
            keep(name if turns[name] == 1 else f"{name} (run {turns[name]})", main_output(output))

        return hook

    blocks = blocks_of(job.model, job.graph)
    hooks = [block.register_forward_hook(of_block(name)) for name, block in blocks.items()]
    hooks.append(job.model.register_forward_hook(lambda module, args, output: _each(output, "", keep)))
    try:
        with evaluating(job.model), _result_alone(job.model):
            run(job.model, job.batches.first)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _each(value: Any, path: str, keep: Callable[[str, Tensor], None]) -> None:
    """Pass every tensor in an output, with its path, to `keep`."""
    if isinstance(value, Tensor):
        keep(path, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _STATES:
                _each(item, f"{path}.{key}".lstrip("."), keep)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            _each(item, f"{path}[{index}]", keep)


@contextmanager
def _result_alone(model: nn.Module) -> Iterator[None]:
    """While active, transformers' models return no caches, hidden states or attention weights."""
    configs = {id(config): config for module in model.modules() if (config := module.__dict__.get("config"))}
    on = [(config, name) for config in configs.values() for name in _BESIDE if getattr(config, name, None) is True]
    try:
        for config, name in on:
            setattr(config, name, False)
        yield
    finally:
        for config, name in on:
            setattr(config, name, True)
