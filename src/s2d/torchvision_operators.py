"""torchvision beside a torch that it was not built for: what does not need its compiled operators works all the same.

PyPI's torchvision for Linux is built for CUDA. Beside a CPU build of torch its import fails ("operator torchvision::nms
does not exist"), and with it that of timm, of open_clip and of most of transformers. Declaring the operators is all
that the import needs; they cannot be called then, and nothing here does.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

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
