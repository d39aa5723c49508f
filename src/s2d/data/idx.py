"""MNIST's files: images and labels in the IDX format, which Fashion-MNIST, KMNIST and EMNIST use as well.

Format: http://yann.lecun.com/exdb/mnist (the section FILE FORMATS). One array of bytes after a header of big-endian
numbers: two zeros, the type (8 for bytes), the number of axes, then the length of each axis.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from s2d.data.base import Split
from s2d.data.split_files import SPLIT_NAMES
from s2d.errors import InputError, first_line

_IMAGES = re.compile(r"(?:.*-)?(?P<split>[a-z0-9]+)-images[.-]idx3-ubyte(?:\.gz)?")
_TEST = "t10k"  # MNIST's own name of its 10,000 test images
_BYTES = 8


def idx_in(path: Path) -> dict[Split, tuple[Path, Path]]:
    """Files of images and of labels of each split of a folder; empty where there are none.

    Raises:
        InputError: Images without labels, or two files for one split.
    """
    found: dict[Split, tuple[Path, Path]] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        split = _split_of(file)
        if split is None:
            continue
        labels = file.with_name(file.name.replace("-images", "-labels").replace("idx3", "idx1"))
        if not labels.is_file():
            raise InputError(f"{file} holds images, but their labels, {labels.name}, are not beside it")
        if split in found:
            raise InputError(f"{path} has two files of {split} images: {found[split][0].name}, {file.name}; keep one")
        found[split] = (file, labels)
    return found


def is_images(file: Path) -> bool:
    """Whether a file holds images, judged by its name."""
    return _split_of(file) is not None


def read_images(file: Path) -> list[bytes]:
    """The grey images, each encoded as a PGM file, which all other readers accept.

    Raises:
        InputError: The file cannot be read, or holds no images in this format.
    """
    (count, height, width), pixels = _read(file, axes=3)
    header, size = f"P5 {width} {height} 255\n".encode(), height * width
    return [header + pixels[start : start + size] for start in range(0, count * size, size)]


def placed_images(file: Path) -> Iterator[tuple[str, bytes]]:
    """The images, each with its location for messages."""
    for number, source in enumerate(read_images(file), 1):
        yield f"{file}, image {number}", source


def read_labels(file: Path) -> list[int]:
    """The numbers of the classes.

    Raises:
        InputError: The file cannot be read, or holds no labels in this format.
    """
    return list(_read(file, axes=1)[1])


def _split_of(file: Path) -> Split | None:
    match = _IMAGES.fullmatch(file.name.lower())
    if match is None or not file.is_file():
        return None
    name = "test" if match["split"] == _TEST else match["split"]
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


def _read(file: Path, axes: int) -> tuple[list[int], bytes]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            header = stream.read(4 * (1 + axes))
            if len(header) < 4 * (1 + axes) or header[:4] != bytes((0, 0, _BYTES, axes)):
                raise InputError(f"{file} is no IDX file of bytes with {axes} axes; download it again")
            shape = [int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4)]
            if 0 in shape:
                raise InputError(f"{file} is empty: its axes are {' x '.join(map(str, shape))}")
            # One byte more than there should be: a file can unpack to any size.
            content = stream.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error, OverflowError, MemoryError) as error:
        raise InputError(f"cannot read {file}: {first_line(error)}") from error
    if len(content) != math.prod(shape):
        raise InputError(f"{file} is cut off or too long for {' x '.join(map(str, shape))} bytes; download it again")
    return shape, content
