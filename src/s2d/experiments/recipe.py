"""Recipes: an experiment as plain data, checked before anything runs.

A recipe is a YAML file; each key can be overridden from the command line (``-o train.steps=100``). An arm is one way of
fine-tuning: without decay, with it, with other settings of it. All arms start from the same weights, with the same
seeds, data and budget.
"""

from __future__ import annotations

import inspect
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from s2d import baselines
from s2d.decay.settings import PRESETS, DecaySettings
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError, choices
from s2d.experiments.auto.candidates import Objective
from s2d.experiments.auto.promise import Promise
from s2d.experiments.recipe_files import override_in, parse, read_text
from s2d.quant import QuantSpec
from s2d.quant.numerics.observers import ObserverSpec
from s2d.quant.ptq import get_methods
from s2d.tasks import Split
from s2d.training.qat_loop import QATSettings
from s2d.training.train_settings import TrainSettings

FULL = "fp32"
UNTRAINED = "none"
_NOT_FOR_RECIPES = ("model", "optimizer", "seed", "total_steps")  # parameters of the decay that a recipe does not set


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _each(field: str, parse: Callable[[Any], object]) -> Any:
    """A validator of a list that reads each member with `parse`; `parse` reports errors."""

    def check(members: list[Any]) -> list[Any]:
        for member in members:
            parse(member)
        return members

    return field_validator(field)(check)


class TaskSection(BaseModel):
    """A task's name and, beside it, the task's own options (they differ from task to task)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options of the task."""
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        """Its name in results: the name of the data if given, else of the task."""
        return Path(str(self.options["data"])).stem if "data" in self.options else self.name


class Calibration(_Section):
    """Training examples that quantizers are calibrated on."""

    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)


@dataclass(frozen=True)
class Cell:
    """One way to evaluate a model: at full precision, or quantized.

    Attributes:
        spec: Bit width.
        method: Empty at full precision.
        observer: Calibrator; empty where the method has its own ranges.
    """

    spec: str | dict[str, Any]
    method: str = ""
    observer: str = ""


class QuantizeSection(_Section):
    """Bit widths, methods and calibrators to evaluate.

    Attributes:
        specs: Bit widths.
        observers: Calibrators. Round-to-nearest is tried with each; the other methods bring ranges of their own, unless
            the protocol is unified.
        methods: Ways to quantize, see `s2d.quant.methods`.
        protocol: See `s2d.quantize`.
        calibration: The data.
        method: ``auto`` also looks for a file of each arm's model that keeps a promise (see `s2d.auto`); the next four
            fields belong to it: the runtime (``for``), the points that may be lost, the time, and the objective.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    specs: list[str | dict[str, Any]] = Field(default_factory=lambda: [FULL, "w8a8", "w6a6", "w4a4"], min_length=1)
    observers: list[str] = Field(default_factory=lambda: ["minmax", "percentile", "mse"], min_length=1)
    methods: list[str] = Field(default_factory=lambda: ["rtn"], min_length=1)
    protocol: Literal["own", "unified"] = "own"
    calibration: Calibration = Calibration()
    method: Literal["auto"] | None = None
    for_: str | None = Field(default=None, alias="for")
    within: float | None = None
    minutes: float | None = None
    objective: Objective = "smallest"

    @model_validator(mode="after")
    def _whole_promise(self) -> QuantizeSection:
        self.promise  # noqa: B018 - raises the errors of the promise
        return self

    @property
    def promise(self) -> Promise | None:
        """The promise of ``method: auto``; None without it."""
        if self.method is None:
            if (self.for_, self.within, self.minutes) != (None, None, None):
                raise InputError("for, within and minutes are parts of a promise; add method: auto")
            return None
        if self.for_ is None or self.within is None:
            raise InputError("method: auto needs a runtime and points, such as for: onnxruntime and within: 1")
        return Promise.parse(self.for_, self.within, self.minutes, self.objective)

    _readable_specs = _each("specs", lambda spec: spec == FULL or QuantSpec.parse(spec))
    _known_observers = _each("observers", ObserverSpec.parse)
    _known_methods = _each("methods", get_methods)

    def cells(self) -> list[Cell]:
        """All evaluations of a model, each once."""
        found: list[Cell] = []
        for spec in self.specs:
            if spec == FULL:
                found.append(Cell(spec))
                continue
            for method in self.methods:
                calibrators = self.observers if method == "rtn" or self.protocol == "unified" else [""]
                found += [Cell(spec, method, observer) for observer in calibrators]
        return found


class QATSection(QATSettings):
    """Quantization-aware training of every arm's model, one for each spec.

    Attributes:
        specs: Bit widths.
        steps: Optimizer steps.
        lr: Peak learning rate of the weights.
        decay: Whether arms that trained with decay go on with it.
    """

    specs: list[str | dict[str, Any]] = Field(default_factory=lambda: ["w4a4"], min_length=1)
    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    decay: bool = False

    _readable_specs = _each("specs", QuantSpec.parse)

    @property
    def settings(self) -> QATSettings:
        """How the ranges are trained."""
        return QATSettings(**{name: getattr(self, name) for name in QATSettings.model_fields})

    def training(self, train: TrainSettings) -> TrainSettings:
        """The recipe's training settings with this section's steps and learning rate."""
        return train.model_copy(update={"steps": self.steps, "lr": self.lr, "head_lr": None})


class Reference(_Section):
    """A known full-precision score of an arm. A run far from it has wrong data or preprocessing.

    Attributes:
        score: Value of the task's first metric, in points.
        within: Largest plausible distance from it, in points.
        arm: Whose score it is; the published model's by default.
    """

    score: float = Field(allow_inf_nan=False)
    within: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    arm: str = UNTRAINED


class Recipe(_Section):
    """An experiment.

    Attributes:
        about: One line for people.
        model: What every arm starts from; see `s2d.load`.
        task: The task and its options.
        train: See `TrainSettings`.
        arms: Name of each arm, and the keywords of `SelectiveSpectralDecay` it trains with: ``{}`` for the defaults,
            null to train without decay; or the name of a baseline and its settings, ``{baseline: tweo, weight: 0.1}``
            (see `s2d.baselines`). An arm called ``none`` is not trained at all.
        seeds: Each is a repetition of all arms.
        split: The split to evaluate on. Settings are chosen on ``validation``.
        quantize: Bit widths and calibrators.
        qat: Quantization-aware training of each arm's model, after its fine-tuning if it has one; null for none.
        reference: A known score; a run far from it stops before quantization. Null for none.
        export: Where the most wanted file of all arms and seeds that keeps the promise goes; null for none.
        audit: Audit every weight before and after training.
        device: ``auto`` takes an accelerator if there is one.
        batch_size: Batch size of evaluations.
        smoke: The tiny model that replaces the real one in a smoke test on made-up pictures; see `smoke.py`.
    """

    about: str = ""
    model: str
    task: TaskSection
    train: TrainSettings = TrainSettings()
    arms: dict[str, dict[str, Any] | None] = Field(default_factory=lambda: {"adamw": None, "s2d": {}}, min_length=1)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    split: Split = "test"
    quantize: QuantizeSection = QuantizeSection()
    qat: QATSection | None = None
    reference: Reference | None = None
    export: str | None = None
    audit: bool = True
    device: str = "auto"
    batch_size: int = Field(default=32, ge=1)
    smoke: str | None = None

    @field_validator("arms")
    @classmethod
    def _possible_arms(cls, arms: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
        for name, decay in arms.items():
            if not re.fullmatch(r"[\w.+-]+", name):
                raise InputError(f"an arm's name holds letters, digits and . + - _ only, not {name!r}")
            if name == UNTRAINED and decay is not None:
                raise InputError(f"the arm {UNTRAINED!r} is the model as it is, not trained; give it null")
            if decay is not None:
                arm_settings(decay)
        return arms

    @model_validator(mode="after")
    def _reference_of_an_arm(self) -> Recipe:
        if self.reference is not None:
            if self.reference.arm not in self.arms:
                raise InputError(f"reference.arm={self.reference.arm!r} is no arm; {', '.join(self.arms)} are")
            if FULL not in self.quantize.specs:
                raise InputError(f"reference is a score in full precision; add {FULL} to quantize.specs")
        return self

    @model_validator(mode="after")
    def _export_of_a_promise(self) -> Recipe:
        promise = self.quantize.promise
        if self.export is not None and promise is None:
            raise InputError("export is the file of a promise; add quantize.method: auto with for and within")
        if self.export is not None and promise is not None and not self.export.endswith(promise.suffix):
            raise InputError(
                f"export: {self.export} is written for {promise.runtime.name}; name it NAME{promise.suffix}"
            )
        return self

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise InputError(f"seeds must be different whole numbers from 0 on, not {seeds}")
        return seeds


def arm_settings(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of what an arm trains with, the defaults included.

    Raises:
        InputError: An unknown baseline or keyword (close ones are listed), preset or value.
    """
    return baselines.settings_of(arm) if baselines.KEY in arm else {**arm, **asdict(decay_settings(arm))}


def decay_settings(decay: Mapping[str, Any]) -> DecaySettings:
    """The settings that keywords of `SelectiveSpectralDecay` stand for.

    Raises:
        InputError: An unknown keyword (close ones are listed), preset or value.
    """
    accepted = [name for name in inspect.signature(SelectiveSpectralDecay).parameters if name not in _NOT_FOR_RECIPES]
    for name in decay:
        if name not in accepted:
            raise InputError(f"the decay has no setting {name!r}; {choices(name, accepted)}")
    preset = decay.get("preset") or "default"
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r} is unknown; choose from {', '.join(PRESETS)}")
    named = {field.name for field in fields(DecaySettings)}
    given = {name: value for name, value in decay.items() if name in named and value is not None}
    if "kinds" in given:
        given["kinds"] = tuple(given["kinds"])
    return replace(PRESETS[preset], **given)


# -- reading recipes ---------------------------------------------------------------------------------------------------


def read_recipe(source: str, overrides: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A recipe's name, and the recipe with overrides applied.

    Args:
        source: A packaged recipe's name or a YAML file.
        overrides: ``"key=value"`` with dotted keys and YAML values, such as ``"train.steps=100"``.

    Raises:
        InputError: The recipe is wrong; the message names the first fault in one line.
    """
    name, text = read_text(source)
    return name, make_recipe(parse(text, source), overrides, shown=source)


def new_text(like: str, overrides: Sequence[str] = ()) -> str:
    """The YAML of a recipe as a template: unchanged, with its comments; with overrides, as plain data.

    Raises:
        InputError: As `read_recipe`.
    """
    text = read_text(like)[1]
    if not overrides:
        return text
    data = parse(text, like)
    make_recipe(data, overrides, shown=like)
    for override in overrides:
        override_in(data, override)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def make_recipe(content: Mapping[str, Any], overrides: Sequence[str] = (), *, shown: str = "recipe") -> Recipe:
    """Check plain data; see `read_recipe`."""
    data = dict(content)
    for override in overrides:
        override_in(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{shown}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, key = [str(part) for part in first["loc"]]
        section: type[BaseModel] = Recipe
        for parent in parents:
            inner = section.model_fields[parent].annotation
            inner = next((part for part in get_args(inner) if part is not type(None)), inner)  # of an Optional
            assert isinstance(inner, type) and issubclass(inner, BaseModel)
            section = inner
        return f"unknown key {where}; {choices(key, list(section.model_fields))}"
    if first["type"] == "missing":
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if "ctx" in first and isinstance(first["ctx"].get("error"), InputError):
        return f"{where}: {message}"
    return f"{where}={reprlib.repr(first['input'])}: {message[0].lower()}{message[1:]}"
