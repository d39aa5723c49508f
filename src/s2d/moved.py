"""Old import paths, for one version: ``s2d.dominance`` gives ``s2d.spectral.pcdr``, with a warning that names both."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# old path -> where it went in 0.2; the whole table goes in 0.3
MOVED = {
    "s2d.dominance": "s2d.spectral.pcdr",
    "s2d.data.image_pile": "s2d.data.images",
    "s2d.evaluation": "s2d.tasks.evaluation",
    "s2d.models.checkpoints": "s2d.models.saved",
    "s2d.quant.attention": "s2d.quant.modules.attention",
    "s2d.quant.channels": "s2d.quant.calibration.transforms",
    "s2d.quant.hadamard": "s2d.quant.numerics.hadamard",
    "s2d.quant.quantizer": "s2d.quant.numerics.quantizer",
    "s2d.recipe": "s2d.experiments.recipe",
    "s2d.selection": "s2d.decay.selection",
    "s2d.selection.base": "s2d.decay.selection.base",
    "s2d.selection.site": "s2d.decay.selection.site",
    "s2d.shrink": "s2d.decay.closed_forms",
    "s2d.spectrum": "s2d.spectral.svd",
    "s2d.tasks.tokens": "s2d.data.tokens",
}


class _OldPaths(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under the path that it had."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for an old path, None for any other."""
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An empty module that reads every name from the new place."""
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}; the old path ends with s2d 0.3", FutureWarning, stacklevel=2)
        found = importlib.import_module(new)
        module = ModuleType(spec.name, found.__doc__)
        module.__dict__.update({name: value for name, value in vars(found).items() if not name.startswith("__")})
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""


def admit_old_paths() -> None:
    """From now on the old paths can be imported."""
    sys.meta_path.insert(0, _OldPaths())  # a folder that an older version left behind is a package to the others
