"""Timing: the same inputs through files in their runtimes and folders in torch, taken in turns.

Each round times all models once, so that load on the machine affects all of them; compare ratios within one table.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.checkpoint import load
from s2d.errors import InputError, MissingExtra, first_line
from s2d.export import RUNNABLE, OnnxModel, OpenVinoModel, open_exported
from s2d.export.gate import take_turns
from s2d.export.onnx import CPU
from s2d.models.heads import encoder_of
from s2d.optional import require

_IDS = 30  # ids stay below it, so that they are in every vocabulary


@dataclass
class Timing:
    """One model in one runtime at one batch size.

    Attributes:
        model: As given.
        runtime: ``"torch"``, ``"onnxruntime"`` or ``"openvino"``.
        threads: For one product.
        batch: Rows at once.
        cold_ms: Opening the model and its first answer, libraries that nothing has imported yet included.
        p50_ms: Median of a call.
        p95_ms: 95th percentile.
        per_second: Rows a second, by the median.
        grown_mb: How much the process grew by opening it; 0 where the system does not say.
    """

    model: str
    runtime: str
    threads: int
    batch: int
    cold_ms: float
    p50_ms: float
    p95_ms: float
    per_second: float
    grown_mb: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    length: int = 128,
    rounds: int = 20,
    provider: str = CPU,
    notes: Callable[[str], None] = lambda text: None,
) -> list[Timing]:
    """Time models side by side.

    Args:
        models: Exported files, run by every runtime installed here that reads them; folders and names of models, run by
            torch.
        batches: Rows at once.
        threads: For one product.
        length: Tokens a row, for models that read text.
        rounds: Calls of each, after one that does not count.
        provider: Of onnxruntime, for files that it runs; see `s2d.export.placement`.
        notes: Receives progress messages.

    Returns:
        A row for every model, runtime, number of threads and batch size.

    Raises:
        InputError: A model cannot be opened or run this way; a number is not positive.
    """
    for name, values in (("batch", batches), ("threads", threads), ("length", (length,)), ("rounds", (rounds,))):
        if not values or any(value < 1 for value in values):
            raise InputError(f"{name} must be 1 or more, not {', '.join(map(str, values)) or 'nothing'}")
    for model in map(str, models):
        if Path(model).suffix in RUNNABLE and not Path(model).is_file():
            raise InputError(f"there is no file {model}; write it with s2d export")
    found: list[Timing] = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            runners = []
            for model in models:
                for runtime in _runtimes(str(model)):
                    notes(f"opening {model} in {runtime}")
                    runners.append(_open(str(model), runtime, count, length, provider))
            for batch in batches:
                notes(f"{len(runners)} models, {count} threads, batch {batch}")
                found += _race(runners, count, batch, length, rounds)
    finally:
        torch.set_num_threads(before)
    return found


@dataclass
class _Runner:
    model: str
    runtime: str
    module: nn.Module
    inputs: Callable[[int, int], dict[str, Tensor]]
    cold_ms: float
    grown_mb: float


def _runtimes(model: str) -> list[str]:
    suffix = Path(model).suffix
    if suffix not in RUNNABLE:
        return ["torch"]
    return ["openvino"] if suffix == ".xml" else ["onnxruntime", *(["openvino"] if _has_openvino() else [])]


def _has_openvino() -> bool:
    try:
        require("openvino", "openvino")
    except MissingExtra:
        return False
    return True


def _open(model: str, runtime: str, threads: int, length: int, provider: str) -> _Runner:
    gc.collect()
    held, start = _resident_mb(), time.perf_counter()
    if runtime == "torch":
        loaded = load(model)
        module, inputs = loaded.model, _inputs_of_torch(loaded.model, model)
    else:
        own = runtime == "onnxruntime" and provider != CPU
        module = OnnxModel(model, threads, provider) if own else open_exported(model, runtime=runtime, threads=threads)
        assert isinstance(module, OnnxModel | OpenVinoModel)
        inputs = _inputs_of_file(module.shapes)
    _call(module, inputs(1, length), model)
    cold = (time.perf_counter() - start) * 1e3
    return _Runner(model, runtime, module, inputs, cold, max(_resident_mb() - held, 0.0))


def _inputs_of_file(shapes: dict[str, tuple[bool, tuple[int | None, ...]]]) -> Callable[[int, int], dict[str, Tensor]]:
    def make(batch: int, length: int) -> dict[str, Tensor]:
        inputs = {}
        for name, (integer, shape) in shapes.items():
            free = iter((batch, *[length] * len(shape)))
            sizes = [next(free) if size is None else size for size in shape]
            inputs[name] = _values(name, sizes, integer)
        return inputs

    return make


def _inputs_of_torch(model: nn.Module, source: str) -> Callable[[int, int], dict[str, Tensor]]:
    config: Any = getattr(encoder_of(model), "config", None)
    size = getattr(config, "image_size", None)
    if size is not None:
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return lambda batch, length: {"pixel_values": _values("pixel_values", [batch, channels, *sides], False)}
    if getattr(config, "vocab_size", None) is None:
        raise InputError(
            f"{source} does not say what it reads (config.vocab_size or config.image_size); export it first"
        )
    names = ("input_ids", "attention_mask")
    return lambda batch, length: {name: _values(name, [batch, length], True) for name in names}


def _values(name: str, shape: Sequence[int], integer: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if not integer:
        return torch.randn(*shape, generator=generator)
    if "mask" in name:
        return torch.ones(*shape, dtype=torch.long)
    if "type" in name:
        return torch.zeros(*shape, dtype=torch.long)
    return torch.randint(1, _IDS, tuple(shape), generator=generator)


def _race(runners: Sequence[_Runner], threads: int, batch: int, length: int, rounds: int) -> list[Timing]:
    calls = [partial(_call, runner.module, runner.inputs(batch, length), runner.model) for runner in runners]
    rows = []
    for runner, times in zip(runners, take_turns(calls, rounds), strict=True):
        p50, p95 = times[len(times) // 2], times[min(math.ceil(0.95 * len(times)), len(times)) - 1]
        speed = 1e3 * batch / p50
        timing = Timing(runner.model, runner.runtime, threads, batch, runner.cold_ms, p50, p95, speed, runner.grown_mb)
        rows.append(timing)
    return rows


@torch.no_grad()
def _call(module: nn.Module, inputs: dict[str, Tensor], model: str) -> None:
    try:
        module(**inputs)
    except MemoryError:
        raise
    except Exception as error:  # each runtime has classes of its own
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise InputError(
            f"{model} does not take {shapes}: {first_line(error, 200)}; choose another --length or --batch"
        ) from error


def _resident_mb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
