"""Conditioning on a cluster with Ray Train: the decay hooks into the optimizer of each worker, as under torchrun.

    pip install "ray[train]"
    python examples/ray_train.py --workers 2

Ray starts the workers, sets up torch.distributed and wraps the model in DistributedDataParallel. Every worker
constructs the decay; what they see is added up, and all shrink the same.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn

import s2d


def train_loop(config: dict[str, Any]) -> None:
    """What runs on each worker."""
    torch.manual_seed(0)  # the same start everywhere
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    model[0].weight.data[3] = 40.0  # an outlier channel
    parallel = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    decay = s2d.SelectiveSpectralDecay(parallel, optimizer)
    rank = ray.train.get_context().get_world_rank()
    for step in range(config["steps"]):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1000 * step + rank))
        loss = nn.functional.cross_entropy(parallel(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gains = model[0].weight.detach()
    ray.train.report({"loss": loss.item(), "gain": gains[3].item(), "shrunk": sum(decay.selected.values())})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Condition a small model on several Ray workers.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"steps": given.steps},
        scaling_config=ray.train.ScalingConfig(num_workers=given.workers),
    )
    print(trainer.fit().metrics)
