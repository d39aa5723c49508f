"""Models that s2d builds on an image encoder: a classifier, with a head of its own or the one that was there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.dual_encoder import DualEncoder
from s2d.models.heads import hidden_width
from s2d.models.saved import describe, rebuild, register_architecture


class ImageClassifier(nn.Module):
    """Images to class scores.

    Args:
        encoder: A model that reads images. With `classes_of_its_own` its output is the scores; otherwise its pooled
            features go through a new linear layer.
        labels: Names of the classes, in the order of the scores.
        classes_of_its_own: The encoder has a trained head for just these classes.
        seed: For the new head's random start; the global random state is not touched.
    """

    def __init__(
        self, encoder: nn.Module, labels: Sequence[str], *, classes_of_its_own: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = tuple(labels)
        self.head: nn.Linear | None = None
        if not classes_of_its_own:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.head = nn.Linear(feature_width(encoder), len(self.labels))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[batch, 3, height, width]` to `[batch, classes]` scores."""
        if self.head is None:
            scores = self.encoder(pixel_values)
            return scores if isinstance(scores, Tensor) else scores.logits
        return self.head(image_features(self.encoder, pixel_values))


def image_features(encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """The pooled features `[batch, width]` of an image encoder: its pooler's output, else its class token."""
    return pooled_features(encoder(pixel_values))


def pooled_features(found: Any) -> Tensor:
    """The pooled features in an encoder's output."""
    if isinstance(found, Tensor):
        return found
    pooled = getattr(found, "pooler_output", None)
    return pooled if pooled is not None else found.last_hidden_state[:, 0]


def feature_width(encoder: nn.Module) -> int:
    """The width of `image_features`."""
    for name in ("num_features", "output_dim"):  # timm, open_clip
        width = getattr(encoder, name, None)
        if isinstance(width, int):
            return width
    return hidden_width(encoder)


def image_encoder(model: nn.Module) -> nn.Module:
    """A copy of the part of a model that turns images into features, without any head.

    Raises:
        InputError: The model does not read images.
    """
    tower = copy.deepcopy(image_tower(model))
    reset: Any = getattr(tower, "reset_classifier", None)
    if reset is not None:  # timm
        reset(0)
    return tower


def image_tower(model: nn.Module) -> nn.Module:
    """The part of a model that turns images into features, itself; the head of timm's models is within it.

    Raises:
        InputError: The model does not read images.
    """
    if isinstance(model, ImageClassifier | DualEncoder):
        model = model.encoder
    for name in ("vision_model", "visual", "image"):  # models of two towers: transformers', open_clip's, our pairs
        tower = getattr(model, name, None)
        if isinstance(tower, nn.Module):
            return tower
    if hasattr(model, "reset_classifier"):  # timm
        return model
    backbone = getattr(model, "base_model", None)
    model = backbone if isinstance(backbone, nn.Module) else model
    if not reads_images(model):
        raise InputError(f"{type(model).__name__} does not read images; load a vision model")
    return model


def reads_images(model: nn.Module) -> bool:
    """Whether a model's forward takes images alone."""
    if type(model).__module__.startswith(("timm.", "open_clip.")):
        return True
    return getattr(model, "main_input_name", "pixel_values") == "pixel_values"


def number_of_classes(model: nn.Module) -> int:
    """The number of classes of a model's own head; 0 without one."""
    if isinstance(model, ImageClassifier):
        return len(model.labels)
    if type(model).__module__.startswith("timm."):
        return int(getattr(model, "num_classes", 0))
    if type(model).__name__.endswith(("ForImageClassification", "ForImageClassificationWithTeacher")):
        return int(model.config.num_labels)  # type: ignore[union-attr]
    return 0


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The class names of a model's own head; empty where it has no real names."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    found = tuple(str(names[index]) for index in sorted(names))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(found)) else found


register_architecture(
    "image-classifier",
    matches=lambda model: isinstance(model, ImageClassifier),
    describe=lambda model: {
        "encoder": describe(model.encoder),
        "labels": list(model.labels),
        "classes_of_its_own": model.head is None,
    },
    rebuild=lambda description: ImageClassifier(
        rebuild(description["encoder"]),
        description["labels"],
        classes_of_its_own=description["classes_of_its_own"],
    ),
)
