"""A recipe on two processes under torchrun, of which one is killed again and again: does the end differ?

    python benchmarks/rank_kills.py [--kills 20] [--ranks 2] [--seed 0] [--json FILE]

What is measured:

* The run: two arms of training, quantization and evaluation, training with quantizers, audits, report, of a tiny random
  ViT on made-up pictures. Every step of training saves its state.
* It runs alone in one process, then undisturbed on the ranks, then on the ranks with kills: torchrun's elastic agent
  starts all processes again after each. One process, drawn at random, is killed by SIGKILL after a random optimizer
  step, before a random change to the disk (those of the first rank, which writes), or after a random time.
* Weights of the killed run are compared with those of the undisturbed one byte by byte, and of that one with those of
  one process by their largest difference, as a share of a weight's largest entry. Biases of keys are told apart: their
  gradient is zero in exact arithmetic, so that AdamW moves them by the noise of rounding. So are the records of
  quantized models: a last bit of a weight decides here and there which code it is rounded to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
# With gloo the processes of a restart would find the addresses of those before them in the agent's store.
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
PER_JOB = 5  # kills of one job before it is let through


def child(plan: list[tuple[int, str, float]], command: list[str]) -> int:
    """One of the processes: runs a command of s2d, and kills itself where the plan of this restart says so."""
    from s2d import cli

    restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if restart < len(plan) and plan[restart][0] == rank:
        _, kind, at = plan[restart]
        _kill_at(kind, at, restart)
    return cli.main(command)


def _kill_at(kind: str, at: float, restart: int) -> None:
    seen = 0

    def end() -> None:
        print(f"killed in start {restart}: {kind} {at:g}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            end()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if kind != "disk" and kind not in str(args[0] if args else ""):  # a folder: changes in there alone
            return
        if event in ("os.rename", "os.mkdir") or (event == "open" and isinstance(args[2], int) and args[2] & 3):
            count()

    if kind == "step":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(count)
    elif kind != "time":
        sys.addaudithook(watch)
    else:
        timer = threading.Timer(at, end)
        timer.daemon = True
        timer.start()


def torchrun(ranks: int, plan: list[tuple[int, str, float]], command: list[str]) -> subprocess.CompletedProcess[str]:
    """The ranks, started as often as the plan has kills and once more."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program += ["--monitor-interval", "0.2", "--max-restarts", str(len(plan)), __file__, "--child", json.dumps(plan)]
    return subprocess.run([*program, *command], capture_output=True, text=True, timeout=1200)


def prepare(place: Path) -> Path:
    """The recipe as a file, its data beside it."""
    import yaml

    from s2d.experiments.recipe import read_recipe
    from s2d.experiments.smoke import smoke_test

    _, recipe = read_recipe("vit-cifar10")
    content = smoke_test(recipe, place / "data").model_dump(mode="json")
    content["train"] |= {"steps": 8, "save_every": 0.0, "precision": "fp32"}  # bf16 rounds by the size of a batch
    content["quantize"] |= {"specs": ["fp32", "w4a4"], "methods": ["rtn", "repq"], "observers": ["mse"]}
    content["qat"] = {"specs": ["w4a4"], "steps": 4, "decay": True}
    file = place / "ranks.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def weights(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.safetensors"))}


def difference(mine: Path, other: Path) -> tuple[float, float]:
    """Of all weights but biases of keys, as a share of the largest entry; of those, as it is."""
    from safetensors.torch import load_file

    a, b = weights(mine), weights(other)
    assert a.keys() == b.keys() and a
    share = absolute = 0.0
    for name in a:
        x, y = load_file(a[name]), load_file(b[name])
        assert x.keys() == y.keys()
        for key in x:
            far = float((x[key] - y[key]).abs().max())
            if key.endswith(("key.bias", "k_proj.bias")):
                absolute = max(absolute, far)
            else:
                share = max(share, far / max(float(x[key].abs().max()), 1e-30))
    return share, absolute


def records(folder: Path) -> list[Any]:
    """Without seconds and memory."""
    whole = json.loads((folder / "results.json").read_text())["records"]
    return [{k: v for k, v in record.items() if k not in ("seconds", "peak_mb")} for record in whole]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rng, place = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="s2d-ranks-"))
    recipe = prepare(place)

    def command(name: str) -> list[str]:
        return ["run", str(recipe), "--out", str(place / name), "--quiet"]

    alone = [sys.executable, "-m", "s2d.cli", *command("alone")]
    subprocess.run(alone, check=True, capture_output=True)
    undisturbed = torchrun(arguments.ranks, [], command("ranks"))
    if undisturbed.returncode:
        print(undisturbed.stderr[-3000:])
        return 1
    share, absolute = difference(place / "alone", place / "ranks")
    pairs = list(zip(records(place / "alone"), records(place / "ranks"), strict=True))
    other = Counter(mine["spec"] for mine, theirs in pairs if mine != theirs)
    print(
        f"{arguments.ranks} ranks against one process: weights differ by at most {share:.1e} of the largest entry "
        f"(biases of keys by {absolute:.1e}); of {len(pairs)} records {other.total()} differ {dict(other)}",
        flush=True,
    )
    kinds: Counter[str] = Counter()
    jobs, failures = 0, []
    while kinds.total() < arguments.kills:
        jobs += 1
        plan: list[tuple[int, str, float]] = []
        for _ in range(min(PER_JOB, arguments.kills - kinds.total())):
            kind = rng.choice(("step", "disk", "time"))
            at = {"step": rng.randint(1, 16), "disk": rng.randint(2, 90), "time": rng.uniform(0.5, 8.0)}[kind]
            plan.append((0 if kind == "disk" else rng.randrange(arguments.ranks), kind, at))
        ended = torchrun(arguments.ranks, plan, command(f"job-{jobs}"))
        done = [line for line in ended.stderr.splitlines() if line.startswith("killed in start")]
        kinds.update(line.split()[4] for line in done)
        told = f"job {jobs}: {len(done)} kills"
        if ended.returncode:
            failures.append(f"{told}: {ended.stderr[-2000:]}")
        elif records(place / "ranks") != records(place / f"job-{jobs}"):
            failures.append(f"{told}: other records")
        else:
            mine, theirs = weights(place / f"job-{jobs}"), weights(place / "ranks")
            same = mine.keys() == theirs.keys() and all(mine[n].read_bytes() == theirs[n].read_bytes() for n in theirs)
            if not same:
                failures.append(f"{told}: other weights")
            if "defect of s2d" in ended.stderr:
                failures.append(f"{told}: a process that lost another called it a defect: {ended.stderr[-2000:]}")
        print(f"{told}{'' if not failures else ' FAILED'}: {'; '.join(line[16:] for line in done)}", flush=True)
        if failures:
            break
    total = kinds.total()
    print(f"{total} kills in {jobs} jobs of {arguments.ranks} ranks, by {dict(kinds)}; {len(failures)} failures")
    for failure in failures:
        print(f"FAILED {failure}")
    if arguments.json is not None:
        figures = {"ranks": arguments.ranks, "kills": total, "jobs": jobs, "by": dict(kinds), "failures": failures}
        arguments.json.write_text(json.dumps({**figures, "weights": share, "key_biases": absolute}, indent=1))
    return 1 if failures or share > 1e-4 or other["fp32"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(json.loads(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
