"""Images as byte tensors, decoded by several threads.

A split that fits in memory is decoded when it is first used. Images of a larger split are decoded on request.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.errors import first_line
from s2d.models.preprocessing import Preprocessing
from s2d.optional import require

# Memory for the decoded images of one split: 350,000 images of 32x32, 7,000 of 224x224.
MEMORY = 1 << 30
# The largest image that is decoded: 0.3 GB. A small file can claim to be any size.
MAX_PIXELS = 100_000_000
# No others are tried: some start programs (EPS), and nobody's data need them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


class ImageTable:
    """The images of one split, prepared for one model.

    Attributes:
        unreadable: Index and reason of each image that could not be decoded so far.
    """

    def __init__(self, sources: Sequence[Path | bytes], preprocessing: Preprocessing) -> None:
        """Prepare; nothing is decoded yet."""
        self._sources, self._preprocessing = sources, preprocessing
        self.unreadable: dict[int, str] = {}
        self._decoded: Tensor | None = None

    def first_readable(self) -> int | None:
        """The first image that can be decoded, found without decoding the others; None when there is none."""
        rows = (row for row in range(len(self)) if row not in self.unreadable)
        return next((row for row in rows if self._one(row) is not None), None)

    def decode(self) -> None:
        """Decode everything, once, if it fits in memory; images that cannot be read are noted and left out."""
        size = (3, self._preprocessing.height, self._preprocessing.width)
        if self._decoded is not None or len(self) * size[0] * size[1] * size[2] > MEMORY:
            return
        decoded = torch.empty(len(self), *size, dtype=torch.uint8)
        for start in range(0, len(self), 4096):
            rows = range(start, min(start + 4096, len(self)))
            for row, pixels in zip(rows, self._decode(rows), strict=True):
                if pixels is not None:
                    decoded[row] = pixels
        self._decoded = decoded

    def __len__(self) -> int:
        return len(self._sources)

    def note(self, split: str, places: Mapping[int, str]) -> str:
        """How many images are left out so far, and the first ones by their `places`; empty for none."""
        bad = sorted(self.unreadable.items())
        listed = "; ".join(f"{places[row]}: {reason}" for row, reason in bad[:3])
        return f"{split}: {len(bad)} of {len(self)} images cannot be read and are left out ({listed})" if bad else ""

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some images, by index `[rows]`.

        Returns:
            Bytes `[kept, 3, height, width]`, and their rows `[kept]`. Unreadable images are left out.
        """
        if self._decoded is not None:
            kept = rows if not self.unreadable else rows[[int(row) not in self.unreadable for row in rows]]
            return self._decoded[kept], kept
        numbers = rows.tolist()
        found = [
            (row, pixels) for row, pixels in zip(numbers, self._decode(numbers), strict=True) if pixels is not None
        ]
        size = (0, 3, self._preprocessing.height, self._preprocessing.width)
        pixels = torch.stack([each for _, each in found]) if found else torch.empty(size, dtype=torch.uint8)
        return pixels, torch.tensor([row for row, _ in found], dtype=torch.long)

    def _decode(self, rows: Sequence[int]) -> list[Tensor | None]:
        return list(_threads().map(self._one, rows))

    def _one(self, row: int) -> Tensor | None:
        image = require("PIL.Image", "vision")
        try:
            with opened(self._sources[row]) as picture:
                return self._preprocessing.pixels(picture)
        except image.UnidentifiedImageError:
            self.unreadable[row] = f"not an image of a known kind ({', '.join(FORMATS)}), or damaged"
            return None
        except Exception as error:  # a decoder of bytes from anywhere raises anything
            self.unreadable[row] = first_line(error, 120)
            return None


@contextmanager
def opened(source: Path | bytes) -> Iterator[Any]:
    """An image as PIL opens it.

    Raises:
        ValueError: It has too many pixels, or is no regular file.
        OSError: It cannot be read, or is of another kind than `FORMATS`.
    """
    image = require("PIL.Image", "vision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about large images and odd metadata
        file = io.BytesIO(source) if isinstance(source, bytes) else _regular(source)
        with image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            yield picture


def _regular(path: Path) -> Path:
    """Refuse a pipe or a device in place of an image: reading it might never end."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    return path


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Threads for decoding, which releases Python's global interpreter lock."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="s2d-images")
