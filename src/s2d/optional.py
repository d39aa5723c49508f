"""Optional packages, imported where they are needed; torchvision beside a torch it was not built for."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from functools import cache
from types import ModuleType
from typing import Any

from s2d.errors import MissingExtra

_ON_TORCHVISION = ("transformers", "timm", "open_clip")  # they import it where it is installed
# Loggers that speak to developers on every start: torch about the classes of an installed torchao, torchao about its
# kernels for other machines.
_CHATTER = ("torch.utils._pytree", "torchao")


def require(module: str, extra: str, at_least: str | None = None) -> ModuleType:
    """Import an optional dependency when it is first needed.

    Args:
        module: Dotted name of the module, e.g. ``"transformers"``.
        extra: The extra of s2d that brings it, e.g. ``"hf"``.
        at_least: The first version that does what is needed here, if an older one may be installed.

    Raises:
        MissingExtra: It is not installed, or too old.
    """
    if module.split(".")[0] in _ON_TORCHVISION:
        declare_missing_operators()
        for name in _CHATTER:
            if logging.getLogger(name).level == logging.NOTSET:  # nobody has asked for them
                logging.getLogger(name).setLevel(logging.ERROR)
    try:
        found = importlib.import_module(module)
        version = str(getattr(found, "__version__", ""))
        if at_least is not None and version and _numbers(version) < _numbers(at_least):
            raise MissingExtra(
                f'{module} {version} is too old, {at_least} is needed; run: pip install --upgrade "s2d[{extra}]"'
            )
        return found
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise MissingExtra(f'{package} is needed here and is not installed; run: pip install "s2d[{extra}]"') from None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


# PyPI's torchvision for Linux is built for CUDA. Beside a CPU build of torch its import fails ("operator
# torchvision::nms does not exist"), and with it that of timm, of open_clip and of most of transformers. Declaring the
# operators is all that the import needs; they cannot be called then, and nothing here does.
_OPERATORS = ("nms", "qnms")
_ALIVE: list[Any] = []  # operators are declared as long as their library lives


@cache
def declare_missing_operators() -> None:
    """Does nothing where torchvision is missing, whole, or broken in another way: its import will tell."""
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            return
    else:
        return
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    _ALIVE.append(library)
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
