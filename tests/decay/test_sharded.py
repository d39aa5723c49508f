"""Several ranks, whatever each of them holds, condition a model like one process that sees all their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import WAYS, model, spawn, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.distributed.sharding import kth_largest
from s2d.errors import InputError

# Sums over ranks round otherwise, and a sharded weight is iterated where a small whole one is decomposed exactly.
# Measured on 2 and 4 ranks: at most 1.5e-5 of a weight's largest entry.
TOLERANCE = 1e-4


def compare(cases: dict[str, list[str]], folder: str) -> None:
    for place, names in cases.items():
        for name in names:
            way, (weights, told) = WAYS[name], torch.load(Path(folder) / name)
            found, here = train(place, way)
            case = f"{place}, {name}, rank {dist.get_rank()}"
            assert here["selected"] == told["selected"], case
            assert here["channels"] == told["channels"], case
            for one, other in zip(here["history"], told["history"], strict=True):
                assert one["outlier_ratio"] == pytest.approx(other["outlier_ratio"], rel=1e-4), (case, one["weight"])
            assert here["budget"] == pytest.approx(told["budget"], rel=1e-3), case
            for key, expected in weights.items():
                error = (found[key] - expected).abs().max() / expected.abs().max()
                assert error < TOLERANCE, f"{case}: {key} differs by {error:.1e}"
            flat = torch.cat([tensor.flatten() for tensor in found.values()])
            copies = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
            dist.all_gather(copies, flat)
            assert all(torch.equal(copies[0], copy) for copy in copies), case


@pytest.mark.timeout(300)  # interpreters that import torch and share two cores
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, {"ddp": list(WAYS), "fsdp": list(WAYS), "tp": list(WAYS)}),
        (
            4,
            {
                "fsdp": ["weight-decoupled", "data-coupled"],
                "fsdp+tp": ["site-decoupled", "weight-coupled", "data-decoupled"],
            },
        ),
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_ranks_together_are_one_process(ranks: int, cases: dict[str, list[str]], tmp_path: Path) -> None:
    for name, way in WAYS.items():
        alone = train("alone", way)
        assert any(alone[1]["selected"]), "nothing was selected, so that nothing is compared"
        assert way["metric"] != "site" or all(alone[1]["budget"]), "the budget has measured nothing"
        torch.save(alone, tmp_path / name)
    spawn(ranks, tmp_path, compare, cases, str(tmp_path))


def refusals(folder: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    flat = FullyShardedDataParallel(nn.Sequential(nn.Linear(8, 8)), device_id=torch.device("cpu"))
    with pytest.raises(InputError, match=r"FSDP1.*fully_shard"):
        SelectiveSpectralDecay(flat, torch.optim.SGD(flat.parameters()))

    fused = nn.Sequential()
    fused.add_module("qkv", nn.Linear(8, 24))
    parallelize_module(fused, mesh, {"qkv": ColwiseParallel()})
    decay = SelectiveSpectralDecay(fused, torch.optim.SGD(fused.parameters()), metric="data", kinds=["linear"])
    with pytest.raises(InputError, match="fused projection"):
        fused(torch.randn(2, 3, 8))
    decay.remove()

    sequence = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    parallelize_module(sequence, mesh, {"0": SequenceParallel()})
    decay = SelectiveSpectralDecay(sequence, torch.optim.SGD(sequence.parameters(), lr=0.1), metric="data")
    with pytest.raises(InputError, match="sequence parallelism"):
        sequence[0](torch.randn(2, 4, 8))
    decay.remove()

    uneven = model()
    optimizer = torch.optim.SGD(uneven.parameters(), lr=0.1)
    decay = SelectiveSpectralDecay(uneven, optimizer, metric="weight")
    ids = torch.zeros(2, 5, dtype=torch.long)
    (uneven(ids) if dist.get_rank() else uneven.blocks[0](uneven.norm0(uneven.tokens(ids)))).sum().backward()
    with pytest.raises(InputError, match="run the same modules on every rank"):
        optimizer.step()
    decay.remove()


@pytest.mark.timeout(300)
def test_what_cannot_be_read_is_refused_on_every_rank(tmp_path: Path) -> None:
    spawn(2, tmp_path, refusals, str(tmp_path))


def test_zero_3_is_refused() -> None:
    partitioned: Any = nn.Linear(4, 4)
    partitioned.weight.ds_id = 0  # what DeepSpeed marks its parameters with
    with pytest.raises(InputError, match=r"^weight is partitioned by DeepSpeed ZeRO-3.*fully_shard"):
        SelectiveSpectralDecay(partitioned, torch.optim.SGD(partitioned.parameters()))


def test_the_kth_largest_by_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 2, 17, 300]
    values = [torch.rand(n, generator=generator) * 10.0 ** (7 * i - 12) for i, n in enumerate(sizes)]
    values[2][:5] = values[2].max()  # ties
    values.append(torch.zeros(4))
    for k in (1, 2, 5, 16, 1000):
        found = kth_largest(values, [k] * len(values), ())
        expected = [value.sort(descending=True).values[min(k, len(value)) - 1] for value in values]
        assert torch.equal(torch.stack(found), torch.stack(expected))
