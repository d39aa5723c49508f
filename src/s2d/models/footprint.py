"""Memory estimates from the shapes in a model's files, before it is loaded.

Counted are the large parts only: copies of the weights, the optimizer's state, a refresh of the decay, the activations
of one batch, and the libraries themselves. docs/results/smollm2.md compares the sum with what was measured.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from s2d.errors import InputError
from s2d.models import packages
from s2d.models.saved import CONFIG_NAME, WEIGHTS_NAME, check_safetensors
from s2d.optional import require

Shapes = dict[str, tuple[int, ...]]

FLOAT = 4  # bytes of a number: weights are loaded in fp32
LIBRARIES = 800 * 2**20  # torch, transformers and accelerate in use: the remainder of a measured peak
# Numbers that a Linear keeps for its backward pass and its surroundings (norm, activation, residual) for theirs, as a
# share of its inputs and outputs.
_SURROUNDINGS = 2
# Rows that spectral iterations and principal directions hold of a matrix: components looked at, and their spares.
_SKINNY = 6
# Tables of a vocabulary: one row a token, so they multiply no activations but those that are scored.
_TABLES = ("embed", "lm_head", "token_embd", "wte", "output.weight")
_SCORES, _SCORED = 6, 256  # tensors of scores at a time, for so many tokens


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in self.parts.items() if size)
        return f"{_gb(self.total)} GB ({parts})"


def shapes_of(source: str | os.PathLike[str]) -> Shapes | None:
    """The shapes of the tensors in a model's files by name, read from their headers; None without local files.

    Args:
        source: As for `s2d.models.load`: a folder, a safetensors or GGUF file, or an installed package.

    Raises:
        InputError: A file that is damaged.
    """
    path = Path(source).expanduser()
    if not path.exists():
        folder = packages.package_folder(os.fspath(source))
        found = None if folder is None else packages.find_model(folder)
        if found is None:
            return None
        path = found
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return _safetensors([path / WEIGHTS_NAME])
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    return _safetensors(files) if files else None


def introduction(source: str) -> str | None:
    """A model's name and size, read from its files without loading it; None without local files."""
    shapes = shapes_of(source)
    if shapes is not None:
        return f"{source}: {size_text(_numbers(shapes))}"
    folder = None if Path(source).expanduser().exists() else packages.package_folder(source.partition("?")[0])
    sizes = [] if folder is None else [file.stat().st_size for file in folder.rglob("*.onnx")]
    return f"{source}: a file of {max(sizes) / 1e6:.1f} MB" if sizes else None


def size_text(numbers: int) -> str:
    """A count of weights, such as ``"22.6 million numbers"``."""
    return f"{numbers / 1e6:.1f} million numbers" if numbers >= 50_000 else f"{numbers} numbers"


def to_load(shapes: Shapes, copies: int) -> Footprint:
    """The memory for a number of copies of a model."""
    return Footprint({"weights": copies * _numbers(shapes) * FLOAT, "libraries": LIBRARIES})


def to_train(shapes: Shapes, tokens: int, *, quantized: bool = False) -> Footprint:
    """The memory to train a model with AdamW and the decay, with a copy of the original model.

    Args:
        shapes: Shapes of its tensors.
        tokens: Tokens of one batch.
        quantized: Whether quantizers are in place. Then inputs are stored twice, exact and rounded. The source model
            and the task's teacher are in memory too.
    """
    weights = _numbers(shapes) * FLOAT
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and not _is_table(name)]
    vocabulary = max((max(shape) for name, shape in shapes.items() if _is_table(name)), default=0)
    edges = sum(sum(shape) for shape in matrices)
    copies = 2 if quantized else 1
    return Footprint(
        {
            "weights": weights,
            "gradients": weights,
            "optimizer": 2 * weights,
            "original": copies * weights,
            "refresh": edges * _SKINNY * FLOAT,
            "activations": copies * edges * _SURROUNDINGS * tokens * FLOAT
            + _SCORES * min(tokens, _SCORED) * vocabulary * FLOAT,
            "libraries": LIBRARIES,
        }
    )


def to_train_blocks(shapes: Shapes, tokens: int, batches: int) -> Footprint:
    """The memory to condition a model block by block (see `s2d.training.blockwise`).

    Args:
        shapes: Shapes of its tensors.
        tokens: Tokens of one batch.
        batches: Number of batches that are held.
    """
    blocks: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        number = re.match(r".*?\.\d+\.", name)
        if number is not None:
            blocks.setdefault(number.group(), {})[name] = shape
    largest = max(blocks.values(), key=_numbers, default=shapes)
    width = max((min(shape) for shape in largest.values() if len(shape) == 2), default=0)
    one = to_train(largest, tokens)
    # The tokens that the block is given now and was given once, and what it made of them then.
    streams = 3 * batches * tokens * width * FLOAT
    kept = ("gradients", "optimizer", "refresh", "activations", "libraries")
    return Footprint(
        {"weights": _numbers(shapes) * FLOAT, "tokens": streams, **{name: one.parts[name] for name in kept}}
    )


def refuse_too_little(doing: str, model: str, device: str, needed: Callable[[Shapes], Footprint] | None = None) -> None:
    """Refuse a job that does not fit into memory, before the model is loaded.

    Args:
        doing: Name of the job for the message, such as ``"conditioning"``.
        model: As for `shapes_of`; without shapes nothing is refused.
        device: Device of the job.
        needed: Memory needed; by default two copies, the loaded model and the working copy.

    Raises:
        InputError: There is less memory; the message holds both numbers and the largest part.
    """
    if (shapes := shapes_of(model)) is None or (free := available(device)) is None:
        return
    wanted = to_load(shapes, copies=2) if needed is None else needed(shapes)
    if wanted.total > free:
        raise InputError(
            f"too little memory: {doing} {model} takes about {wanted}, and {_gb(free)} GB are free; "
            "use a smaller model or batch, or a machine with more memory"
        )


def available(device: str = "cpu") -> int | None:
    """Free bytes: of the machine, within the limit of a container, or of an accelerator."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    if device != "cpu":
        return None
    free = [int(require("psutil", "hf").virtual_memory().available)]
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return max(0, min(free))


def _gb(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _is_table(name: str) -> bool:
    return any(part in name for part in _TABLES)


def _safetensors(files: Iterable[Path]) -> Shapes:
    shapes: Shapes = {}
    for file in files:
        check_safetensors(file)
        with safe_open(file, framework="pt") as held:
            shapes |= {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
    return shapes


def _gguf(file: Path) -> Shapes:
    """GGUF lists a matrix's inputs first."""
    try:
        tensors = require("gguf", "hf").GGUFReader(file).tensors
    except (OSError, ValueError, IndexError, KeyError):
        raise InputError(f"{file} is not a GGUF file or is damaged; download it again") from None
    return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in tensors}
