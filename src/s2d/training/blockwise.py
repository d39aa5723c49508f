"""Conditioning block by block, for models that do not fit into memory twice; each original block is the teacher.

Reconstruction of one block after the other is how quantizers calibrate large models (BRECQ, arXiv 2102.05426); here the
block is trained while the decay works on it, and nothing is quantized. For the blocks in the order in which they run

    loss = mean over tokens of |block(x) - block_0(x_0)|^2 / |block_0(x_0)|^2

with ``block_0`` the block as it was, ``x_0`` the tokens that the original model gives it and ``x`` those behind the
conditioned blocks before it. The error is relative to each token's own norm. The readers of a residual stream normalize
its tokens one by one, and without this a few massive-activation tokens would dominate the loss.

Memory: the weights once, the gradients and optimizer state of one block, and its tokens of a few batches.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.distributed import processes
from s2d.errors import InputError
from s2d.io.provenance import measured
from s2d.models.blocks import blocks_of
from s2d.models.dual_encoder import has_two_towers
from s2d.models.running import main_output, real_tokens
from s2d.quant.calibration.observe import Batches, Job
from s2d.quant.calibration.resume import Store
from s2d.quant.calibration.walk import Block, Call, invoke, walk
from s2d.quant.modules.sites import is_quantized
from s2d.quant.spec import QuantSpec
from s2d.tasks import Task
from s2d.training.loop import parameter_groups, schedule, without_dropout
from s2d.training.optimizers import make_optimizer
from s2d.training.precision import resolved
from s2d.training.state import key_of
from s2d.training.step_guard import StepGuard, train_step
from s2d.training.train_settings import OnStep, Training, TrainSettings

# Settings that concern the model as a whole, with their neutral values.
_WHOLE = {"minutes": None, "distill": 0.0, "checkpoints": (), "check_every": 0, "patience": 0}


def condition_blocks(
    model: nn.Module,
    task: Task,
    settings: TrainSettings | None = None,
    *,
    batches: int = 16,
    seed: int = 0,
    decay: Mapping[str, Any] | None = None,
    resume: Path | None = None,
    on_step: OnStep | None = None,
    on_total: Callable[[int], None] | None = None,
) -> Training:
    """Condition every block of a model in place; it ends in evaluation mode.

    Embeddings, heads and norms outside the blocks stay as they are. In models whose norms follow the residual sum
    (BERT), the gains of a block's last norm stay too: their readers are in the next block.

    Args:
        model: As published.
        task: Its training inputs, prepared for the model (``task.prepare``); its labels and loss are not used.
        settings: See `TrainSettings`; ``steps`` are those of each block.
        batches: Number of training batches, which are repeated.
        seed: Seed of their order.
        decay: Keywords of `SelectiveSpectralDecay`; None to train without.
        resume: A folder that keeps finished blocks; where it holds some, they are not trained again.
        on_step: Called with the number of steps taken, over all blocks, and the last loss.
        on_total: Called once with the number of steps to take, over all blocks.

    Raises:
        InputError: A quantized model or one without known blocks, settings that have no meaning here, several
            processes, nothing to condition in any block, losses that stay non-finite, or a folder of other work.
    """
    settings = settings or TrainSettings()
    _refuse(model, settings, batches, decay)
    precision = resolved(settings.precision, next(model.parameters()).device)
    settings = settings.model_copy(update={"precision": precision})
    store = None
    if resume is not None:
        store = Store(resume, {"training": f"{key_of(model, task, settings, seed, decay)}-{batches}"})
    chosen = islice(task.batches("train", batch_size=settings.batch_size, seed=seed, shuffle=True), batches)
    calls = [each for batch in chosen for each in task.inputs(batch)]
    # A job that rounds nothing: the walk gives each block's tokens behind the conditioned blocks before it.
    job = Job(model, QuantSpec(), [], {}, Batches(calls), seed, progress=False, stage="transform")
    blocks = blocks_of(model, job.graph)
    if not blocks:
        raise InputError(f"{type(model).__name__} has no blocks that repeat; condition it as a whole")
    if on_total is not None:
        on_total(settings.steps * len(blocks))
    done = Training(0, 0.0, 0.0, [], precision=precision)
    started = time.monotonic()
    with measured() as cost:
        for block in walk(job, reference=True):
            if store is not None and store.load(0, block.name, block.module):
                done.steps += settings.steps
                continue
            _condition(block, settings, decay, job.generator(block.name), done, seed, on_step)
            if store is not None:
                store.save(0, block.name, block.module)
    model.eval()
    done.seconds, done.peak_mb = time.monotonic() - started, cost.peak_mb
    return done


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens ``[N, D]`` of the squared distance relative to the wanted token's squared norm, a scalar."""
    found, wanted = found.float(), wanted.float()
    lengths = wanted.square().sum(-1)
    return ((found - wanted).square().sum(-1) / lengths.clamp(min=torch.finfo(torch.float32).tiny)).mean()


class _Alone(nn.Module):
    """One block under its name in the model, called with the padding mask of its tokens."""

    def __init__(self, name: str, block: nn.Module) -> None:
        super().__init__()
        *path, last = name.split(".")
        place: nn.Module = self
        for part in path:
            place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, block)
        self._path = name

    def forward(self, call: Call, attention_mask: Tensor | None) -> Tensor:
        """The block's tokens; the mask ``[B, T]`` is read by hooks."""
        return main_output(invoke(self.get_submodule(self._path), call))


def _condition(
    block: Block,
    settings: TrainSettings,
    decay: Mapping[str, Any] | None,
    generator: torch.Generator,
    done: Training,
    seed: int,
    on_step: OnStep | None,
) -> None:
    """Train one block, and add its outcome to that of the whole training."""
    assert block.outputs is not None
    alone = _Alone(block.name, block.module)
    place = next(alone.parameters()).device
    optimizer = make_optimizer(settings.optimizer, alone, parameter_groups(alone, settings), settings.lr)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, settings.steps, settings.warmup))
    spectral = None
    if decay is not None:
        spectral = SelectiveSpectralDecay(alone, optimizer, **decay, total_steps=settings.steps, seed=seed)
    guard = StepGuard(settings.spike, settings.lr)
    order = _order(len(block.inputs), generator)
    alone.train()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[place.index or 0] if place.type == "cuda" else []))
        torch.manual_seed(generator.initial_seed())
        if not settings.dropout:
            stack.enter_context(without_dropout(alone))
        for step in range(1, settings.steps + 1):
            index = next(order)
            mask = block.mask_of(index)
            with torch.autocast(place.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                output = alone(block.inputs[index], attention_mask=None if mask is None else mask.to(place))
            wanted = block.outputs[index].to(place)
            loss = relative_error(*(real_tokens(y, mask, "input").flatten(0, -2) for y in (output, wanted)))
            value = loss.item()
            clip = partial(nn.utils.clip_grad_norm_, alone.parameters(), settings.clip)
            train_step(guard, step, value, optimizer, loss.backward, clip, spectral)
            rates.step()
            done.steps += 1
            done.losses.append(value)
            if on_step is not None:
                on_step(done.steps, value)
    guard.check_end(settings.steps)
    done.skipped += [{**each, "block": block.name} for each in guard.skipped]
    if spectral is not None:
        done.history += spectral.history
        spectral.remove()
    optimizer.zero_grad()
    alone.eval()


def _order(count: int, generator: torch.Generator) -> Iterator[int]:
    """Batch indices without end, every round in another order."""
    return itertools.chain.from_iterable(iter(lambda: torch.randperm(count, generator=generator).tolist(), None))


def _refuse(model: nn.Module, settings: TrainSettings, batches: int, decay: Mapping[str, Any] | None) -> None:
    if batches < 1:
        raise InputError(f"{batches} batches are nothing to train on; give at least 1")
    if processes.count() > 1:
        raise InputError("blocks are conditioned by one process; start it without torchrun")
    if is_quantized(model):
        raise InputError("this model is quantized; condition the one that it was made from")
    if has_two_towers(getattr(model, "encoder", model)):
        raise InputError(f"{type(model).__name__} has two towers, and the data are of one; condition it as a whole")
    for name, without in _WHOLE.items():
        if getattr(settings, name) != without:
            raise InputError(f"train.{name} has no meaning block by block; leave it out, or condition it as a whole")
    for name in ("include", "exclude", "baseline"):
        if decay is not None and name in decay:
            raise InputError(f"decay.{name} has no meaning block by block; leave it out, or condition it as a whole")
