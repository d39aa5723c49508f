"""The processes that torchrun started, and which of them this one is. A process that was started alone is the first.

All of them run the same command. They train together; the first one alone writes, prints and measures.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from s2d.optional import require

# The others wait for what the first one does alone (evaluating, quantizing), which may take hours. torchrun ends all
# when one fails.
_PATIENCE = timedelta(days=7)

# What the backends and the store say of a connection that broke.
_BROKEN = ("gloo/transport", "NCCL", "DistBackendError", "DistNetworkError", "DistStoreError")


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if count() == 1 else int(os.environ.get("RANK", "0"))


def leads() -> bool:
    """Whether this is the first one."""
    return rank() == 0


def meet(cpu: bool) -> None:
    """Let the processes find each other, if there are several and they have not yet."""
    if count() > 1:
        require("accelerate", "hf").PartialState(cpu=cpu, timeout=_PATIENCE)


def as_first(content: Any) -> Any:
    """A picklable object as the first process has it; the others wait for it. `meet` comes before."""
    if count() == 1:
        return content
    import torch.distributed

    box = [content]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def inside(model: Any) -> Any:
    """The model that torch's DistributedDataParallel holds; any other one itself."""
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def lost_another(error: BaseException) -> bool:
    """Whether an error tells that another process ended while this one waited for it."""
    if count() == 1:
        return False
    text = f"{type(error).__name__}: {error}"  # gloo raises plain RuntimeErrors
    return isinstance(error, RuntimeError) and any(word in text for word in _BROKEN)


def part() -> None:
    """The work is done, and no process needs another any more."""
    if count() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def device_of(name: str) -> str:
    """The device of a name; ``auto`` is an accelerator where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
