"""Runtimes as data: the formats that a runtime takes, and the kernels that it runs for them.

A runtime is one file, ``runtimes/NAME.yaml``, in the schema of `Runtime`; adding the file adds the runtime to
``s2d quantize --for NAME``, ``s2d export --for NAME`` and ``--method auto``. Nothing here touches a model's weights: a
plan (the list of its sites) is legal for a runtime or not, and is refused by name before any work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from s2d.errors import InputError, choices, visible
from s2d.export.operators import Form
from s2d.optional import require
from s2d.quant.modules.sites import Site
from s2d.quant.numerics.formats import get_format
from s2d.quant.spec import QuantSpec

FOLDER = Path(__file__).with_name("runtimes")
Granularity = Literal["tensor", "channel", "group", "token", "head", "span", "block"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _known_formats(names: list[str]) -> list[str]:
    for name in names:
        get_format(name)
    return names


class Tensors(_Section):
    """What a weight, an input of a layer or an operand of attention may be.

    Attributes:
        formats: Names of number formats: ``int8`` is symmetric, ``uint8`` has a zero point.
        granularity: What has a scale of its own. Of activations, ``tensor`` and ``head`` are static ranges, ``token``
            and ``span`` are found anew in every forward.
        groups: Inputs that may share a scale where granularity is ``group``; empty for any number.
    """

    formats: Annotated[list[str], AfterValidator(_known_formats), Field(min_length=1)]
    granularity: list[Granularity] = Field(min_length=1)
    groups: list[int] = []

    def takes(self, site: Site) -> bool:
        """Whether a quantized site is one of these."""
        if site.format is None or site.format.name not in self.formats or site.granularity not in self.granularity:
            return False
        return site.granularity != "group" or not self.groups or site.group in self.groups

    def __str__(self) -> str:
        sizes = f" of {' or '.join(map(str, self.groups))}" if self.groups else ""
        names = f"{self.formats[0]} to {self.formats[-1]}" if len(self.formats) > 2 else " or ".join(self.formats)
        return f"{names} ({' or '.join(self.granularity)}{sizes})"


class Layer(_Section):
    """One kind of product that a runtime has for Linears and convolutions.

    Attributes:
        weights: Of its weight.
        inputs: Of its input; None for inputs that stay in floating point.
        kernel: The kernel that really runs, as text.
        time: Milliseconds relative to the same layer in full precision in this runtime; None where not measured.
        source: Where `time` and `kernel` are from.
        inputs_divide_by: The number of inputs of a layer is a multiple of it.
        outputs_divide_by: The number of its outputs.
    """

    weights: Tensors
    inputs: Tensors | None = None
    kernel: str
    time: float | None = Field(default=None, gt=0)
    source: str
    inputs_divide_by: int = Field(default=1, ge=1)
    outputs_divide_by: int = Field(default=1, ge=1)

    def takes(self, weight: Site, input: Site | None) -> bool:
        """Whether it computes a layer with this weight and input."""
        quantized = input is not None and input.format is not None
        if not self.weights.takes(weight) or quantized != (self.inputs is not None):
            return False
        return self.inputs is None or (input is not None and self.inputs.takes(input))

    def __str__(self) -> str:
        return f"weights {self.weights} with inputs {self.inputs or 'in floating point'}"


class Attention(_Section):
    """What a runtime takes of the operands q, k, probs and v of attention; see `Layer`."""

    operands: Tensors
    kernel: str
    time: float | None = Field(default=None, gt=0)
    source: str


class Compiler(_Section):
    """What a compiler that quantizes by itself reads: the folder of ``s2d export --calibration-set``.

    Attributes:
        opset: Of the float32 ONNX file.
        images: ``"nhwc"`` when its calibration images are channels last, in ``calibration.npy``.
        raw: Whether it reads a list of raw files beside the .npz.
        stream: ``"float"`` where the file keeps the residual stream in full precision, see `float_stream`.
        scripts: Small programs that go into the folder, by name; ``{batch}`` stands for the size of a batch.
        commands: What the user runs there, in order.
        source: Source of these facts.
        notes: What its users should know, a line each.
    """

    opset: int = Field(default=21, ge=13)
    images: Literal["nchw", "nhwc"] = "nchw"
    raw: bool = False
    stream: Literal["quantized", "float"] = "quantized"
    scripts: dict[str, str] = {}
    commands: list[str] = Field(min_length=1)
    source: str
    notes: list[str] = []


class Runtime(_Section):
    """What one runtime can hold and run.

    Attributes:
        name: What users call it: the file's name.
        about: One line.
        files: Suffixes of what s2d writes for it, the best first; empty text is a folder. None: nothing is written.
        provider: Its execution provider in onnxruntime; None where it has none.
        form: Form of ONNX that it reads; see `s2d.export.operators`.
        runner: The module of Python that runs the file on this machine; None where none does.
        extra: The extra of s2d that installs it.
        spec: The spec to begin with, as for ``--spec``.
        weight_bits: Widths in which codes of weights are stored; a code takes the next one up.
        embedding_bits: Of tables of embeddings; 0 leaves them.
        layers: Products of Linears. Empty for a runtime that quantizes by itself.
        attention: Operands of attention, beside those in full precision.
        keeps: Layers may stay in full precision.
        together: Last names of layers that the runtime fuses, so that they share their formats.
        prefix: First tokens may stay at full precision.
        shapes: Whether batch and length may vary in the file.
        notes: What else its users should know, a line each.
        compiler: Where it takes a model in full precision: what it reads.
    """

    name: str
    about: str
    files: list[Literal[".onnx", ".xml", ".pte", ".gguf", ".encodings", ".mlpackage", ""]]
    provider: str | None = None
    form: Form = "qdq"
    runner: str | None = None
    extra: str | None = None
    spec: str | dict[str, Any] | None = None
    weight_bits: list[int] = [8]
    embedding_bits: list[int] = [0]
    layers: list[Layer] = []
    attention: list[Attention] = []
    keeps: bool = True
    together: list[list[str]] = []
    prefix: bool = False
    shapes: Literal["free", "fixed"] = "free"
    notes: list[str] = []
    compiler: Compiler | None = None

    @model_validator(mode="after")
    def _whole(self) -> Runtime:
        if bool(self.layers) != (self.spec is not None):
            raise InputError("a runtime with layers has a spec to begin with, and one without layers has none")
        if self.spec is not None:
            QuantSpec.parse(self.spec)
        return self

    @property
    def quantizes_itself(self) -> bool:
        """Whether it takes a model in full precision, and nothing that is quantized already."""
        return not self.layers

    @property
    def installed(self) -> bool:
        """Whether a file can be run here."""
        return self.runner is not None and importlib.util.find_spec(self.runner) is not None

    @property
    def fixes_shapes(self) -> str:
        """Why a file needs its sizes, in words; empty where they are free."""
        return f"{self.name} compiles fixed shapes" if self.shapes == "fixed" else ""

    def require(self) -> None:
        """Refuse early where the runtime's package is needed and missing.

        Raises:
            MissingExtra: With the line that installs it.
        """
        if self.runner is not None:
            require(self.runner, self.extra or self.runner)

    def check_file(self, path: Path) -> None:
        """Refuse a file name whose suffix this runtime does not read.

        Raises:
            InputError: With the names that do.
        """
        if not self.files:
            raise InputError(f"s2d writes no file for {self.name}; {' '.join(self.notes) or self.about}")
        if path.suffix not in self.files:
            names = " or ".join(f"{path.stem}{each}" if each else "a folder (no suffix)" for each in self.files)
            raise InputError(f"{path}: {self.name} reads {names}; give the file such a name")

    def stored_bits(self, bits: int) -> int:
        """What a code of a weight takes on disk."""
        return next((each for each in sorted(self.weight_bits) if each >= bits), max(self.weight_bits))

    def complaint(self, sites: Sequence[Site]) -> str | None:
        """The first thing in a plan that this runtime cannot hold, in one line with the nearest remedy; None if all is
        legal.
        """
        if self.quantizes_itself:
            return f"{self.name} quantizes by itself: {' '.join(self.notes) or 'give it the plain model'}"
        begin = f"--spec {quoted(self.spec)}"
        held = stack_complaint(sites, self.name)
        if held is not None:
            return held
        inputs = {site.module: site for site in sites if site.what == "input"}
        for site in sites:
            if site.prefix and not self.prefix:
                return f"{site.name}: {self.name} keeps no first tokens at full precision; leave out the prefix"
            if site.what == "weight":
                found = self._layer_complaint(site, inputs.get(site.module))
                if found is not None:
                    return f"{found}; for {self.name} begin with {begin}"
            elif site.what == "input":
                if site.format is not None and not any(s.what == "weight" and s.module == site.module for s in sites):
                    return f"{site.name}: {self.name} rounds an input together with its weight; begin with {begin}"
            elif site.format is not None and not any(each.operands.takes(site) for each in self.attention):
                legal = " or ".join(str(each.operands) for each in self.attention) or "in full precision"
                return (
                    f"{site.name} is {_shown(site)}, and {self.name} takes operands of attention {legal}; begin "
                    f"with {begin}"
                )
        return self._apart(sites, inputs)

    def _layer_complaint(self, weight: Site, input: Site | None) -> str | None:
        rounded = input is not None and input.format is not None
        if weight.format is None:
            if rounded:
                return f"{weight.module}: {self.name} has no product of a full-precision weight and a rounded input"
            return None if self.keeps else f"{weight.module}: {self.name} takes no layer in full precision"
        fitting = [layer for layer in self.layers if layer.takes(weight, input)]
        if not fitting:
            entered = _shown(input) if rounded and input is not None else "in floating point"
            legal = "; or ".join(str(layer) for layer in self.layers)
            return (
                f"{weight.module}: {self.name} has no product of weights {_shown(weight)} with inputs {entered}, but "
                f"{legal}"
            )
        for layer in fitting:
            outputs, *rest = weight.shape
            read = 1
            for size in rest:
                read *= size
            if read % layer.inputs_divide_by == 0 and outputs % layer.outputs_divide_by == 0:
                return None
        layer = fitting[0]
        return (
            f"{weight.module} of {outputs} x {read}: {self.name} takes multiples of {layer.outputs_divide_by} outputs "
            f"and {layer.inputs_divide_by} inputs; keep this layer (an override {weight.module}: keep)"
        )

    def _apart(self, sites: Sequence[Site], inputs: dict[str, Site]) -> str | None:
        """Whether layers that the runtime fuses have different formats."""
        for names in self.together:
            groups: dict[str, dict[str, tuple[str, str]]] = {}
            for site in sites:
                parent, _, last = site.module.rpartition(".")
                if site.what == "weight" and last in names:
                    input = inputs.get(site.module)
                    groups.setdefault(parent, {})[last] = (_shown(site), "" if input is None else _shown(input))
            for parent, found in groups.items():
                if len(set(found.values())) > 1:
                    told = ", ".join(f"{last} {' x '.join(filter(None, kinds))}" for last, kinds in found.items())
                    return f"{parent}: {self.name} computes {', '.join(found)} as one, and they differ ({told})"
        return None

    def refuse(self, sites: Sequence[Site]) -> None:
        """Refuse a plan that the runtime cannot hold.

        Raises:
            InputError: The first such site, and the nearest remedy.
        """
        found = self.complaint(sites)
        if found is not None:
            raise InputError(found)

    def time_of(self, sites: Iterable[Site]) -> float | None:
        """Relative time of the plan's layers, each weighted by its number of weights; None where one is unknown."""
        known = list(sites)
        inputs = {site.module: site for site in known if site.what == "input"}
        total = spent = 0.0
        for site in known:
            if site.what != "weight":
                continue
            size = 1.0
            for length in site.shape:
                size *= length
            times = [1.0] if site.format is None else []
            times += [each.time for each in self.layers if each.takes(site, inputs.get(site.module)) and each.time]
            if not times:
                return None
            total, spent = total + size, spent + size * min(times)
        return spent / total if total else None


def stack_complaint(sites: Sequence[Site], target: str) -> str | None:
    """That a plan rounds stacks of matrices, which no file of ours holds; None if it rounds none."""
    stacks = list(dict.fromkeys(site.module for site in sites if site.summed and site.format is not None))
    if not stacks:
        return None
    more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
    last = "*." + stacks[0].rpartition(".")[2]
    return (
        f"{stacks[0]}{more} hold the matrices of several experts in one parameter, and no file for {target} holds "
        f"these rounded yet; keep them (an override {last}: keep for each name), or use the folder that quantize saved"
    )


def device_of(runtime: Runtime, path: Path, needed: bool) -> str | None:
    """The execution provider that a runtime has here, to ask it for a file's nodes; None where it cannot be asked.

    Args:
        runtime: The runtime.
        path: The file.
        needed: The placement is asked for, so a missing provider is an error.

    Raises:
        InputError: This onnxruntime has none of that name.
    """
    if runtime.provider is None or path.suffix != ".onnx":
        return None
    installed = require("onnxruntime", "export").get_available_providers()
    if runtime.provider in installed:
        return runtime.provider
    if needed:
        raise InputError(
            f"this onnxruntime has no {runtime.provider}, so nobody knows here what {runtime.name} runs; "
            "leave out --no-fallback, and ask there: s2d bench FILE --provider NAME --no-fallback"
        )
    return None


def sizes_for(runtime: Runtime, path: Path, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes of a file for a runtime.

    Raises:
        InputError: The runtime compiles fixed shapes, and none are given.
    """
    if runtime.fixes_shapes and path.suffix in (".onnx", ".mlpackage") and not sizes:
        raise InputError(
            f"{runtime.fixes_shapes}; add --shape batch=1,tokens=128 for texts, --shape batch=1 for images"
        )
    return sizes


def _shown(site: Site) -> str:
    if site.format is None:
        return "in full precision"
    return f"{site.format.name} ({site.granularity}{f' of {site.group}' if site.group else ''})"


def quoted(spec: str | dict[str, Any] | None) -> str:
    """A spec as the command line takes it."""
    if isinstance(spec, dict):
        return f"'{yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=10_000).strip()}'"
    return str(spec)


@lru_cache(maxsize=1)
def runtimes() -> dict[str, Runtime]:
    """Every runtime by its name."""
    return {path.stem: read_runtime(path) for path in sorted(FOLDER.glob("*.yaml"))}


def find_runtime(name: str) -> Runtime:
    """A runtime by its name.

    Raises:
        InputError: There is none; close names are listed.
    """
    names = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    if name not in names:
        raise InputError(f"unknown runtime {name!r}; {choices(name, names)}")
    return read_runtime(names[name])


def read_runtime(path: Path) -> Runtime:
    """Read one file.

    Raises:
        InputError: It is no YAML, or not in the schema; the line names the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as YAML: {visible(' '.join(str(error).split()), 200)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold keys and values, such as about: and layers:")
    try:
        return Runtime.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    # A misspelt key is also a missing one; report the misspelling first.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *parents, key = map(str, first["loc"])
        sections: dict[str, type[BaseModel]] = {"layers": Layer, "attention": Attention, "compiler": Compiler}
        inner = sections.get(parents[0], Runtime) if parents else Runtime
        if parents and parents[-1] in ("weights", "inputs", "operands"):
            inner = Tensors
        return f"unknown key {where}; {choices(key, list(inner.model_fields))}"
    if first["type"] == "missing":
        return f"{where} is missing"
    return (
        f"{where}: {first['msg'].removeprefix('Value error, ')}"
        if where
        else first["msg"].removeprefix("Value error, ")
    )
