"""A calibration that can be interrupted: every finished block is kept in a folder, and a second call starts after it.

The folder holds ``resume.json`` (the settings of the work: model, data, spec, method, seed) and one safetensors file a
block: its final weights and the state of its quantizers. Each file appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from s2d.errors import InputError, first_line
from s2d.io.files import write_atomic, write_json

VERSION = 1
INDEX = "resume.json"


class Snapshot:
    """A copy of a model's parameters and buffers, to restore them when a call fails."""

    def __init__(self, model: nn.Module) -> None:
        """Copy all parameters and buffers (memory: the model once more)."""
        self._held = [
            (held, [(name, value, None if value is None else value.detach().clone()) for name, value in held.items()])
            for module in model.modules()
            for held in (module._parameters, module._buffers)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the same tensors under the same names, with their old values; later additions are removed."""
        for held, members in self._held:
            held.clear()
            for name, value, was in members:
                if value is not None and was is not None:
                    value.data = was
                held[name] = value  # pyright: ignore[reportArgumentType] -- parameters and buffers alike


def fingerprint_batches(batches: Iterable[Any]) -> str:
    """A hash of every tensor of every batch; other values are hashed by their text form."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(b"batch")
        _add(digest, batch)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())


class Store:
    """The finished blocks of one call."""

    def __init__(self, folder: str | os.PathLike[str], belongs: Mapping[str, str]) -> None:
        """Open a folder, or begin one.

        Args:
            folder: Made if needed.
            belongs: The settings that the work depends on; each value must equal the one in the folder.

        Raises:
            InputError: The folder belongs to other work, or cannot be written.
        """
        self.folder = Path(folder)
        self.walks = 0
        index = self.folder / INDEX
        wanted = {"format": "s2d.resume", "version": VERSION, "belongs": dict(belongs)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh = not index.exists()
            left = f".{INDEX}-"  # left by an interrupted write
            foreign = fresh and any(not path.name.startswith(left) for path in self.folder.iterdir())
            if fresh and not foreign:
                write_json(index, wanted)
            text = "" if foreign else index.read_text()
        except OSError as error:
            raise InputError(f"cannot keep the calibration in {self.folder}: {error}") from error
        if foreign:
            raise InputError(f"{self.folder} is not empty and holds no {INDEX}; give resume an empty folder")
        try:
            found = json.loads(text)
            begun = found["belongs"] if found["version"] == VERSION else None
        except (ValueError, KeyError, TypeError):
            begun = None
        if begun is None:
            raise InputError(f"{index} is damaged or of another version; delete {self.folder} to start anew")
        for key, value in belongs.items():
            if begun.get(key) != value:
                short = f" ({begun.get(key)} there, {value} now)" if len(value) < 32 else ""
                raise InputError(
                    f"{self.folder} was begun with another {key}{short}; give resume an empty folder, or delete it"
                )

    def load(self, walk: int, name: str, module: nn.Module) -> bool:
        """Put the kept state of a block into it; False when there is none.

        Raises:
            InputError: The file is damaged or does not fit.
        """
        path = self._path(walk, name)
        if not path.is_file():
            return False
        try:
            module.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(
                f"{path} is damaged or does not fit ({first_line(error)}); delete it to redo this block"
            ) from None
        return True

    def save(self, walk: int, name: str, module: nn.Module) -> None:
        """Keep the state of a finished block.

        Raises:
            InputError: The folder cannot be written.
        """
        tensors = {
            key: value.detach().clone(memory_format=torch.contiguous_format)
            for key, value in module.state_dict().items()
            if isinstance(value, Tensor)
        }

        def write(file: BinaryIO) -> None:
            file.write(to_bytes(tensors))

        write_atomic(self._path(walk, name), write)

    @staticmethod
    def discard(folder: Path) -> None:
        """Remove a store's files from a folder, and the folder itself if it is then empty."""
        for path in (folder / INDEX, *folder.glob("*.safetensors")):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()

    def _path(self, walk: int, name: str) -> Path:
        return self.folder / f"{walk}-{name}.safetensors"
