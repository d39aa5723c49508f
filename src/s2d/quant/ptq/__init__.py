"""Post-training quantization methods, one file each; a file registers its method and nothing else has to change.

Methods come in three stages. A *transform* changes weights so that they quantize better and the full-precision function
stays what it was (rotation, smoothing). A *rounding* finds the ranges and the final weights (round to nearest, GPTQ). A
*correction* makes up for the rounding: it adds a layer (QwT), or trains the weights on their grid (Block-AP).
``"rotation+gptq+qwt"`` runs any number of transforms in the given order, then one rounding (without one, ``rtn``), then
any number of corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias, get_args

from torch import nn

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.quant.calibration.observe import Job, Stage
from s2d.quant.modules.sites import Site
from s2d.registry import Registry

DEFAULT_ROUNDING = "rtn"


class Method(Protocol):
    """A PTQ method.

    A transform finds the quantizers inserted, off and without ranges, and leaves them so. A rounding gives every static
    quantizer its range and leaves the final weights in place, with all quantizers off when it returns. So does a
    correction, which finds them so.
    """

    def __call__(self, job: Job) -> None:
        """Do the work on ``job.model``."""
        ...


# Raises InputError where a method cannot work on a model: its plan, its graph, the methods that come before.
Check: TypeAlias = Callable[[nn.Module, Sequence[Site], Graph, Sequence[str]], None]


@dataclass(frozen=True)
class Entry:
    """A registered method; see `register`."""

    name: str
    summary: str
    stage: Stage
    passes: float
    method: Method
    shares: bool
    check: Check | None
    splits: bool


_METHODS: Registry[Entry] = Registry("method", "s2d.quant.ptq")


def register(
    name: str,
    summary: str,
    stage: Stage = "rounding",
    *,
    passes: float = 1.0,
    shares: bool = False,
    check: Check | None = None,
    splits: bool = False,
) -> Callable[[Method], Method]:
    """Register the decorated function as a method.

    Args:
        name: What users call it.
        summary: One line about it.
        stage: What kind of method it is.
        passes: How many forwards of the whole model a batch costs, about; for estimates of time.
        shares: The method reduces all its statistics over ``job.ranks``, so ranks can share the data.
        check: Called with the plan, before any work and by a dry run: raises InputError where the method cannot work.
        splits: It takes a part out of the weights, so no other transform may follow.
    """

    def add(method: Method) -> Method:
        assert "+" not in name, f"a + joins methods; {name} cannot be one"
        _METHODS.add(name, Entry(name, summary, stage, passes, method, shares, check, splits))
        return method

    return add


def methods() -> dict[str, str]:
    """Every method's name, with one line about it."""
    return {name: entry.summary for name, entry in sorted(_METHODS.all().items())}


def get_methods(text: str) -> list[Entry]:
    """The methods of ``"a+b"``: transforms, the rounding (``rtn`` when none is named), corrections.

    Raises:
        InputError: An unknown name, the same name twice, two roundings, or another order of the stages.
    """
    known = _METHODS.all()
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in known:
            raise InputError(
                f"unknown quantization method {name!r}; choose from {', '.join(sorted(known))}, or join with +"
            )
    if len(set(names)) < len(names):
        raise InputError(f"method {text!r} names one method twice; name each once")
    by_stage = {stage: [name for name in names if known[name].stage == stage] for stage in get_args(Stage)}
    if len(by_stage["rounding"]) > 1:
        raise InputError(f"method {text!r}: {' and '.join(by_stage['rounding'])} both round the weights; choose one")
    ordered = [name for members in by_stage.values() for name in members]
    if ordered != names:
        raise InputError(
            f"method {text!r}: transforms come first, then the rounding, then corrections; write {'+'.join(ordered)}"
        )
    for name, after in pairwise(by_stage["transform"]):
        if known[name].splits:
            raise InputError(f"{after} changes weights of which {name} has taken a part out; write {after}+{name}")
    by_stage["rounding"] = by_stage["rounding"] or [DEFAULT_ROUNDING]
    return [known[name] for members in by_stage.values() for name in members]


def refuse_unfit(text: str, model: nn.Module, sites: Sequence[Site], graph: Graph) -> None:
    """Refuse methods (as for `get_methods`) that cannot work on a model.

    Raises:
        InputError: The first method's reason.
    """
    earlier: list[str] = []
    for entry in get_methods(text):
        if entry.check is not None:
            entry.check(model, sites, graph, earlier)
        earlier.append(entry.name)


def refuse_undivided(entries: Sequence[Entry]) -> None:
    """Refuse methods that need all data in one process.

    Raises:
        InputError: There are such; the message names them, and those that can divide.
    """
    whole = [entry.name for entry in entries if not entry.shares]
    if whole:
        able = ", ".join(sorted(name for name, entry in _METHODS.all().items() if entry.shares))
        raise InputError(
            f"{' and '.join(whole)} cannot divide the calibration data among processes; start s2d without torchrun, or "
            f"choose from {able}"
        )
