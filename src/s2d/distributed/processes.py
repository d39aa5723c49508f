"""The processes that torchrun started, and the rank of this one. A process that was started alone has rank 0.

All of them run the same command. They train together; only the first one writes, prints and measures.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from s2d.optional import require

# The others wait while the first one works alone (evaluation, quantization), which may take hours. torchrun ends all
# when one fails.
_PATIENCE = timedelta(days=7)

# Error messages of the backends and the store for a broken connection.
_BROKEN = ("gloo/transport", "NCCL", "DistBackendError", "DistNetworkError", "DistStoreError")


def count() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The rank of this process, from 0."""
    return 0 if count() == 1 else int(os.environ.get("RANK", "0"))


def leads() -> bool:
    """Whether this is the first one."""
    return rank() == 0


def meet(cpu: bool) -> None:
    """Join the process group, if there are several processes and this has not happened yet."""
    if count() > 1:
        require("accelerate", "hf").PartialState(cpu=cpu, timeout=_PATIENCE)


def as_first(content: Any) -> Any:
    """The first process's value of a picklable object; the others wait for it. Call `meet` first."""
    if count() == 1:
        return content
    import torch.distributed

    box = [content]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def inside(model: Any) -> Any:
    """The model inside torch's DistributedDataParallel; any other model itself."""
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def lost_another(error: BaseException) -> bool:
    """Whether an error tells that another process ended while this one waited for it."""
    if count() == 1:
        return False
    text = f"{type(error).__name__}: {error}"  # gloo raises plain RuntimeErrors
    return isinstance(error, RuntimeError) and any(word in text for word in _BROKEN)


def part() -> None:
    """Leave the process group when the work is done."""
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
