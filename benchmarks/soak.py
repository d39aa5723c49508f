"""The same work over and over in one process: does memory grow, do hooks or objects stay behind?

    python benchmarks/soak.py [--cycles 1000] [--models 200] [--points 20] [--json FILE]

* 1,000 refreshes of one decay on a tiny ViT: every optimizer step selects and decays anew (threshold 0, so that there
  is always something to do). Its history is bounded to 200 records here; by default, to 100,000 (about 20 MB).
* 200 times, on a fresh copy of the model: audit, decay put in and taken out, quantize (rtn, repq and gptq in turn).

Memory is the process's resident set after garbage collection, read at --points moments of each part; the first fifth
is left out (caches of the libraries fill there). Growth is the slope of a straight line through the rest, over the
whole part.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import s2d
from s2d.io.files import write_json
from s2d.models import load


def resident_mb() -> float:
    """Resident memory, after what is free has been given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def hooks(model: nn.Module) -> int:
    """Forward and backward hooks on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def objects() -> int:
    """What the garbage collector knows."""
    gc.collect()
    return len(gc.get_objects())


def slope(values: list[float]) -> float:
    """Rise of a least-squares line from the first to the last of the values."""
    x = torch.arange(len(values), dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum() * (len(values) - 1))


def watched(name: str, cycles: int, points: int, cycle: Any, model: nn.Module) -> dict[str, Any]:
    """Run cycles, and say how memory, objects and hooks went."""
    every = max(1, cycles // points)
    memory: list[float] = []
    count: list[float] = []
    before = hooks(model)
    for number in range(cycles):
        cycle(number)
        if (number + 1) % every == 0:
            memory.append(resident_mb())
            count.append(objects())
    settled = len(memory) // 5
    found = {
        "part": name,
        "cycles": cycles,
        "memory_mb": [round(memory[settled], 1), round(memory[-1], 1)],
        "memory_growth_mb": round(slope(memory[settled:]), 2),
        "objects": [count[settled], count[-1]],
        "objects_growth": round(slope(count[settled:])),
        "hooks_left": hooks(model) - before,
    }
    print(found, flush=True)
    return found


def decay_cycles(cycles: int, points: int) -> dict[str, Any]:
    """Refresh, select and decay at every step."""
    torch.manual_seed(0)
    model = load("new:vit-tiny").model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    pixels = torch.randn(2, 3, 32, 32)
    decay = s2d.SelectiveSpectralDecay(model, optimizer, refresh_every=1, threshold=0.0, outlier_ratio=1.0)
    decay.history = deque(maxlen=200)

    def cycle(_: int) -> None:
        optimizer.zero_grad()
        model(pixels).logits.square().mean().backward()
        optimizer.step()

    found = watched("refresh, select, decay", cycles, points, cycle, model)
    assert decay.step_count == cycles and decay.history
    decay.remove()
    found["hooks_left"] = hooks(model)
    return found


def model_cycles(cycles: int, points: int) -> dict[str, Any]:
    """Audit, decay in and out, quantize."""
    original = load("new:vit-tiny").model
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 3, 32, 32, generator=generator),)]

    def cycle(number: int) -> None:
        model = copy.deepcopy(original)
        s2d.audit(model, batches)
        s2d.SelectiveSpectralDecay(model, torch.optim.AdamW(model.parameters())).remove()
        s2d.quantize(model, "w4a4", calibration=batches, method=("rtn", "repq", "gptq")[number % 3])
        assert hooks(model) == hooks(original)

    return watched("audit, quantize", cycles, points, cycle, original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--points", type=int, default=20, help="how often memory and objects are looked at")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [decay_cycles(arguments.cycles, arguments.points), model_cycles(arguments.models, arguments.points)]
    if arguments.json is not None:
        write_json(arguments.json, {"soak": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
