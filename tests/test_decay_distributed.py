"""Data-parallel training: every rank sees other data and shrinks the same components."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.blocks import WAYS, Encoder, fresh, removed, tokens
from torch import nn

from s2d.decay import SelectiveSpectralDecay

RANKS = 2


def worker(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS)
    try:
        for way in WAYS:
            train(rank, way)  # its own frame, so that no DDP wrapper outlives the process group
        gc.collect()
        dist.barrier()  # a rank that leaves while the other is still talking takes it down
    finally:
        dist.destroy_process_group()


def train(rank: int, way: dict[str, Any]) -> None:
    model = fresh(lambda: Encoder(depth=1))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    settings = {"strength": 0.05, "threshold": 0.1, "refresh_every": 2, **way}
    with removed(SelectiveSpectralDecay(parallel, optimizer, **settings)) as decay:
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(parallel(tokens(10 * step + rank)), torch.tensor([0, 1, 2, 3])).backward()
            optimizer.step()
        assert decay.selected
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        everywhere = [torch.empty_like(flat) for _ in range(RANKS)]
        dist.all_gather(everywhere, flat)
        assert torch.equal(everywhere[0], everywhere[1]), way
        ratios = torch.tensor([record["outlier_ratio"] for record in decay.history])
        others = [torch.empty_like(ratios) for _ in range(RANKS)]
        dist.all_gather(others, ratios)
        assert not torch.equal(others[0], others[1])  # the data did differ


@pytest.mark.timeout(300)  # two interpreters import torch, which takes a minute on a busy machine
def test_ranks_stay_equal_bit_for_bit(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path / "meet"),), nprocs=RANKS, join=True)
