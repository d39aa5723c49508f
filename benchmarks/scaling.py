"""What conditioning costs on machines that are not here: a cost model, and what of it can be measured.

    python benchmarks/scaling.py [--json FILE] [--no-measure]

* The models are built on the meta device from their published sizes, so that parameter counts are real.
* The cost model counts, for one refresh of the weight metric and for the steps between, floating-point operations,
  bytes read and bytes sent per GPU, and turns them into time on a nominal GPU (`Gpu` below: data-sheet numbers times
  the share that is usually reached). It is compared with the training step of the same model (6 N T operations, the
  bytes that FSDP2 sends), with full SVDs of every weight, and with gathering every weight.
* Measured here: the bytes that one warm refresh sends on 2 and 4 gloo ranks (every collective is counted), against the
  cost model and against a gather of the weights; and the time of full SVDs against ours in one process, from which the
  exponent of the SVD is taken.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from s2d.io.files import read_json, write_json
from s2d.io.provenance import run_metadata
from s2d.spectral.svd import top_singular_many

K, SPARE, OVERSAMPLE = 3, 3, 5  # components, those followed beyond them, spare columns of the block
BLOCK = K + SPARE + OVERSAMPLE
EVERY = (100, 5)  # steps between two refreshes: preset="paper", and the default
GPUS = (1, 8, 64, 512, 1024)


@dataclass(frozen=True)
class Gpu:
    """A nominal accelerator: an H100 SXM by its data sheet, at usual efficiencies."""

    matmul: float = 989e12 * 0.4  # bf16, as large training runs report
    read: float = 3.35e12 * 0.7  # bytes a second from memory
    send: float = 50e9 * 0.7  # bytes a second over the network, per GPU (400 Gbit/s)
    latency: float = 30e-6  # of one collective, per doubling of ranks
    svd: float = 0.5e12  # operations a second in a dense SVD (panel-bound); see the page
    memory: float = 80e9


@dataclass(frozen=True)
class Model:
    """A transformer by its published sizes."""

    name: str
    width: int
    hidden: int
    layers: int
    tokens: int  # of one sample
    samples: int  # of a step, all GPUs together
    kv: int = 0  # width of keys and values; 0: as wide as queries
    gated: bool = False
    table: int = 0  # rows of the embeddings of tokens, input and output

    def weights(self) -> list[tuple[int, int]]:
        """``(out, in)`` of every matrix that is conditioned."""
        d, f, kv = self.width, self.hidden, self.kv or self.width
        block = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (d, f)] + ([(f, d)] if self.gated else [])
        return block * self.layers

    def parameters(self) -> int:
        """Counted on the meta device."""
        with torch.device("meta"):
            made = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in self.weights())
            extra = nn.Embedding(max(self.table, 1), self.width)
        return sum(p.numel() for p in made.parameters()) + extra.weight.numel()


MODELS = (
    Model("ViT-B", 768, 3072, 12, 197, 1024),
    Model("ViT-L", 1024, 4096, 24, 197, 1024),
    Model("SigLIP2-So400m", 1152, 4304, 27, 729, 1024),
    Model("Llama 1B", 2048, 8192, 16, 4096, 128, 512, True, 128256),
    Model("Llama 8B", 4096, 14336, 32, 4096, 256, 1024, True, 2 * 128256),
    Model("Llama 70B", 8192, 28672, 80, 4096, 1024, 1024, True, 2 * 128256),
)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and of a refresh, and shares of the step at both intervals of `EVERY`."""

    model: str
    gpus: int
    billions: float
    step_s: float
    refresh_s: float
    between_s: float
    shares: tuple[float, ...]  # of the step, refresh and the steps between together
    svd_refresh_s: float
    svd_shares: tuple[float, ...]
    sent_mb: float  # in one refresh, per GPU
    gather_mb: float  # of every weight in bf16, per GPU
    state_gb: float  # weights, gradients and Adam's moments, per GPU


def cost(model: Model, gpus: int, gpu: Gpu) -> Cost:
    """The cost model; the page derives every line."""
    shapes, parameters = model.weights(), model.parameters()
    weights = sum(m * n for m, n in shapes)
    # Small batches cannot be spread over any number of GPUs: at least one sample each.
    samples = max(model.samples, gpus)
    compute = 6 * parameters * samples * model.tokens / gpus / gpu.matmul
    sharded = 3 * 2 * parameters * (gpus - 1) / gpus / gpu.send if gpus > 1 else 0.0  # two gathers, one scatter, bf16
    step = max(compute, sharded)

    skinny = sum((m + n) * BLOCK for m, n in shapes)
    sent = 4 * skinny * 2 * (gpus - 1) / gpus  # one all-reduce of fp32, as a ring sends it
    groups = len(set(shapes)) * math.ceil(model.layers / 32) + 6
    read = 2 * weights / gpus / gpu.read  # one pass over the local shard in bf16 for both products
    dense = 4 * BLOCK * weights / gpus / (gpu.matmul / 20)  # skinny products run far below the peak
    small = sum(40 * BLOCK**2 * (m + n) for m, n in shapes) / (gpu.matmul / 100)  # Rayleigh-Ritz, on every GPU
    wait = groups * gpu.latency * math.log2(gpus) if gpus > 1 else 0.0
    refresh = max(read, dense) + small + sent / gpu.send + wait
    steps = 2 * weights / gpus / gpu.read + (gpu.latency * math.log2(gpus) if gpus > 1 else 0.0)

    # LAPACK's count for singular values and vectors of a matrix, 4 m n^2 + 8 n^3 with n the smaller side.
    svd = sum(4 * max(s) * min(s) ** 2 + 8 * min(s) ** 3 for s in shapes) / gpu.svd / min(gpus, len(shapes))
    gathered = 2 * weights * (gpus - 1) / gpus
    svd += gathered / gpu.send
    return Cost(
        model.name,
        gpus,
        parameters / 1e9,
        step,
        refresh,
        steps,
        tuple((refresh / every + steps) / step for every in EVERY),
        svd,
        tuple(svd / every / step for every in EVERY),
        sent / 1e6,
        gathered / 1e6,
        16 * parameters / gpus / 1e9,
    )


# -- measured ----------------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Count the collectives of this process, and the bytes of their tensors."""
    told = {"calls": 0.0, "bytes": 0.0}
    whole = dist.all_reduce

    def all_reduce(tensor: Tensor, *given: Any, **named: Any) -> Any:
        told["calls"] += 1
        told["bytes"] += tensor.numel() * tensor.element_size()
        return whole(tensor, *given, **named)

    dist.all_reduce = all_reduce
    try:
        yield told
    finally:
        dist.all_reduce = whole


def measure_bytes(model: Model, layers: int, out: Path) -> None:
    """A warm refresh of some layers of a model, sharded by rows over all ranks; run by torchrun."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    some = Model(**{**asdict(model), "layers": layers})
    generator = torch.Generator().manual_seed(0)
    shards = []
    for m, n in some.weights():
        u, v = (torch.linalg.qr(torch.randn(size, 8, generator=generator)).Q for size in (m, n))
        whole = 0.02 * torch.randn(m, n, generator=generator) + (u * torch.logspace(1.3, 0.4, 8)) @ v.mT
        shards.append(distribute_tensor(whole, mesh, [Shard(0)]))
    found = top_singular_many(shards, K + SPARE)
    with CommDebugMode() as seen, counted() as told:
        began = time.perf_counter()
        again = top_singular_many(shards, K + SPARE, warm=found)
        seconds = time.perf_counter() - began
    if dist.get_rank() == 0:
        expected = 4 * sum((m + n) * BLOCK for m, n in some.weights())
        gather = 4 * sum(m * n for m, n in some.weights())
        steps = max(each.iterations for each in again)
        kinds = {str(kind): count for kind, count in seen.get_comm_counts().items()}
        record = {"model": model.name, "layers": layers, "ranks": dist.get_world_size(), "message_bytes": told["bytes"]}
        record |= {"expected_bytes": expected, "gather_bytes": gather, "collectives": kinds, "steps": steps}
        write_json(out, {**record, "seconds": seconds})
    dist.barrier()
    dist.destroy_process_group()


def measure_svd() -> list[dict[str, float]]:
    """Seconds of a full SVD and of a warm refresh of square matrices, single process."""
    rows = []
    for size in (512, 1024, 2048):
        W = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02
        W[:, :6] *= torch.logspace(1.5, 0.6, 6)
        began = time.perf_counter()
        torch.linalg.svd(W, full_matrices=False)
        full = time.perf_counter() - began
        found = top_singular_many([W], K + SPARE)
        began = time.perf_counter()
        top_singular_many([W], K + SPARE, warm=found)
        rows.append({"size": size, "full_s": full, "ours_s": time.perf_counter() - began})
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Cost of conditioning, modelled and measured.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-measure", action="store_true")
    parser.add_argument("--rank-job", nargs=3, metavar=("MODEL", "LAYERS", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_job:
        name, layers, out = given.rank_job
        return measure_bytes(next(m for m in MODELS if m.name == name), int(layers), Path(out))

    console, gpu = Console(width=160), Gpu()
    costs = [cost(model, gpus, gpu) for model in MODELS for gpus in GPUS]
    table = Table(title="Cost model: weight metric, per GPU")
    heads = ("model", "params", "GPUs", "state GB", "step s", "refresh s", *(f"ours / {every}" for every in EVERY))
    for head in (*heads, "full SVDs s", *(f"SVD / {every}" for every in EVERY), "sent MB", "gather MB"):
        table.add_column(head, justify="right")
    for c in costs:
        full = " !" if c.state_gb * 1e9 > gpu.memory else ""
        ours, svd = ([f"{share:.2%}" for share in c.shares], [f"{share:.0%}" for share in c.svd_shares])
        start = (c.model, f"{c.billions:.2f}B", str(c.gpus), f"{c.state_gb:.2f}{full}", f"{c.step_s:.3g}")
        sent = (f"{c.sent_mb:.1f}", f"{c.gather_mb:.0f}")
        table.add_row(*start, f"{c.refresh_s:.2g}", *ours, f"{c.svd_refresh_s:.3g}", *svd, *sent)
    console.print(table)

    measured: dict[str, Any] = {}
    if not given.no_measure:
        measured = {"bytes": [], "svd": measure_svd()}
        for name, layers in (("ViT-B", 12), ("Llama 1B", 1)):
            for ranks in (2, 4):
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "told.json"
                    job = [__file__, "--rank-job", name, str(layers), str(out)]
                    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
                    subprocess.run([*command, str(ranks), *job], check=True, stderr=subprocess.DEVNULL)
                    measured["bytes"].append(read_json(out))
        for row in measured["bytes"]:
            console.print(row)
        for row in measured["svd"]:
            console.print(row)
    if given.json:
        write_json(
            given.json, {"run": run_metadata(), "gpu": asdict(gpu), "costs": [asdict(c) for c in costs], **measured}
        )


if __name__ == "__main__":
    main()
