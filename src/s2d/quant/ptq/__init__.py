"""Post-training quantization methods, one file each; a file registers its method and nothing else has to change.

Methods come in two stages. A *transform* changes weights so that they quantize better and the full-precision function
stays what it was (rotation, smoothing). A *rounding* finds the ranges and the final weights (round to nearest, GPTQ).
``"rotation+gptq"`` runs any number of transforms in the given order and then one rounding; without one, ``rtn``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from s2d.errors import InputError
from s2d.quant.calibration.observe import Job, Stage
from s2d.registry import Registry

DEFAULT_ROUNDING = "rtn"


class Method(Protocol):
    """A PTQ method.

    A transform finds the quantizers inserted, off and without ranges, and leaves them so. A rounding gives every static
    quantizer its range and leaves the final weights in place, with all quantizers off when it returns.
    """

    def __call__(self, job: Job) -> None:
        """Do the work on ``job.model``."""
        ...


@dataclass(frozen=True)
class Entry:
    """A registered method: its name, one line about it, its stage, how often it reads the data, the method, and whether
    ranks can each read a share of the data.
    """

    name: str
    summary: str
    stage: Stage
    passes: float
    method: Method
    shares: bool


_METHODS: Registry[Entry] = Registry("method", "s2d.quant.ptq")


def register(
    name: str, summary: str, stage: Stage = "rounding", *, passes: float = 1.0, shares: bool = False
) -> Callable[[Method], Method]:
    """Register the decorated function as a method.

    Args:
        name: What users call it.
        summary: One line about it.
        stage: What kind of method it is.
        passes: How many forwards of the whole model a batch costs, about; for estimates of time.
        shares: The method reduces all its statistics over ``job.ranks``, so ranks can share the data.
    """

    def add(method: Method) -> Method:
        assert "+" not in name, f"a + joins methods; {name} cannot be one"
        _METHODS.add(name, Entry(name, summary, stage, passes, method, shares))
        return method

    return add


def methods() -> dict[str, str]:
    """Every method's name, with one line about it."""
    return {name: entry.summary for name, entry in sorted(_METHODS.all().items())}


def get_methods(text: str) -> list[Entry]:
    """The methods of ``"a+b"``, transforms first and the rounding (``rtn`` when none is named) last.

    Raises:
        InputError: An unknown name, the same name twice, two roundings, or a transform after the rounding.
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
    roundings = [name for name in names if known[name].stage == "rounding"]
    if len(roundings) > 1:
        raise InputError(f"method {text!r}: {' and '.join(roundings)} both round the weights; choose one of them")
    if roundings and names[-1] != roundings[0]:
        names.remove(roundings[0])
        raise InputError(
            f"method {text!r}: {roundings[0]} rounds and comes last; write {'+'.join([*names, *roundings])}"
        )
    return [known[name] for name in names] + ([] if roundings else [known[DEFAULT_ROUNDING]])


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
