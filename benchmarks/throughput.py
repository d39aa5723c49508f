"""The CIFAR recipe's training beside a bare PyTorch loop of the same model, in turns in one process.

    python benchmarks/throughput.py PATH [--model new:vit-cifar-small] [--steps 40] [--rounds 5] [--json FILE]

PATH holds CIFAR-10 (train.parquet, test.parquet). The bare loop has the pixels as one tensor in memory and does what a
training cannot do without: take rows, normalize, forward, loss, backward, clip, AdamW, schedule. `s2d.training.train`
brings its data pipeline, hooks, guards and accelerate; "decay" is the same with SelectiveSpectralDecay at its defaults.
Seconds are per step by the wall clock, medians over rounds; one thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.models import load
from s2d.tasks import create
from s2d.training.loop import parameter_groups, schedule, train
from s2d.training.train_settings import TrainSettings

GOAL = 0.10


def bare(model: nn.Module, pixels: Tensor, labels: Tensor, settings: TrainSettings, shape: dict[str, Tensor]) -> None:
    """The loop that anybody would write."""
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), lr=settings.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, settings.steps, settings.warmup)
    )
    model.train()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).split(settings.batch_size)
    for rows in order[: settings.steps]:
        inputs = (pixels[rows].float() / 255 - shape["mean"]) / shape["std"]
        outputs: Any = model(pixel_values=inputs)
        loss = F.cross_entropy(outputs.logits if hasattr(outputs, "logits") else outputs, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        scheduler.step()
        loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with CIFAR-10")
    parser.add_argument("--model", default="new:vit-cifar-small", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="of one round of one loop; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    loaded, task = load(arguments.model), create("image-classification", data=arguments.data)
    settings = TrainSettings(steps=arguments.steps, batch_size=arguments.batch_size, lr=1e-3, weight_decay=0.05)
    task.build(loaded)
    everything = next(task.batches("train", batch_size=settings.batch_size * settings.steps, shuffle=True))
    pixels, labels = everything["pixels"], everything["labels"]
    zero, one = (task.normalize(torch.full((1, 3, 1, 1), value, dtype=torch.uint8)) for value in (0, 255))  # type: ignore[attr-defined]
    shape = {"mean": -zero / (one - zero), "std": 1 / (one - zero)}
    loops: dict[str, Callable[[nn.Module], object]] = {
        "bare": lambda model: bare(model, pixels, labels, settings, shape),
        "train": lambda model: train(model, task, settings),
        "train, decay": lambda model: train(model, task, settings, decay={}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(arguments.rounds + 1):  # the first warms up
        for name, loop in loops.items():
            model = task.build(loaded)
            start = time.perf_counter()
            loop(model)
            if round_:
                seconds[name].append((time.perf_counter() - start) / settings.steps)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {
        name: statistics.median(t / b for t, b in zip(times, seconds["bare"], strict=True))
        for name, times in seconds.items()
    }
    for name in loops:
        spread = f"{min(seconds[name]) * 1e3:.0f} to {max(seconds[name]) * 1e3:.0f}"
        verdict = "" if name == "bare" else ("ok" if ratios[name] <= 1 + GOAL else "MISSED")
        print(f"{name:14} {median[name] * 1e3:7.1f} ms a step ({spread})   {ratios[name]:5.2f}x   {verdict}")
    if arguments.json:
        run = {"torch": torch.__version__, "threads": torch.get_num_threads(), "model": arguments.model}
        found = {"run": run, "seconds": seconds, "ratios": ratios, "goal": GOAL}
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
