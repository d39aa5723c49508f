"""Runs that are killed at random moments and started again: does the end differ from that of a run left alone?

    python benchmarks/kills.py [--kills 50] [--seed 0] [--after 0] [--json FILE]

What is measured:

* The run: a whole recipe (audit, two arms of training, quantization and evaluation, training with quantizers, audits,
  report) on a tiny random ViT and made-up pictures, then ``s2d condition`` of the same model, then ``s2d quantize
  --method repq --resume`` of the outcome, which keeps finished blocks, then ``s2d export`` of that to ONNX. Every step
  of training saves its state, which is the hardest case. With --after N the first N of these four commands are done
  already, so that all kills hit the later ones.
* A process of its own for each attempt: forked from one that has imported the libraries, with one thread, running the
  command line's own entry. Each is killed with SIGKILL in one of three ways, in turn: after a random time; before a
  random one of its changes to the disk (a file opened to be written, renamed or removed, a folder made); or by the
  system in the middle of a write, when a file grows past a random length (RLIMIT_FSIZE). Now and then the disk is
  full instead, by the same limit: then the process must end by itself, with exit code 2 and one line.
* It is then started again, and killed again (up to --most times), until it is through. A restart that ends with an
  error counts as a failure, and so does an end that differs: weights are compared byte by byte, JSON files after
  seconds, peak memory and dates are taken out. What a kill left behind (temporary files) is counted, in bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import accelerate  # noqa: F401 -- what the commands would import is imported once, here
import torch
import transformers
import yaml

from s2d import cli
from s2d.experiments.recipe import read_recipe
from s2d.experiments.runner import Runner  # noqa: F401
from s2d.experiments.smoke import smoke_test
from s2d.io.files import write_json
from s2d.models import load

KINDS = ("time", "disk", "write", "full")
MOST_FAILURES = 5  # then something is wrong that more kills say nothing about
VARYING = {"seconds", "peak_mb", "started", "command"}
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
WEIGHTS = (".safetensors",)


def prepare(place: Path, small: bool) -> list[list[str]]:
    """Data and recipe of the run, and the commands that make it up; paths are relative to an attempt's folder."""
    _, recipe = read_recipe("vit-cifar10")
    content = smoke_test(recipe, place / "data").model_dump(mode="json")
    content["train"] |= {"steps": 10, "save_every": 0.0, "precision": "fp32"}
    content["quantize"] |= {"specs": ["fp32", "w4a4"], "methods": ["rtn", "repq"], "observers": ["mse"]}
    content["qat"] = {"specs": ["w4a4"], "steps": 4, "decay": True}
    if small:
        content["train"] |= {"steps": 4}
        content |= {"qat": None, "audit": False, "arms": {"s2d": content["arms"]["s2d"]}}
        content["quantize"] |= {"methods": ["rtn"]}
    file = place / "kills.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    pictures = ["--data", str(place / "data")]
    few = ["-o", "train.steps=6", "-o", "train.batch_size=8", "-o", "train.save_every=0"]
    run = ["run", str(file), "--out", "run", "--quiet"]
    if small:
        return [run]
    return [
        run,
        ["condition", "new:vit-tiny", "--task", "image-classification", *pictures, *few, "--out", "conditioned", "-q"],
        ["quantize", "conditioned", *pictures, "--method", "repq", "--resume", "blocks", "--out", "quantized", "-q"],
        ["export", "quantized", *pictures, "--no-time", "--out", "exported.onnx", "-q"],
    ]


def work(folder: Path, commands: list[list[str]]) -> int:
    """All commands of an attempt, in this process; those that are done are not repeated, as a shell script's would."""
    os.chdir(folder)
    for number, command in enumerate(commands):
        done = Path(f"done-{number}")
        if done.exists():
            continue
        if code := cli.main(command):
            return code
        done.touch()
    return 0


@dataclass
class Attempt:
    """How one process ended: its exit code, or None when it was killed; what it said; changes it made to the disk."""

    code: int | None
    said: str
    changes: int


def attempt(folder: Path, commands: list[list[str]], kind: str = "", at: float = 0.0) -> Attempt:
    """Run in a process of its own, killed in one of the three ways, or not at all."""
    reader, writer = os.pipe()
    counter, counted = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1), os.dup2(writer, 2)
        code = 1
        try:
            changes = 0

            def watch(event: str, args: tuple[Any, ...]) -> None:
                nonlocal changes
                if event not in CHANGES or (event == "open" and not (isinstance(args[2], int) and args[2] & 3)):
                    return
                changes += 1
                if kind == "disk" and changes >= at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            if kind in ("write", "full"):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "write" else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(at), int(at)))
            code = work(folder, commands)
            os.write(counted, str(changes).encode())
        except BaseException as error:
            os.write(2, repr(error).encode()[:2000])
        finally:
            os._exit(code)
    os.close(writer), os.close(counted)
    deadline = time.monotonic() + at if kind == "time" else None
    said = b""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([reader], [], [], left)
        if not ready:
            os.kill(child, signal.SIGKILL)
            deadline = None
            continue
        part = os.read(reader, 65536)
        if not part:
            break
        said += part
    _, status = os.waitpid(child, 0)
    told = os.read(counter, 100)
    os.close(reader), os.close(counter)
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Attempt(code, said.decode(errors="replace"), int(told or 0))


def stage(path: str) -> str:
    """Which stage makes a file."""
    top, _, rest = path.partition("/")
    if top != "run":
        named = {"done-0": "report", "done-1": "condition", "conditioned": "condition", "done-3": "export"}
        return named.get(top, "export" if top.startswith("exported") else "quantize")
    part = rest.partition("/")[0]
    if part == "arms":
        return "train"
    if part == "cells":
        return "train quantized" if "-qat-" in rest else "evaluate"
    return {"audits": "audit", "recipe.json": "load"}.get(part, "report")


def files(folder: Path) -> dict[str, Path]:
    """Finished files by their relative names; what a kill left behind is not among them."""
    named = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in named.items() if not any(part.startswith(".") for part in name.split("/"))}


def plain(content: Any) -> Any:
    """JSON without what differs between any two runs."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key not in VARYING}
    return [plain(item) for item in content] if isinstance(content, list) else content


def differences(mine: Path, other: Path) -> list[str]:
    """Names of the files that are missing, or differ in more than seconds and memory."""
    a, b = files(mine), files(other)
    odd = [name for name in a.keys() | b.keys() if name not in a or name not in b]
    for name in a.keys() & b.keys():
        x, y = a[name].read_bytes(), b[name].read_bytes()
        if name.endswith(".json"):
            same = plain(json.loads(x)) == plain(json.loads(y))
        elif name.endswith(".html"):  # the seconds are in it; that it is whole is what can be asked
            same = x.rstrip().endswith(b"</html>") and y.rstrip().endswith(b"</html>")
        else:
            same = x == y
        if not same:
            odd.append(name)
    return sorted(odd)


def leftovers(folder: Path) -> int:
    """Bytes in temporary files that kills left behind."""
    names = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    hidden = [path for path in names if any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sum(path.stat().st_size for path in hidden)


@dataclass
class Tally:
    """What was tried and found."""

    kills: int = 0
    trials: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_stage: Counter[str] = field(default_factory=Counter)
    inside_a_save: int = 0
    failures: list[str] = field(default_factory=list)
    weights_compared: int = 0
    files_compared: int = 0
    leftover_bytes: int = 0


def temporaries(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name.startswith(".")}


def run(kills: int, seed: int, most: int, small: bool, after: int, place: Path, say: Callable[[str], None]) -> Tally:
    """Kill until there were so many kills, and compare every trial's end with the run that was left alone."""
    rng, tally = random.Random(seed), Tally()
    commands = prepare(place, small)
    done, straight = place / "done", place / "straight"
    done.mkdir()
    if after and (ended := attempt(done, commands[:after])).code != 0:
        raise SystemExit(f"the commands before the kills failed: {ended.said}")
    shutil.copytree(done, straight)
    began = time.monotonic()
    alone = attempt(straight, commands)
    seconds = time.monotonic() - began
    if alone.code != 0:
        raise SystemExit(f"the run that is left alone failed: {alone.said}")
    order = sorted(files(straight).items(), key=lambda item: item[1].stat().st_mtime_ns)
    sizes = sorted(path.stat().st_size for path in straight.rglob("*") if path.is_file())
    say(f"left alone: {seconds:.1f} s, {alone.changes} changes to the disk, {len(order)} files")
    while tally.kills < kills and len(tally.failures) < MOST_FAILURES:
        tally.trials += 1
        folder = place / f"trial-{tally.trials}"
        shutil.copytree(done, folder)
        for number in range(most + 1):
            kind = KINDS[tally.kills % len(KINDS)] if number < most and tally.kills < kills else ""
            at = {
                "time": rng.uniform(0.2, seconds * 0.6),
                "disk": float(rng.randint(1, max(2, alone.changes // 2))),
            }.get(kind, rng.choice(sizes) * rng.uniform(0.1, 3.0) + 64)
            before = temporaries(folder)
            result = attempt(folder, commands, kind, at)
            if result.code == 0:
                break
            said = [line for line in result.said.splitlines() if not line.startswith("s2d: note: ")]
            if kind == "full" and result.code == 2 and len(said) == 1 and "free some space" in said[0]:
                tally.kills += 1
                tally.by_kind[kind] += 1
                say(f"kill {tally.kills}: full disk: {said[0][:150]}")
                continue
            if result.code is not None:
                tally.failures.append(f"trial {tally.trials}: exit code {result.code}: {result.said.strip()[-300:]}")
                break
            there = files(folder)
            where = next((stage(name) for name, _ in order if name not in there), "end")
            inside = bool(temporaries(folder) - before)
            tally.kills += 1
            tally.by_kind[kind] += 1
            tally.by_stage[where] += 1
            tally.inside_a_save += inside
            say(f"kill {tally.kills}: {kind} {at:.4g}, {where}{', inside a save' if inside else ''}")
        else:
            tally.failures.append(f"trial {tally.trials}: did not end")
        tally.leftover_bytes += leftovers(folder)
        if odd := differences(straight, folder):
            tally.failures.append(f"trial {tally.trials}: {', '.join(odd)}")
        mine = files(folder)
        tally.files_compared += len(mine)
        tally.weights_compared += sum(name.endswith(WEIGHTS) for name in mine)
        say(f"trial {tally.trials}: {'differs: ' + ', '.join(odd) if odd else 'the same end'}")
        if not odd:
            shutil.rmtree(folder)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--most", type=int, default=8, help="kills of one run before it is let through")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--after", type=int, default=0, help="how many of the commands are done before the kills")
    parser.add_argument("--small", action="store_true", help="one arm of a few steps, without audit: for a test")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    _warm()
    place = Path(tempfile.mkdtemp(prefix="s2d-kills-"))
    tally = run(
        arguments.kills,
        arguments.seed,
        arguments.most,
        arguments.small,
        arguments.after,
        place,
        lambda text: print(text, flush=True),
    )
    print(
        f"{tally.kills} kills in {tally.trials} runs; by kind {dict(tally.by_kind)}; by stage {dict(tally.by_stage)}; "
        f"{tally.inside_a_save} inside a save; {tally.files_compared} files compared, {tally.weights_compared} of them "
        f"weights; {tally.leftover_bytes} bytes of temporary files left; {len(tally.failures)} failures"
    )
    for failure in tally.failures:
        print(f"FAILED {failure}")
    if arguments.json is not None:
        write_json(arguments.json, {"run": {"seed": arguments.seed}, "kills": vars(tally)})
    if not tally.failures:
        shutil.rmtree(place)
    return 1 if tally.failures else 0


def _warm() -> None:
    """Have the lazily imported parts of the libraries in memory before the first fork."""
    load("new:vit-tiny")


if __name__ == "__main__":
    sys.exit(main())
