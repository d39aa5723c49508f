"""A promise that is killed at random moments: does a usable file stand each time, and does the next call go on?

    python benchmarks/promise_kills.py MODEL --task T --data DIR [-o task.max_length=24] --for onnxruntime --within 1 \
        [--kills 20] [--most 30] [--seed 0] [--out build/kills] [--json FILE]

Each call is a process of its own: ``s2d quantize --method auto``. When the first file stands, a moment within the next
--most seconds is drawn; then the process gets Ctrl-C (SIGINT) or is killed (SIGKILL), in turn. After each the result
is opened in the runtime by this process and answers 16 test examples, and what the search had kept must be kept still.
A search that ends by itself is begun again in a new folder. At last it is left alone until its verdict.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from promises import add_subject, task_of

from s2d.export import open_exported
from s2d.io.files import write_json
from s2d.io.provenance import run_metadata
from s2d.models import load
from s2d.tasks import Task
from s2d.tasks.evaluation import model_for


def result_in(folder: Path) -> Path | None:
    """The file that a search names, if there is one."""
    return next((each for each in (folder / "model.xml", folder / "model.onnx") if each.is_file()), None)


def kept_in(folder: Path) -> set[str]:
    """What a search has tried and judged; empty where nothing is kept."""
    file = folder / "auto.json"
    content = json.loads(file.read_text()) if file.is_file() else {"scored": {}, "files": {}}
    return {f"tried {name}" for name in content["scored"]} | {f"judged {name}" for name in content["files"]}


def usable(file: Path | None, runtime: str, task: Task) -> bool:
    """Whether a file opens in its runtime and answers."""
    if file is None:
        return False
    runner = open_exported(file, runtime=runtime)
    batch = next(iter(task.batches("test", batch_size=16)))
    return bool(task.outcomes(runner, batch).values.isfinite().all())


def main() -> None:
    """Kill, look, go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_subject(parser)
    parser.add_argument("--for", dest="runtime", default="onnxruntime")
    parser.add_argument("--within", default="1")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--most", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/kills"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    task = task_of(arguments)
    model_for(load(arguments.model), task)  # tokenizes
    draw, out = random.Random(arguments.seed), arguments.out
    words = [sys.executable, "-m", "s2d.cli", "quantize", arguments.model, "--task", arguments.task]
    words += ["--data", arguments.data, *(word for each in arguments.o for word in ("-o", each)), "--method", "auto"]
    words += ["--for", arguments.runtime, "--within", arguments.within, "--out", str(out), "--quiet"]
    shutil.rmtree(out, ignore_errors=True)
    kills: list[dict[str, object]] = []
    firsts: list[float] = []
    while len(kills) < arguments.kills:
        start, fresh = time.monotonic(), result_in(out) is None
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and result_in(out) is None:
            time.sleep(0.1)
        if fresh:
            firsts.append(time.monotonic() - start)
        try:
            process.wait(timeout=draw.uniform(0.0, arguments.most))
        except subprocess.TimeoutExpired:
            before, sent = kept_in(out), (signal.SIGINT, signal.SIGKILL)[len(kills) % 2]
            process.send_signal(sent)
            _, said = process.communicate(timeout=120)
            done = {
                "signal": sent.name,
                "code": process.returncode,
                "usable": usable(result_in(out), arguments.runtime, task),
                "kept": before <= kept_in(out),
                "traceback": "Traceback" in said,
            }
            kills.append(done)
            print(len(kills), done, flush=True)
        else:
            print("it ended by itself", process.returncode, flush=True)
            shutil.rmtree(out)
    code = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    usable_count = sum(bool(each["usable"]) and bool(each["kept"]) for each in kills)
    about = run_metadata(model=arguments.model, runtime=arguments.runtime, within=arguments.within)
    found = {"kills": kills, "usable": usable_count, "first_file_seconds": firsts, "last_code": code}
    print(
        f"{usable_count} of {len(kills)} left a usable file and all that was kept; first files after {firsts} s; {code}"
    )
    if arguments.json:
        write_json(arguments.json, {"run": about, **found})


if __name__ == "__main__":
    main()
