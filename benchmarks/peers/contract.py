"""What a peer's file offers: ways to quantize, each one function from a plain model to something that runs.

A file `by_NAME.py` holds `PACKAGE`, what is imported, and functions marked by `@way`. Beside it `by_NAME.txt` has the
versions that `run.py --install NAME` installs on top of the running interpreter's packages. The file's name has a
prefix, because `torchao.py` would hide torchao.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROWS = ("fp32", "w8a8-static", "w8a8-dynamic", "w4a16", "w4a8-static", "w4a8-dynamic", "w4a4-static", "w4a4-dynamic")
Inputs = dict[str, Tensor]
Row = dict[str, np.ndarray]


@dataclass
class Job:
    """What a way gets.

    Attributes:
        model: Plain, in evaluation mode; it may be changed.
        part: The submodule whose Linears are quantized: the encoder, without the head.
        inputs: Calibration examples, the same for everyone.
        labelled: Validation examples with labels, for tools that search on them.
        files: The folder with the model's ONNX files.
        folder: Where a way writes its own files.
    """

    model: nn.Module
    part: str
    inputs: list[Inputs]
    labelled: Callable[[], list[tuple[Inputs, Tensor]]]
    files: Path
    folder: Path

    @property
    def inner(self) -> Any:
        """The encoder."""
        return self.model.get_submodule(self.part)

    def replace(self, inner: nn.Module) -> nn.Module:
        """The model around another encoder."""
        setattr(self.model, self.part, inner)
        return self.model.eval()

    @torch.no_grad()
    def calibrate(self, *_: Any) -> None:
        """Run the model on all calibration examples."""
        for batch in self.inputs:
            self.model(**batch)

    @property
    def torch_file(self) -> Path:
        """What torch.onnx.export wrote, at opset 20."""
        return self.files / "torch.onnx"

    @property
    def s2d_file(self) -> Path:
        """What `s2d export --for any --calibration-set` wrote: the constants of masks are bounded."""
        return self.files / "model.onnx"

    @cached_property
    def names(self) -> list[str]:
        """The inputs of the files."""
        return inputs_of(self.torch_file)

    def feeds(self, padded: bool = False) -> Iterator[Row]:
        """Calibration examples one by one, as a file reads them; texts padded to one length if asked."""
        return rows(even(self.inputs) if padded else self.inputs, self.names)


def inputs_of(file: Path) -> list[str]:
    """The names of an ONNX file's inputs."""
    import onnx

    return [each.name for each in onnx.load(file, load_external_data=False).graph.input]


def rows(batches: Iterable[Inputs], names: Iterable[str]) -> Iterator[Row]:
    """One example after another, with the inputs that a file reads."""
    wanted = set(names)
    for batch in batches:
        for at in range(len(next(iter(batch.values())))):
            yield {name: value[at : at + 1].numpy() for name, value in batch.items() if name in wanted}


def even(batches: Sequence[Inputs]) -> list[Inputs]:
    """Batches of texts filled with zeros, which their masks hide, to the longest; images as they are."""
    longest = max(value.shape[1] for batch in batches for value in batch.values())
    fill = nn.functional.pad
    return [
        {
            name: fill(value, (0, longest - value.shape[1])) if value.dim() == 2 else value
            for name, value in each.items()
        }
        for each in batches
    ]


Quantizer = Callable[[Job], "nn.Module | Path"]


@dataclass(frozen=True)
class Way:
    """A row's offer: `quantize` returns a module, or the path of a file that a runtime opens."""

    row: str
    about: str
    quantize: Quantizer
    file: bool
    alone: bool
    beds: tuple[str, ...]

    @property
    def name(self) -> str:
        """Short, for files and the command line."""
        return self.quantize.__name__.strip("_")


TEXT, IMAGE, LANGUAGE = "text", "image", "language"
ENCODERS = (TEXT, IMAGE)


def way(
    row: str, about: str, *, file: bool = False, alone: bool = False, beds: tuple[str, ...] = (*ENCODERS, LANGUAGE)
) -> Callable[[Quantizer], Quantizer]:
    """Mark a function.

    Args:
        row: One of `ROWS`.
        about: Bits, granularity and settings, for the table.
        file: It reads the model's ONNX files or makes a file.
        alone: A range belongs to a call, so texts are scored one by one.
        beds: Where it is asked.
    """

    def mark(function: Quantizer) -> Quantizer:
        function.ways = [*getattr(function, "ways", []), Way(row, about, function, file, alone, beds)]  # type: ignore
        return function

    return mark
