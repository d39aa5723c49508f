"""The spectral iteration on weights of which each rank holds a part, against LAPACK on the whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.blocks import spiked
from tests.ranks import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from s2d.distributed.sharding import Block, all_reduce, kth_largest
from s2d.errors import InputError
from s2d.spectral.svd import top_singular, top_singular_many


def triplets() -> None:
    line = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2))
    places = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()]), (grid, [Shard(0), Shard(1)])]
    places += [(grid, [Shard(0), Shard(0)]), (grid, [Replicate(), Shard(1)])]
    for m, n in ((300, 200), (200, 301), (5, 150), (150, 6), (3, 2)):  # uneven, and ranks that hold nothing
        W = spiked(m, n, [9.0, 5.0, 2.0][: min(m, n)]).float()
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        for mesh, placement in places:
            shard = distribute_tensor(W.clone(), mesh, placement)
            k = min(3, m, n)
            found = top_singular_many([shard], k)[0]
            torch.testing.assert_close(found.S, S[:k], rtol=1e-4, atol=1e-5)
            overlap = ((found.U.mT @ U[:, :k]).diagonal() * (found.V.mT @ V.mT[:, :k]).diagonal()).abs()
            assert bool((overlap > 1 - 1e-4).all()), (m, n, placement, overlap)
            with torch.no_grad():
                Block.of(shard).local.mul_(1.01)
            again = top_singular_many([shard], k, warm=[found])[0]
            torch.testing.assert_close(again.S, 1.01 * S[:k], rtol=1e-4, atol=1e-5)


def messages() -> None:
    line = init_device_mesh("cpu", (4,))
    weight = distribute_tensor(spiked(400, 300, [9.0, 5.0, 2.0]).float(), line, [Shard(0)])
    found = top_singular(weight, 3)
    with CommDebugMode() as seen:
        again = top_singular_many([weight, weight], 3, warm=[found, found])
    kinds = {str(kind): count for kind, count in seen.get_comm_counts().items()}
    assert again[0].iterations == 1
    assert list(kinds.values()) == [1] and "allreduce" in next(iter(kinds)), kinds  # one sum for both, no gather

    hole = weight.to_local().clone()
    if dist.get_rank() == 2:
        hole[0, 0] = math.nan
    from torch.distributed.tensor import DTensor

    damaged = DTensor.from_local(hole, line, [Shard(0)])
    with pytest.raises(InputError, match="holds .*NaN or Inf.* in one of its shards"):
        top_singular(damaged, 3)
    with pytest.raises(InputError, match="is sharded"):
        top_singular(weight, 3, method="exact")

    everyone = (dist.group.WORLD,)
    mine = torch.rand(5 + dist.get_rank(), generator=torch.Generator().manual_seed(dist.get_rank()))
    everything = torch.cat([torch.rand(5 + r, generator=torch.Generator().manual_seed(r)) for r in range(4)])
    for k in (1, 7, 26):
        (limit,) = kth_largest([mine], [k], everyone)  # type: ignore[arg-type]
        assert limit == everything.sort(descending=True).values[k - 1]
    assert all_reduce(torch.tensor(1.0), everyone) == 4  # type: ignore[arg-type]


def both() -> None:
    triplets()
    messages()


@pytest.mark.timeout(300)
def test_shards_give_the_triplets_of_the_whole(tmp_path: Path) -> None:
    spawn(4, tmp_path, both)
