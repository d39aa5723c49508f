"""The percentile search of all channels at once, beside the loop over channels that research code has.

    python benchmarks/percentile.py [--json FILE]

Both pick, for every row, the percentile range of least squared error out of a short list (RepQ-ViT: 99.9, 99.99, 99.999
for activations; ERQ: ten for the rows of a weight). The loop takes two `torch.quantile` and one fake quantization for
each row and percentile. Both run in one process, on one thread unless OMP_NUM_THREADS says otherwise, in turns; the
figures are medians, on one thread of processor time, which others disturb less. Their ranges have to agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from s2d.io.provenance import run_metadata
from s2d.quant.numerics.formats import FORMATS
from s2d.quant.numerics.observers import Rounding, affine_rounding, best_percentiles

GOAL = 10.0
REPEATS = 3
REPQ = (99.9, 99.99, 99.999)
ERQ = (97.0, 98.0, 99.0, 99.5, 99.95, 99.97, 99.99, 99.995, 99.999, 100.0)
# name, rows, columns, percentiles, format
CASES = (
    ("LN output of ViT-S, 32 images, 384 channels", 384, 32 * 197, REPQ, "uint4"),
    ("LN output of ViT-B, 8 images, 768 channels", 768, 8 * 197, REPQ, "uint4"),
    ("qkv weight of ViT-S, 1152 rows", 1152, 384, ERQ, "int4"),
    ("fc2 weight of ViT-B, 768 rows", 768, 3072, ERQ, "int4"),
)


def loop(rows: Tensor, percents: tuple[float, ...], rounding: Rounding) -> tuple[Tensor, Tensor]:
    """One row after the other, one percentile after the other."""
    found = []
    for row in rows:
        best, ends = float("inf"), (row[0], row[0])
        for percent in percents:
            lo, hi = torch.quantile(row, 1.0 - percent / 100.0), torch.quantile(row, percent / 100.0)
            error = (rounding(row, lo, hi) - row).square().sum().item()
            if error < best:
                best, ends = error, (lo, hi)
        found.append(ends)
    return torch.stack([lo for lo, _ in found]), torch.stack([hi for _, hi in found])


def timed(run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, tuple[Tensor, Tensor]]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = run()
    return clock() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    records = []
    for name, rows, columns, percents, format_name in CASES:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) ** 3
        rounding = affine_rounding(FORMATS[format_name])
        ours, rival = [], []
        for _ in range(REPEATS):
            seconds, fast = timed(partial(best_percentiles, x, percents, rounding))
            ours.append(seconds)
            seconds, slow = timed(partial(loop, x, percents, rounding))
            rival.append(seconds)
            for a, b in zip(fast, slow, strict=True):
                # Equal but for rows in which two percentiles are as good to the last digit.
                assert torch.isclose(a, b, rtol=1e-4, atol=1e-6).float().mean() > 0.99, name
        seconds, loop_seconds = statistics.median(ours), statistics.median(rival)
        ratio = loop_seconds / seconds
        shared = {"task": "percentile search", "model": name, "conditioning": "none", "spec": format_name}
        figures = {"all at once, ms": 1e3 * seconds, "loop over channels, ms": 1e3 * loop_seconds, "ratio": ratio}
        for metric, value in figures.items():
            records.append({**shared, "metric": metric, "value": value, "higher_is_better": metric == "ratio"})
        verdict = "ok" if ratio >= GOAL else "MISSED"
        print(
            f"{name:46} {seconds * 1e3:8.1f} ms   loop {loop_seconds * 1e3:8.0f} ms   {ratio:6.1f}x   {verdict}",
            flush=True,
        )
    if arguments.json:
        content = {"run": run_metadata(repeats=REPEATS), "records": records}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
