"""Preprocessing of images: size, crop and normalization, read from the model's own configuration.

A processor is what `load` found beside the weights: transformers' image processor, timm's data configuration (a
dictionary), or open_clip's transform (torchvision's `Compose`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from s2d.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # PIL's numbers


def upright(image: Image) -> Image:
    """An image rotated by its EXIF orientation, as viewers do and decoders do not."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


@dataclass(frozen=True)
class Preprocessing:
    """From an image of any size to the pixels of a model.

    Attributes:
        height, width: Of the result.
        shortest: Length that the shorter edge is brought to before the centre is cut out; None stretches the image to
            the result's size.
        mean, std: Of each colour, for pixels from 0 to 1.
        filter: PIL's number of the resampling filter.
    """

    height: int
    width: int
    shortest: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: int = 3

    def pixels(self, image: Image) -> Tensor:
        """The resized and cut image as `[3, height, width]` bytes; grey, palette and transparent images become RGB."""
        image = upright(image).convert("RGB")
        if self.shortest is None:
            image = _resized(image, (self.width, self.height), self.filter)
        else:
            # The longer edge is rounded down, as in torchvision and transformers.
            width, height = (self.shortest * edge // min(image.size) for edge in image.size)
            image = _resized(image, (width, height), self.filter)
            left, top = (width - self.width) // 2, (height - self.height) // 2
            image = image.crop((left, top, left + self.width, top + self.height))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __call__(self, image: Image) -> Tensor:
        """The model's input for one image, `[3, height, width]`."""
        return self.normalize(self.pixels(image))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Bytes `[..., 3, height, width]` to the model's input, on their device, float32."""
        mean, std = (torch.tensor(x, device=pixels.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``preprocessor_config.json``, which transformers reads too."""
        content: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor" if self.shortest is None else "CLIPImageProcessor",
            "do_resize": True,
            "size": {"height": self.height, "width": self.width}
            if self.shortest is None
            else {"shortest_edge": self.shortest},
            "resample": self.filter,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.shortest is not None:
            content |= {"do_center_crop": True, "crop_size": {"height": self.height, "width": self.width}}
        text = json.dumps(content, indent=2) + "\n"
        (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _resized(image: Image, size: tuple[int, int], resample: int) -> Image:
    return image if image.size == size else image.resize(size, resample)


def preprocessing_of(processor: Any, source: str) -> Preprocessing:
    """The preprocessing that a processor describes.

    Args:
        processor: See `s2d.models.Loaded.processor`.
        source: The model's name, for the error.

    Raises:
        InputError: There is no processor, or it lacks a needed setting.
    """
    if processor is None:
        raise InputError(
            f"{source} does not say how its images are prepared; put its preprocessor_config.json beside the weights "
            '(and pip install "s2d[vision]")'
        )
    if isinstance(processor, Preprocessing):
        return processor
    if isinstance(processor, dict):
        return _of_timm(processor)
    if hasattr(processor, "transforms"):
        return _of_transform(processor, source)
    return _of_transformers(getattr(processor, "image_processor", processor), source)


def _of_transformers(processor: Any, source: str) -> Preprocessing:
    size = _lengths(getattr(processor, "size", None))
    crop = _lengths(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else {}
    final = crop or size
    shortest = size.get("shortest_edge")
    height = final.get("height", final.get("shortest_edge"))
    width = final.get("width", final.get("shortest_edge"))
    if height is None or width is None:
        raise InputError(f"the image processor of {source} states no size; it says size={size}")
    if crop and shortest is None:  # resized to a fixed size first, then cut
        shortest = size.get("height", height)
    plain = not getattr(processor, "do_normalize", True)
    mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (processor.image_mean, processor.image_std)
    return Preprocessing(height, width, shortest, tuple(mean), tuple(std), int(getattr(processor, "resample", 3) or 3))


def _lengths(size: Any) -> dict[str, int]:
    """A processor's size, whether a mapping, an object or a number."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    names = ("height", "width", "shortest_edge")
    found = {name: size.get(name) if isinstance(size, dict) else getattr(size, name, None) for name in names}
    return {name: int(value) for name, value in found.items() if value is not None}


def _of_timm(config: dict[str, Any]) -> Preprocessing:
    _, height, width = config["input_size"]
    # crop_pct is the share of the resized edge that stays; "squash" stretches.
    squash = config.get("crop_mode") == "squash"
    shortest = None if squash else int(min(height, width) / config.get("crop_pct", 1.0))
    number = _FILTERS.get(config.get("interpolation", "bicubic"), 3)
    return Preprocessing(height, width, shortest, tuple(config["mean"]), tuple(config["std"]), number)


def _of_transform(transform: Any, source: str) -> Preprocessing:
    steps = {type(step).__name__: step for step in transform.transforms}
    try:
        norm, resize = steps["Normalize"], steps["Resize"]
    except KeyError as error:
        raise InputError(f"the transform of {source} has no step {error}; it has {', '.join(steps)}") from None
    number = _FILTERS.get(str(getattr(resize.interpolation, "value", "bicubic")), 3)
    size = resize.size
    if "CenterCrop" in steps:
        height, width = _pair(steps["CenterCrop"].size)
        return Preprocessing(height, width, min(_pair(size)), tuple(norm.mean), tuple(norm.std), number)
    height, width = _pair(size)
    return Preprocessing(height, width, None, tuple(norm.mean), tuple(norm.std), number)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size) if len(size) == 2 else (size[0], size[0])
