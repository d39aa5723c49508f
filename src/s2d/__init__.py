"""Selective Spectral Decay: audit, fine-tune, quantize and export transformers for 4 bits.

The public names load on first use, so that ``import s2d`` costs nothing, and the command line's help and the report
need no torch. ``audit``, ``export`` and ``tasks`` are functions here and also modules of the package:
``s2d.audit(model, batches)`` calls the function, ``from s2d.audit import Audit`` reads the module.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from s2d.moved import admit_old_paths

if TYPE_CHECKING:
    from s2d.audit import audit as audit
    from s2d.checkpoint import load as load
    from s2d.checkpoint import save as save
    from s2d.decay import SelectiveSpectralDecay as SelectiveSpectralDecay
    from s2d.errors import InputError as InputError
    from s2d.experiments.auto.search import auto as auto
    from s2d.export import export as export
    from s2d.export import exporters as exporters
    from s2d.models.tracing import trace as trace
    from s2d.quant import methods as methods
    from s2d.quant import quantize as quantize
    from s2d.quant.allocate import allocate as allocate
    from s2d.quant.distillation import Distiller as Distiller
    from s2d.quant.qat import QATSchedule as QATSchedule
    from s2d.quant.qat import finish_qat as finish_qat
    from s2d.quant.qat import prepare_qat as prepare_qat
    from s2d.quant.qat import qat_parameters as qat_parameters
    from s2d.spectral.pcdr import pcdr as pcdr
    from s2d.spectral.svd import top_singular as top_singular
    from s2d.tasks import create as task
    from s2d.tasks import tasks as tasks
    from s2d.tasks.evaluation import evaluate as evaluate
    from s2d.training import TrainSettings as TrainSettings
    from s2d.training import train as train

__version__ = "0.1.0"

# public name -> (the module that holds it, its name there)
_HOMES = {
    "Distiller": ("s2d.quant.distillation", "Distiller"),
    "InputError": ("s2d.errors", "InputError"),
    "QATSchedule": ("s2d.quant.qat", "QATSchedule"),
    "SelectiveSpectralDecay": ("s2d.decay", "SelectiveSpectralDecay"),
    "TrainSettings": ("s2d.training", "TrainSettings"),
    "allocate": ("s2d.quant.allocate", "allocate"),
    "audit": ("s2d.audit", "audit"),
    "auto": ("s2d.experiments.auto.search", "auto"),
    "evaluate": ("s2d.tasks.evaluation", "evaluate"),
    "export": ("s2d.export", "export"),
    "exporters": ("s2d.export", "exporters"),
    "finish_qat": ("s2d.quant.qat", "finish_qat"),
    "load": ("s2d.checkpoint", "load"),
    "methods": ("s2d.quant", "methods"),
    "pcdr": ("s2d.spectral.pcdr", "pcdr"),
    "prepare_qat": ("s2d.quant.qat", "prepare_qat"),
    "qat_parameters": ("s2d.quant.qat", "qat_parameters"),
    "quantize": ("s2d.quant", "quantize"),
    "save": ("s2d.checkpoint", "save"),
    "task": ("s2d.tasks", "create"),
    "tasks": ("s2d.tasks", "tasks"),
    "top_singular": ("s2d.spectral.svd", "top_singular"),
    "trace": ("s2d.models.tracing", "trace"),
    "train": ("s2d.training", "train"),
}
__all__ = [  # written out for type checkers; the same names as _HOMES
    "Distiller",
    "InputError",
    "QATSchedule",
    "SelectiveSpectralDecay",
    "TrainSettings",
    "allocate",
    "audit",
    "auto",
    "evaluate",
    "export",
    "exporters",
    "finish_qat",
    "load",
    "methods",
    "pcdr",
    "prepare_qat",
    "qat_parameters",
    "quantize",
    "save",
    "task",
    "tasks",
    "top_singular",
    "trace",
    "train",
]


def _public(name: str) -> property:
    """Reads a public name from its home. Importing a submodule of that name tries to set it, which must not win."""
    module, attribute = _HOMES[name]

    def read(_: ModuleType) -> Any:
        return getattr(importlib.import_module(module), attribute)

    return property(read, lambda _, __: None)


class _Face(ModuleType):
    """The package as people see it; its properties come before the submodules that the import system binds."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return importlib.import_module, (__name__,)  # by name, as every module: Ray sends functions that use this one


for _name in _HOMES:
    setattr(_Face, _name, _public(_name))
sys.modules[__name__].__class__ = _Face
admit_old_paths()
