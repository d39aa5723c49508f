"""Post-training quantization methods, one file each; a file registers its method and nothing else has to change."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Protocol

from s2d.errors import InputError
from s2d.quant.calibration import Job


class Method(Protocol):
    """A PTQ method: finds ranges (and may change weights), with all quantizers still off when it returns."""

    def __call__(self, job: Job) -> None:
        """Do the work on ``job.model``."""
        ...


_METHODS: dict[str, tuple[str, Method]] = {}


def register(name: str, summary: str) -> Callable[[Method], Method]:
    """Register the decorated function as method ``name``, with one line about it."""

    def add(method: Method) -> Method:
        assert name not in _METHODS, f"method {name} is registered twice"
        _METHODS[name] = (summary, method)
        return method

    return add


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def methods() -> dict[str, str]:
    """Every method's name, with one line about it."""
    _import_all()
    return {name: summary for name, (summary, _) in sorted(_METHODS.items())}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: There is none.
    """
    known = methods()
    if name not in known:
        raise InputError(f"unknown quantization method {name!r}; choose from {', '.join(known)}")
    return _METHODS[name][1]
