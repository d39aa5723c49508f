"""The checks that an exported file must pass, and the notes for its users.

- layers: every quantized Linear on the inputs that the runtime saw, against the simulated one.
- task: the metric of the simulated model and of the file on held-out data, and how far the metric moves when the
  simulated model is perturbed by about 1e-6, three times (a network of rounded layers is chaotic). The file may differ
  by 0.3 points plus twice that movement.
- output, without a task: the cosine of the outputs on the example, against the same control.
- kernels, bytes, latency: read back and measured, but not checked.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.errors import InputError, MissingExtra
from s2d.export import openvino
from s2d.export.child_process import try_runtime
from s2d.export.copies import shared_copy
from s2d.export.onnx import OnnxModel, kernels, tensors_of, write_onnx
from s2d.export.parity import LayerParity
from s2d.export.placement import Placement
from s2d.optional import require
from s2d.quant.modules.record import remove
from s2d.tasks import Split, Task

POINTS = 0.3
COSINE = 0.02  # a wrong graph differs by far more, flipped codes by less; single layers must agree to 1e-5
PERTURBATIONS = (1e-6, -1e-6, 3e-6)
_ROUNDS, _FEWEST, _LONG = 7, 3, 10.0  # fewer turns where they take long, in seconds


@dataclass(frozen=True)
class Check:
    """The checks of a file, and their outcome.

    Attributes:
        task: Its metric is compared; without one, the outputs on the example.
        split: Split of the task's data.
        batch_size: Batch size of the comparison.
        time_it: Measure latency against full precision.
        describe: Read back the kernels and the memory that they hold; without it nothing is timed either.
        force: Keep a file that does not pass.
        notes: Receives progress messages.
        provider: Ask the runtime which nodes it places on this device; None does not ask.
        fallback: Accept a file of which some nodes run elsewhere.
    """

    task: Task | None = None
    split: Split = "validation"
    batch_size: int = 16
    time_it: bool = True
    describe: bool = True
    force: bool = False
    notes: Callable[[str], None] = lambda text: None
    provider: str | None = None
    fallback: bool = True


@dataclass
class ExportReport:
    """The report of an exported file.

    Attributes:
        path: The file.
        spec: Bits, as in ``"w4a4"``.
        method: The PTQ method.
        embeddings: Bits of the embedding tables; 0 where they are not rounded.
        layers: The comparison of every quantized Linear.
        unchecked: Layers that were not found in the graph.
        parity: The metric (or cosine) of the simulated model, of the file, and of the perturbed model.
        kernels: Matrix products by kind, in the graph that onnxruntime will run.
        openvino: The same for OpenVINO; empty without it.
        file_mb: On disk, weights beside the file included.
        memory_mb: Weights that onnxruntime holds.
        fp32_mb: The plain model's parameters.
        latency_ms: By runtime, the median milliseconds of one row on one thread of ``"torch"`` (fp32), ``"fp32"`` (in
            the same runtime) and ``"file"``, timed in turns.
        placement: Nodes on the device that was asked for, and those that fell back; None where none was.
        about: For files that onnxruntime does not run: where low bits are used, as text.
        note: A message about a runtime that cannot run the file; empty when all that were tried can.
        failures: Why the gate did not pass; empty when it did.
    """

    path: str
    spec: str
    method: str
    embeddings: int
    layers: list[LayerParity] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    openvino: dict[str, int] = field(default_factory=dict)
    file_mb: float = 0.0
    memory_mb: float = 0.0
    fp32_mb: float = 0.0
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    placement: Placement | None = None
    about: list[str] = field(default_factory=list)
    note: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the file computes the same as the simulated model."""
        return not self.failures

    def refuse(self, target: Path, force: bool) -> None:
        """Stop when the gate did not pass, unless forced.

        Raises:
            InputError: The gate did not pass; the message gives the reasons.
        """
        if self.failures and not force:
            raise InputError(
                f"{target} was not written: {'; '.join(self.failures)}; force (--force) keeps the file anyway"
            )

    @property
    def label(self) -> list[str]:
        """Where low bits are used (on disk, in memory, in the product), as text for people."""
        speed = [
            f"speed, one thread, batch 1: {runtime} {times['file']:.1f} ms, "
            + (f"{times['fp32'] / times['file']:.2f} times as fast as its own fp32, " if "fp32" in times else "")
            + f"{times['torch'] / times['file']:.2f} times as fast as torch"
            for runtime, times in self.latency_ms.items()
        ]
        if self.placement is not None:
            speed.insert(0, f"placed: {self.placement}")
        if self.about:
            return [self._on_disk, *self.about, *speed]
        counted = ", ".join(f"{count} {name}" for name, count in sorted(self.kernels.items()))
        integer = sum(count for name, count in self.kernels.items() if _multiplies_integers(name))
        plain = sum(self.kernels.values()) - integer
        narrow = not self.spec.startswith(("w8", "w16"))
        codes = "codes of 4 bits become int8" if narrow else "codes are int8"
        unpacked = codes if integer else "codes become float32"
        if not integer:
            multiply = "float32: the file is smaller, the products are those of full precision"
        else:
            multiply = "uint8 x int8 with int32 sums" + (f" in {integer} products, float32 in {plain}" if plain else "")
            multiply += "; no CPU multiplies 4 by 4 bits" if narrow else ""
        return [
            self._on_disk,
            f"in memory: {self.memory_mb:.1f} MB of weights in onnxruntime, where {unpacked}",
            f"the multiply: {multiply} ({counted})",
            *([self.note] if self.note else []),
            *speed,
        ]

    @property
    def _on_disk(self) -> str:
        tables = f" (embeddings at {self.embeddings} bits)" if self.embeddings else ""
        ratio = self.fp32_mb / max(self.file_mb, 1e-9)
        size = f"{ratio:.1f} times smaller" if ratio >= 1.0 else f"{1.0 / max(ratio, 1e-9):.1f} times larger"
        return f"on disk: {self.file_mb:.1f} MB, {size} than the plain model's {self.fp32_mb:.1f} MB{tables}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "label": self.label, "passed": self.passed}


def _multiplies_integers(kernel: str) -> bool:
    """Whether an operator of onnxruntime's, by its name, multiplies integers (MatMulInteger, QLinearConv)."""
    return "Integer" in kernel or kernel.startswith(("Q", "DynamicQuantize"))


def judge_layers(report: ExportReport, rows: list[LayerParity], missing: list[str]) -> None:
    """Record the comparison of the layers."""
    report.layers, report.unchecked = rows, missing
    bad = [row for row in rows if not row.passed]
    if bad:
        worst = max(bad, key=lambda row: max(row.error, row.flipped))
        report.failures.append(
            f"{len(bad)} of {len(rows)} layers differ; worst {worst.name}: relative error {worst.error:.1e}, "
            f"{worst.flipped:.2%} of rows"
        )
    if missing:
        report.failures.append(
            f"{len(missing)} layers are not products of their codes in the graph, such as {missing[0]}"
        )


def judge(
    report: ExportReport, reference: nn.Module, runner: nn.Module, example: Mapping[str, Tensor], check: Check
) -> None:
    """Record the metric (without a task, the outputs on an example) of the simulated model and of the file."""
    if check.task is None:
        judge_output(report, reference, runner, example)
    else:
        judge_task(report, reference, runner, check.task, check)


def judge_task(report: ExportReport, reference: nn.Module, runner: nn.Module, task: Task, check: Check) -> None:
    """Record the metric of the simulated model and of the file."""
    check.notes(f"comparing {task.primary} on {check.split}")
    simulated, exported = score(reference, task, check), score(runner, task, check)
    control = simulated
    for size in PERTURBATIONS:
        moved = score(perturbed(reference, size), task, check)
        control = max(control, moved, key=lambda each: abs(each - simulated))
        allowed = POINTS + 2.0 * abs(control - simulated)
        if abs(exported - simulated) <= allowed:  # more of them would only allow more
            break
    report.parity = {
        "metric": task.primary,
        "split": check.split,
        "simulated": simulated,
        "exported": exported,
        "perturbed": control,
    }
    if abs(exported - simulated) > allowed:
        report.failures.append(
            f"{task.primary} on {check.split} is {exported:.2f}, simulated {simulated:.2f} "
            f"(perturbed by 1e-6: {control:.2f})"
        )


def score(model: nn.Module, task: Task, check: Check) -> float:
    """The task's first metric, on the split of the comparison."""
    found = task.evaluate(model, split=check.split, batch_size=check.batch_size)[task.primary]
    model.eval()  # quantizers forget the rounded weights that they keep
    give_back()
    return found


@torch.no_grad()
def judge_output(report: ExportReport, reference: nn.Module, runner: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Record the cosine of the outputs."""
    expected = reference(**example)
    found, control = cosine(runner(**example), expected), 1.0
    for size in PERTURBATIONS:
        control = min(control, cosine(perturbed(reference, size)(**example), expected))
        if 1.0 - found <= max(COSINE, 10.0 * (1.0 - control)):  # more of them would only allow more
            break
    report.parity = {"metric": "cosine", "split": "example", "simulated": 1.0, "exported": found, "perturbed": control}
    if 1.0 - found > max(COSINE, 10.0 * (1.0 - control)):
        report.failures.append(f"the output's cosine to the simulated one is {found:.4f} (perturbed: {control:.4f})")


def cosine(a: Any, b: Any) -> float:
    """Mean cosine of the rows of the two main outputs."""
    first, second = (next(iter(tensors_of(each).values())).float().flatten(0, -2) for each in (a, b))
    return float(F.cosine_similarity(first, second).mean())


def perturbed(model: nn.Module, size: float = PERTURBATIONS[0]) -> nn.Module:
    """A copy whose norm gains are larger by ``size``, relatively: a control for chaotic outputs."""
    made = shared_copy(model)
    for module in made.modules():
        gain = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(gain, Tensor):
            module.weight = nn.Parameter(gain.mul(1.0 + size), requires_grad=False)
    return made


def describe_cost(
    report: ExportReport,
    path: Path,
    model: nn.Module,
    example: Mapping[str, Tensor],
    *,
    time_it: bool = True,
    fixed: bool = False,
) -> None:
    """Record kernels, bytes and latency, timed in turns with the model at full precision.

    One row is timed, or where a file has fixed sizes its example. The file in full precision is traced for these sizes
    alone, which takes less than half the time. onnxruntime runs it as fast as one of free sizes, OpenVINO up to 7 %
    faster, so the gain over it may be a little more than is said.
    """
    report.kernels, held = kernels(path)
    report.memory_mb = held / 1e6
    report.fp32_mb = sum(each.numel() for each in model.parameters()) * 4 / 1e6
    try:
        require("openvino", "openvino")
        try_runtime(path, example, openvino=True)  # OpenVINO compiles each graph, and some graphs end the process
        report.openvino = openvino.kernels(path)
    except MissingExtra:
        report.openvino = {}
    except InputError as error:  # an .onnx is kept without it; an .xml was tried before
        report.openvino, report.note = {}, str(error)
    if not time_it:
        return
    plain = remove(shared_copy(model))
    one = dict(example) if fixed else {name: value[:1] for name, value in example.items()}
    runtimes: dict[str, Callable[[Path], nn.Module]] = {"onnxruntime": OnnxModel}
    if report.openvino:
        runtimes["openvino"] = openvino.OpenVinoModel
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "fp32.onnx"
        write_onnx(plain, one, full, beside=True, fixed=True)
        give_back()
        for runtime, opened in runtimes.items():  # one at a time, for memory's sake
            runners = {"torch": plain, "fp32": opened(full), "file": opened(path)}
            report.latency_ms[runtime] = latencies(runners, one)
            del runners
            give_back()


@torch.no_grad()
def latencies(models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Median milliseconds of each model on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spent = take_turns([partial(model, **inputs) for model in models.values()], _ROUNDS, _FEWEST, _LONG)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(times) for name, times in zip(models, spent, strict=True)}


def take_turns(
    calls: Sequence[Callable[[], Any]], rounds: int, fewest: int | None = None, seconds: float = 0.0
) -> list[list[float]]:
    """The milliseconds of every call of each, sorted, after one turn that does not count.

    With ``fewest``, only so many rounds once ``seconds`` have passed.
    """
    spent: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if fewest is not None and turn > fewest and time.perf_counter() - began > seconds:
            break
        for call, times in zip(calls, spent, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                times.append((time.perf_counter() - start) * 1e3)
    return [sorted(times) for times in spent]


def give_back() -> None:
    """Collect garbage cycles, and make glibc return free memory; between the stages of an export this is a large part
    of a model's size.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
