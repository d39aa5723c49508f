"""Training batches: shuffled by seed, grouped by length where texts differ, shared among processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from s2d.distributed import processes
from s2d.errors import InputError
from s2d.tasks import Batch, Task
from s2d.training.train_settings import TrainSettings

# Texts of similar length share a batch: this many batches are drawn together and sorted before they are cut.
MEGA_BATCH = 16


def training_batches(task: Task, settings: TrainSettings, seed: int) -> Iterator[Batch]:
    """Batches without end, every epoch in another order.

    The last, smaller batch of an epoch is left out, except with batches of similar length, where it holds the longest
    rows.
    """
    for epoch in itertools.count():
        epoch_seed = seed * 1_000_003 + epoch
        if not (settings.group_by_length and task.ragged):
            whole = task.batches("train", batch_size=settings.batch_size, seed=epoch_seed, shuffle=True)
        else:
            megas = task.batches("train", batch_size=settings.batch_size * MEGA_BATCH, seed=epoch_seed, shuffle=True)
            generator = torch.Generator().manual_seed(epoch_seed)
            whole = (batch for mega in megas for batch in _by_length(mega, settings.batch_size, generator))
        given = 0
        for batch in whole:
            # With batches of similar length the small one holds the longest rows, so it is used too.
            enough = processes.count() if settings.group_by_length and task.ragged else settings.batch_size
            if given and _rows(batch) < enough:
                continue
            given += 1
            yield batch


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _by_length(mega: Batch, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Cut a shuffled mega-batch into batches of similar length, in random order, each without needless padding."""
    ending = "attention_mask"
    masks = {name.removesuffix(ending): mask for name, mask in mega.items() if name.endswith(ending)}
    rows = _rows(mega)
    order = torch.arange(rows)
    if masks:
        order = torch.stack([mask.sum(1) for mask in masks.values()]).sum(0).argsort(stable=True)
    parts = order.split(batch_size)
    for part in torch.randperm(len(parts), generator=generator).tolist():
        batch = {name: tensor[parts[part]] for name, tensor in mega.items()}
        for prefix, mask in masks.items():
            width = int(mask[parts[part]].sum(1).max())
            for name, tensor in batch.items():
                if name.startswith(prefix) and tensor.ndim > 1 and tensor.shape[1] == mask.shape[1]:
                    batch[name] = tensor[:, :width]
        yield batch


def _share(batch: Batch, accelerator: Any) -> Batch:
    """This process's rows of a batch; rows of a short batch that cannot be divided evenly are left out."""
    each = _rows(batch) // accelerator.num_processes
    if each == 0:
        raise InputError(
            f"{_rows(batch)} training examples cannot be shared by {accelerator.num_processes} processes; use fewer"
        )
    first = each * accelerator.process_index
    return batch if accelerator.num_processes == 1 else {n: t[first : first + each] for n, t in batch.items()}
