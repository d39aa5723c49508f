"""Training on several ranks, and on one that sees all their data: what the tests of sharding compare."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.blocks import CLASSES, EVERYTHING, Encoder, fresh, removed, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from s2d.decay.spectral_decay import SelectiveSpectralDecay

STEPS, BATCH = 3, 8  # two refreshes
COMMON: dict[str, Any] = {"strength": 0.05, "threshold": 0.1, "refresh_every": 2, "outlier_ratio": 2.0}
WAYS: dict[str, dict[str, Any]] = {
    "site-decoupled": {"metric": "site", "mode": "decoupled", "budget": 0.01},
    "weight-decoupled": {"metric": "weight", "mode": "decoupled", "kinds": EVERYTHING},
    "weight-coupled": {"metric": "weight", "mode": "coupled", "kinds": EVERYTHING},
    "data-decoupled": {"metric": "data", "mode": "decoupled", "kinds": EVERYTHING},
    "data-coupled": {"metric": "data", "mode": "coupled", "kinds": EVERYTHING},
}


def model() -> Encoder:
    """A pre-norm encoder with outliers planted, so that every metric selects something, with gaps in its spectra."""
    made = fresh(lambda: Encoder(depth=1))
    assert isinstance(made, Encoder)
    with torch.no_grad():
        for number, matrix in enumerate(p for p in made.parameters() if p.ndim == 2):
            generator = torch.Generator().manual_seed(number)
            u, v = (torch.randn(size, 3, generator=generator) for size in matrix.shape)
            u, v = torch.linalg.qr(u).Q, torch.linalg.qr(v).Q
            matrix += (u * torch.tensor([6.0, 4.0, 2.5])) @ v.mT
        made.blocks[0].norm1.weight[3] = 12.0  # type: ignore[union-attr, index, operator]
    return made


def ddp(whole: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(whole)


def fsdp(whole: Encoder) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in whole.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(whole.head, mesh=mesh)  # a unit of its own: gathered and let go around this one module
    return fully_shard(whole, mesh=mesh)


def tensor_parallel(whole: Encoder, mesh: Any = None) -> nn.Module:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    plan: dict[str, Any] = {"attn.q": ColwiseParallel(), "attn.k": ColwiseParallel(), "attn.v": ColwiseParallel()}
    plan |= {"attn.proj": RowwiseParallel(), "mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    for block in whole.blocks:
        parallelize_module(block, mesh, plan)
    return parallelize_module(whole, mesh, {"tokens": RowwiseParallel(input_layouts=Replicate())})


def both(whole: Encoder) -> nn.Module:
    """FSDP2 over tensor parallelism, on a mesh of two dimensions."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "model"))
    tensor_parallel(whole, mesh["model"])
    for block in whole.blocks:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(whole, mesh=mesh["data"])


PLACES: dict[str, Callable[[Any], nn.Module]] = {"ddp": ddp, "fsdp": fsdp, "tp": tensor_parallel, "fsdp+tp": both}


def batch(step: int, place: str) -> tuple[Tensor, Tensor]:
    """This rank's share of the step's data; of tensor-parallel ranks all see the same."""
    ids = tokens(step, batch=BATCH)
    labels = torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(step))
    shares = {"alone": 1, "tp": 1, "fsdp+tp": dist.get_world_size() // 2 if dist.is_initialized() else 1}
    number = shares.get(place, dist.get_world_size() if dist.is_initialized() else 1)
    mine = 0 if number == 1 else dist.get_rank() // (dist.get_world_size() // number)
    return ids.chunk(number)[mine], labels.chunk(number)[mine]


def train(place: str, way: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights after a few steps, whole, and what the decay did."""
    whole = model()
    parallel = whole if place == "alone" else PLACES[place](whole)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    with removed(SelectiveSpectralDecay(parallel, optimizer, **COMMON, **way)) as decay:
        selected = []
        for step in range(STEPS):
            optimizer.zero_grad()
            ids, labels = batch(step, place)
            F.cross_entropy(parallel(ids), labels).backward()
            optimizer.step()
            selected.append(dict(decay.selected))
        channels = {n: c.channels.tolist() for n, c in decay._metric.selected.items() if c.channels is not None}
        told = {"selected": selected, "channels": channels, "history": list(decay.history)}
        told["budget"] = [] if decay._budget is None else [decay._budget.change, decay._budget.cost]
    return gathered(whole), told


def gathered(whole: nn.Module) -> dict[str, Tensor]:
    """Every weight, put together."""
    return {
        name: getattr(p.detach(), "full_tensor", lambda p=p: p.detach())().clone()
        for name, p in whole.named_parameters()
    }


def work(rank: int, ranks: int, meeting_point: str, job: Callable[..., None], *given: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=ranks)
    try:
        job(*given)
        gc.collect()
        dist.barrier()  # a rank that leaves while the other is still talking takes it down
    finally:
        dist.destroy_process_group()


def spawn(ranks: int, folder: Path, job: Callable[..., None], *given: Any) -> None:
    """Run a job of a module on so many ranks.

    They are forked off a process that has imported what they all need, and nothing else, once for all tests.
    """
    preload_ranks()
    given = (ranks, str(folder / "meet"), job, *given)
    torch.multiprocessing.start_processes(work, args=given, nprocs=ranks, join=True, start_method="forkserver")


def preload_ranks() -> None:
    """What the process that ranks are forked off imports, if there is none yet."""
    multiprocessing.set_forkserver_preload(["tests.ranks_imports"])
