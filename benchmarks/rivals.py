"""Spectral decay and its rivals: the same start, data, budget and number of looks at validation data for each.

    python benchmarks/rivals.py [--bed banking77] [--methods adamw,s2d,...] [--stages looks,test,table] [--looks 3]
        [--seeds 0,1,2] [--ptq rotation+gptq] [--extra rotation,svdquant,...] [--out runs/rivals] [--quick]

Looks: every method is trained with each of its settings (`METHODS`, as many for all) on one seed and scored on
validation data (of tables a part, see `Bed`). Chosen is the setting with the best W4A4 by rounding to nearest, the
mean of min-max, percentile and MSE ranges (smollm2: of the weights' ranges); methods take turns, so that an interrupted
run has looked at all alike.
Test: the chosen settings, each seed, on test data: full precision, W4A4 by rounding to nearest and by --ptq, and how
far the largest input of a Linear in a block is from the RMS of all; "to s2d" is paired, seed by seed. --extra names
more ways to quantize AdamW's and S2D's models. Table: rivals.md and rivals.svg (with matplotlib) from what is there.

A cell is a file under --out, named after all that it depends on but the code; what is there is not computed again,
and any moment is a good one to stop. Time is the processor time of a step as a ratio to AdamW's in the same cells, the
median over trainings: on a shared machine it is good to some percent (benchmarks/overhead.py measures S2D's own cost).
--quick tries all of it on a tiny model and made-up texts, for tests; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

from s2d import quant
from s2d.checkpoint import load
from s2d.experiments.recipe import FULL, Recipe, arm_settings, read_recipe
from s2d.io.files import JSON, read_json, write_json
from s2d.io.provenance import code_digest, digest, run_metadata
from s2d.models import Loaded, save_model
from s2d.models.blocks import blocks_of
from s2d.models.masks import token_mask
from s2d.models.tracing import trace
from s2d.quant.calibration.observe import watch_inputs
from s2d.tasks import Split, Task, create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import evaluate
from s2d.training.loop import train

CODE = ("baselines", "decay", "training")


@dataclass(frozen=True)
class Look:
    """One setting of a method: what the arm trains with, and what differs in the training."""

    arm: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    rate: float = 1.0

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in {**(self.arm or {}), **(self.train or {})}.items()]
        words += [] if self.rate == 1.0 else [f"lr x{self.rate:g}"]
        return ", ".join(words).replace("'", "") or "as the recipe"


def rival(name: str, *settings: dict[str, Any]) -> list[Look]:
    return [Look({"baseline": name, **each}) for each in settings]


PAPER = {"preset": "paper", "refresh_every": 10}
BOTH = ["linear", "norm"]
MUON = {"optimizer": "muon"}
METHODS: dict[str, list[Look]] = {
    "adamw": [Look(), Look(rate=2.0), Look(rate=0.5)],
    "s2d": [Look({}), Look({"strength": 0.1}), Look({"outlier_ratio": 6.0})],
    "random-directions": rival("random-directions", {"strength": 0.05}, {"strength": 0.02}, {"strength": 0.1}),
    "l2": rival("l2", {"strength": 0.01, "kinds": BOTH}, {"strength": 0.01}, {"strength": 0.003}),
    "tweo": rival("tweo", {"at": "inputs"}, {}, {"at": "inputs", "weight": 0.1}),
    "kure": rival("kure", {"of": "activations", "weight": 0.3}, {}, {"of": "activations", "weight": 3.0}),
    "clip": rival("clip", {"limit": 3.0}, {"limit": 1.5}, {"limit": 5.0}),
    "muon": [Look(train=MUON), Look(train=MUON, rate=2.0), Look(train=MUON, rate=0.5)],
    "s2d-muon": [Look({}, MUON), Look({}, MUON, rate=2.0), Look({"strength": 0.1}, MUON)],
    "s2d-paper": [Look(PAPER), Look({**PAPER, "strength": 0.05}), Look({**PAPER, "strength": 0.005})],
    "spectral-norm": rival("spectral-norm", {"weight": 0.01}, {"weight": 0.001}, {"weight": 0.1}),
    "s2d-n1": [Look({**PAPER, "power": 1.0, "strength": each}) for each in (0.05, 0.5, 0.005)],
    "nuclear": rival("nuclear", {"strength": 0.002}, {"strength": 0.01}, {"strength": 0.0005}),
    "colinearity": rival("colinearity", {"strength": 0.1}, {"strength": 0.02}, {"strength": 0.5}),
}


@dataclass(frozen=True)
class Bed:
    """Where methods are compared: a recipe, its short form, and of tables how few rows are scored.

    Attributes:
        recipe: A packaged one.
        overrides: What makes it short.
        thin: Every so-manieth row of a file is kept.
        carve: Every so-manieth row of the training file goes to validation, where the data have none; 0 for none.
        spec: Bit width.
        observers: Calibrators of rounding to nearest, whose mean decides.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    thin: dict[str, int] | None = None
    carve: int = 0
    spec: str = "w4a4"
    observers: tuple[str, ...] = ("minmax", "percentile", "mse")


BEDS = {
    "banking77": Bed(
        "minilm-banking77",
        ("task.max_length=32", "train.steps=120", "train.batch_size=32", "train.lr=6e-4", "train.head_lr=6e-3"),
        thin={"test": 4},
        carve=20,
    ),
    "sst2": Bed(
        "minilm-sst2",
        ("train.steps=120", "train.batch_size=32", "train.lr=2e-4", "train.head_lr=2e-3"),
        thin={"test": 2},
    ),
    "docstrings": Bed("minilm-docstrings", ("train.steps=60", "train.batch_size=32")),
    "fashion-vit": Bed("vit-fashion-condition", ("train.steps=600",)),
    "cifar10-vit": Bed("vit-cifar10-small", ("train.steps=1000", "train.checkpoints=[]")),
    # Static ranges ruin it whatever was done before; the weights' ranges are all that a calibrator chooses here.
    "smollm2": Bed(
        "smollm2-wikitext2",
        ("train.steps=100", "train.check_every=0", "task.windows=100"),
        spec="w4a4-token",
        observers=("minmax", "mse"),
    ),
}


@dataclass
class Stand:
    """A bed set up: recipe, task and model."""

    name: str
    bed: Bed
    recipe: Recipe
    task: Task
    loaded: Loaded
    folder: Path

    # -- cells: each a file

    def key(self, method: str, look: Look, seed: int) -> str:
        """What a trained model depends on, short."""
        recipe = self.recipe
        content = {
            "model": self.loaded.fingerprint,
            "task": [self.task.fingerprint, recipe.task.model_dump(exclude={"data"})],
            "train": self._settings(look).outcome(),
            "arm": None if look.arm is None else arm_settings(look.arm),
            "seed": seed,
        }
        return f"{method}-{seed}-{digest(content)}"

    def _settings(self, look: Look) -> Any:
        settings = self.recipe.train
        changed: dict[str, Any] = {"lr": settings.lr * look.rate, **(look.train or {})}
        if settings.head_lr is not None:
            changed["head_lr"] = settings.head_lr * look.rate
        return settings.model_copy(update=changed)

    def trained(self, method: str, look: Look, seed: int) -> Path:
        """The folder of a trained model."""
        folder = self.folder / "models" / self.key(method, look, seed)
        if not (folder / "training.json").is_file():
            model = self.task.build(self.loaded, seed)
            state, begun = folder / "state.pt", time.process_time()
            resumed = state.exists()
            done = train(model, self.task, self._settings(look), seed=seed, decay=look.arm, state=state)
            seconds = time.process_time() - begun
            save_model(model, folder / "model", tokenizer=self.loaded.tokenizer, processor=self.loaded.processor)
            history = done.history[-1:] if look.arm and "baseline" in look.arm else []
            about = run_metadata(code=code_digest(*CODE), look=str(look), resumed=resumed)
            notes = {"run": about, "cpu_per_step": seconds / done.steps, "losses": done.losses, "history": history}
            write_json(folder / "training.json", notes)
            state.unlink(missing_ok=True)
        return folder

    def score(self, method: str, look: Look, seed: int, split: Split, cell: str) -> JSON:
        """One number of a trained model: ``fp32``, ``rtn minmax``, ``ratio``, or the name of a way to quantize."""
        path = self._path(method, look, seed, split, cell)
        if path.is_file():
            return read_json(path)
        model = load(self.trained(method, look, seed) / "model").model
        inputs = calibration_inputs(
            self.task, self.recipe.quantize.calibration.samples, self.recipe.quantize.calibration.batch_size, seed
        )
        start = time.process_time()
        if cell == "ratio":
            found: JSON = {"ratio": worst_ratio(model, inputs)}
        else:
            if cell != FULL:
                way, _, observer = cell.partition(" ")
                model = quant.quantize(
                    model, self.bed.spec, calibration=inputs, method=way, observer=observer or None, seed=seed
                )
            found = evaluate(model, self.task, split=split, batch_size=self.recipe.batch_size)
            found = {"value": found[self.task.primary]}
        found |= {"method": method, "look": str(look), "seed": seed, "split": split, "cell": cell}
        found |= {"cpu_seconds": time.process_time() - start, "code": code_digest("quant")}
        write_json(path, found)
        number = found["value"] if "value" in found else found["ratio"]
        print(self.name, method, f"[{look}]", seed, split, cell, round(number, 2), flush=True)
        return found

    def stem(self, method: str, look: Look, seed: int, split: str) -> str:
        """How the names of a model's cells begin."""
        return f"{self.key(method, look, seed)}-{split}-"

    def _path(self, method: str, look: Look, seed: int, split: str, cell: str) -> Path:
        return self.folder / "cells" / f"{self.stem(method, look, seed, split)}{cell}.json".replace(" ", "-")

    # -- what they add up to

    def rounded(self, method: str, look: Look, seed: int, split: Split) -> float:
        """W4A4 by rounding to nearest, the mean of the calibrators."""
        return statistics.mean(
            self.score(method, look, seed, split, f"rtn {observer}")["value"] for observer in self.bed.observers
        )

    def chosen(self, method: str, looks: int) -> Look:
        """The best on validation of those of a method's first looks that are there; the first where none is."""
        there = [look for look in METHODS[method][:looks] if self._looked(method, look)] or METHODS[method][:1]
        return self.best(there, key=lambda look: self.rounded(method, look, 0, "validation"))

    @property
    def best(self) -> Any:
        """``max``, or ``min`` where lower is better."""
        return max if self.task.higher_is_better else min

    def _looked(self, method: str, look: Look) -> bool:
        return all(
            self._path(method, look, 0, "validation", f"rtn {observer}").is_file() for observer in self.bed.observers
        )


def worst_ratio(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> float:
    """The largest |input| of a Linear inside a block over the RMS of all that this Linear reads; the worst Linear's."""
    inside = tuple(f"{name}." for name in blocks_of(model, trace(model, inputs[0])))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)}
    largest, squares, entries = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0)

    def see(name: str, x: Tensor) -> None:
        largest[name] = max(largest[name], float(x.abs().max()))
        squares[name] += float(x.double().square().sum())
        entries[name] += x.numel()

    with token_mask(model, trace(model, inputs[0])) as mask, torch.no_grad():
        hooks = watch_inputs(linears, see, lambda: mask)
        for batch in inputs:
            model(**batch)
        for hook in hooks:
            hook.remove()
    return max(largest[name] / (squares[name] / entries[name]) ** 0.5 for name in linears if entries[name])


def thinned(data: Path, folder: Path, bed: Bed) -> Path:
    """Tables with fewer rows to score, in a folder: scoring takes as long as training otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (path for path in sorted(data.iterdir()) if path.suffix in (".csv", ".tsv")):
        dialect: Any = csv.excel_tab if file.suffix == ".tsv" else csv.excel
        with open(file, encoding="utf-8", newline="") as opened:
            head, *rows = csv.reader(opened, dialect)
        parts = {file.stem: rows[:: (bed.thin or {}).get(file.stem, 1)]}
        if file.stem == "train" and bed.carve:
            parts = {"validation": rows[:: bed.carve], "train": [r for n, r in enumerate(rows) if n % bed.carve]}
        for name, kept in parts.items():
            with open(folder / f"{name}{file.suffix}", "w", encoding="utf-8", newline="") as written:
                csv.writer(written, dialect).writerows([head, *kept])
    return folder


def stand(name: str, bed: Bed, folder: Path, overrides: Sequence[str] = ()) -> Stand:
    recipe = read_recipe(bed.recipe, [*bed.overrides, "quantize.calibration.samples=64", *overrides])[1]
    options = recipe.task.options
    if bed.thin is not None:
        options["data"] = thinned(Path(options["data"]), folder / name / "data", bed)
    task = create(recipe.task.name, **options)
    loaded = load(recipe.model)
    task.build(loaded)  # tokenizes
    return Stand(name, bed, recipe, task, loaded, folder / name)


# -- stages ------------------------------------------------------------------------------------------------------------


def look_at(place: Stand, methods: Sequence[str], looks: int) -> None:
    for number in range(looks):
        for method in methods:
            look = METHODS[method][number]
            place.score(method, look, 0, "validation", FULL)
            place.rounded(method, look, 0, "validation")


def test(place: Stand, methods: Sequence[str], looks: int, seeds: Sequence[int], ways: Sequence[str]) -> None:
    for seed in seeds:
        for method in methods:
            look = place.chosen(method, looks)
            for cell in (FULL, *(f"rtn {observer}" for observer in place.bed.observers), *ways, "ratio"):
                place.score(method, look, seed, "test", cell)


def extra(place: Stand, methods: Sequence[str], looks: int, seeds: Sequence[int], ways: Sequence[str]) -> None:
    for seed in seeds:
        for way in ways:
            for method in {"adamw", "s2d"} & set(methods):
                place.score(method, place.chosen(method, looks), seed, "test", way)


# -- tables ------------------------------------------------------------------------------------------------------------


Numbers = dict[tuple[str, str, int, str, str], float]


def known(place: Stand) -> Numbers:
    """Every number that is there of this very bed, by method, look, seed, split and cell."""
    found = {}
    cells = {path.name: read_json(path) for path in sorted((place.folder / "cells").glob("*.json"))}
    asked = itertools.product(sorted({cell["seed"] for cell in cells.values()}), ("validation", "test"))
    for seed, split in asked:
        for method, look in ((method, look) for method, settings in METHODS.items() for look in settings):
            stem = place.stem(method, look, seed, split)  # not of other settings, or of another length of the training
            for cell in (cell for name, cell in cells.items() if name.startswith(stem)):
                value = cell["value"] if "value" in cell else cell["ratio"]
                found[method, str(look), seed, split, cell["cell"]] = value
    return found


def mean_of(place: Stand, numbers: Numbers, method: str, look: str, seed: int, split: str) -> float | None:
    found = [numbers.get((method, look, seed, split, f"rtn {observer}")) for observer in place.bed.observers]
    return None if None in found else statistics.mean(n for n in found if n is not None)


def spread(values: Sequence[float | None]) -> str:
    """Mean and, of several, the range."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    text = f"{statistics.mean(there):.2f}"
    return text if len(there) == 1 else f"{text} ({min(there):.2f} to {max(there):.2f})"


def times(place: Stand) -> dict[str, list[float]]:
    """Processor seconds a step of each uninterrupted training, by method."""
    found: dict[str, list[float]] = {}
    for path in (place.folder / "models").glob("*/training.json"):
        notes = read_json(path)
        if not notes["run"]["resumed"]:
            found.setdefault(path.parent.name.rpartition("-")[0].rpartition("-")[0], []).append(notes["cpu_per_step"])
    return found


def looks_table(place: Stand, looks: int, numbers: Numbers) -> tuple[list[str], dict[str, str]]:
    """The looks as rows of Markdown, and the chosen look of each method."""
    lines, best = [], {}
    for method, settings in METHODS.items():
        scored = {str(look): mean_of(place, numbers, method, str(look), 0, "validation") for look in settings[:looks]}
        there = {look: value for look, value in scored.items() if value is not None}
        if there:
            best[method] = place.best(there, key=lambda look: there[look])
        for look, value in there.items():
            full = numbers[method, look, 0, "validation", FULL]
            lines.append(f"| {method} | {look} | {full:.2f} | {value:.2f} | {'*' if look == best[method] else ''} |")
    head = [f"## {place.name}: looks", "", "| method | setting | full | W4A4 rtn, mean | chosen |", "|---" * 5 + "|"]
    return [*head, *lines], best


def rows_of(
    place: Stand, numbers: Numbers, best: dict[str, str], split: str, ways: Sequence[str]
) -> dict[str, list[JSON]]:
    """For each method that was scored on a split, one row a seed."""
    rows: dict[str, list[JSON]] = {}
    for method, look in best.items():
        for seed in sorted({key[2] for key in numbers if key[:2] == (method, look) and key[3] == split}):
            row = {name: numbers.get((method, look, seed, split, name)) for name in (FULL, *ways, "ratio")}
            row |= {"seed": seed, "rtn": mean_of(place, numbers, method, look, seed, split)}
            rows.setdefault(method, []).append(row)
    return rows


def differences(rows: Sequence[JSON], others: Sequence[JSON]) -> list[float | None]:
    """How far rounding to nearest is above that of others, seed by seed."""
    by_seed = {row["seed"]: row["rtn"] for row in others if row["rtn"] is not None}
    pairs = [(row["rtn"], by_seed.get(row["seed"])) for row in rows if row["rtn"] is not None]
    return [found - other for found, other in pairs if other is not None]


def tables(place: Stand, looks: int, ways: Sequence[str], more: Sequence[str]) -> str:
    """The looks, the test and the complements, as Markdown."""
    numbers, seconds = known(place), times(place)
    lines, best = looks_table(place, looks, numbers)
    rows = rows_of(place, numbers, best, "test", [*ways, *more])
    columns = ["full", "W4A4 rtn, mean", "to s2d", *(f"W4A4 {way}" for way in ways), "worst input/RMS", "time", "seeds"]
    lines += [
        "",
        f"## {place.name}: test",
        "",
        f"| method | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method, found in rows.items():
        cells = [spread([row[name] for row in found]) for name in (FULL, "rtn", *ways, "ratio")]
        cells.insert(2, spread(differences(found, rows.get("s2d", []))))
        slow = ""
        if method in seconds and "adamw" in seconds:
            slow = f"x{statistics.median(seconds[method]) / statistics.median(seconds['adamw']):.2f}"
        lines.append(f"| {method} | {' | '.join([*cells, slow, str(len(found))])} |")
    if more and {"adamw", "s2d"} <= rows.keys():
        lines += ["", f"## {place.name}: behind AdamW and behind S2D, test", ""]
        lines += ["| W4A4 by | adamw | s2d |", "|---|---|---|"]
        for way in more:
            each = [spread([row[way] for row in rows[arm]]) for arm in ("adamw", "s2d")]
            lines.append(f"| {way} | {' | '.join(each)} |")
    return "\n".join(lines) + "\n"


def figure(place: Stand, looks: int, path: Path) -> None:
    """Two bars for each chosen setting, full precision and W4A4, with its range over seeds; on test if all are."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        print(f"no figure: pip install matplotlib, and run this again for {path}")
        return
    numbers = known(place)
    best = looks_table(place, looks, numbers)[1]
    tested = all(mean_of(place, numbers, method, look, 0, "test") is not None for method, look in best.items())
    rows = rows_of(place, numbers, best, "test" if tested else "validation", [])
    drawn = Figure(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = drawn.subplots()
    ranges = len(place.bed.observers)
    kinds = ((FULL, "full precision", "#999999"), ("rtn", f"W4A4, rounding, mean of {ranges} ranges", "#0072b2"))
    for number, (kind, label, colour) in enumerate(kinds):
        values = [[row[kind] for row in found if row[kind] is not None] for found in rows.values()]
        means = [statistics.mean(each) for each in values]
        spans = [[mean - min(each) for mean, each in zip(means, values, strict=True)]]
        spans += [[max(each) - mean for mean, each in zip(means, values, strict=True)]]
        places = [n + (number - 0.5) * 0.4 for n in range(len(rows))]
        axes.barh(places, means, 0.38, label=label, color=colour, xerr=spans, error_kw={"lw": 1, "ecolor": "#333333"})
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(f"{place.task.primary}, {'test' if tested else 'validation'}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    drawn.legend(loc="outside upper center", ncols=2, frameon=False)
    drawn.savefig(path)


# -- trying it out -----------------------------------------------------------------------------------------------------


def quick(folder: Path) -> tuple[Bed, list[str]]:
    """A tiny random BERT and made-up texts in a folder, three steps."""
    import transformers  # noqa: PLC0415

    words = [f"{kind}{number}" for kind in ("fruit", "tool") for number in range(20)]
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder / "bert")
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=16).save_pretrained(folder / "bert")
    (folder / "data").mkdir()
    for split, start in (("train", 0), ("test", 1)):
        lines = [f"{words[(7 * n + start) % 40]} {words[(11 * n) % 40]} {words[n % 40]},{n % 2}" for n in range(200)]
        (folder / "data" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    bed = Bed("minilm-banking77", thin={"test": 5}, carve=5)
    short = ["train.steps=3", "train.batch_size=8", "task.max_length=16"]
    return bed, [f"model={folder / 'bert'}", f"task.data={folder / 'data'}", *short]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bed", default="banking77", choices=sorted(BEDS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--stages", default="looks,test,table")
    parser.add_argument("--looks", type=int, default=3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ptq", default="rotation+gptq")
    parser.add_argument("--extra", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("-o", "--override", action="append", default=[], help="Of the recipe, such as task.data=PATH.")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    methods, stages = arguments.methods.split(","), arguments.stages.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    ways, more = ([way for way in given.split(",") if way] for given in (arguments.ptq, arguments.extra))
    with tempfile.TemporaryDirectory() as temporary:
        name, bed, overrides = arguments.bed, BEDS[arguments.bed], list(arguments.override)
        if arguments.quick:
            name, seeds = "quick", [0]
            bed, made = quick(Path(temporary))
            overrides += made
        place = stand(name, bed, arguments.out, overrides)
        if "looks" in stages:
            look_at(place, methods, arguments.looks)
        if "test" in stages:
            test(place, methods, arguments.looks, seeds, ways)
            extra(place, methods, arguments.looks, seeds, more)
        if "table" in stages:
            text = tables(place, arguments.looks, ways, more)
            print(text)
            (place.folder / "rivals.md").write_text(text, encoding="utf-8")
            figure(place, arguments.looks, place.folder / "rivals.svg")


if __name__ == "__main__":
    main()
