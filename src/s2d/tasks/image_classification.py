"""Image classification: the whole model, or only a linear probe on a frozen encoder."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.data.base import Batch, Split
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.classes import both_lists, places_of
from s2d.models.image_heads import ImageClassifier, class_names, image_encoder, number_of_classes
from s2d.models.running import evaluating
from s2d.tasks.base import Outcomes, device_of, register, to_device
from s2d.tasks.image_base import LabelledImages


@register("image-classification")
class ImageClassification(LabelledImages):
    """Assign images to classes: folders, Parquet or a data set of the `datasets` library.

    A model with a trained head for just these classes keeps it; else its pooled features go through a new linear layer.
    Cross-entropy; the metrics are ``accuracy`` and, with more than ten classes, ``top5``, in points. Training images
    are flipped and shifted at random, unless `augment` is false.

    Args:
        data: See `s2d.data.image_folders`. Splits that are missing are taken out of train: 20 % for
            test, 10 % for validation, the same share of every class, chosen by a hash.
        image: Name of the image column; found by usual names when None.
        label: Name of the label column; likewise.
        classes: Names of the classes, where the data only number them.
        augment: Flip and shift training images.
        smoothing: Label smoothing of the loss, from 0 to 1.
        probe: Train a new linear layer only; the encoder stays as it is.
    """

    primary = "accuracy"
    adds_head = True

    def __init__(
        self,
        data: str | os.PathLike[str],
        image: str | None = None,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        augment: bool = True,
        smoothing: float = 0.0,
        probe: bool = False,
    ) -> None:
        if not 0 <= smoothing < 1:
            raise InputError(f"smoothing must be from 0 to below 1, not {smoothing}")
        super().__init__(data, image, label, classes, augment)
        self.smoothing, self.probe = smoothing, probe

    def build(self, loaded: Loaded, seed: int = 0) -> ImageClassifier:
        """A classifier on a copy of the model.

        A trained head for these classes (by name, in any order, or more of them) is kept. The task then uses its
        classes.
        """
        self.prepare(loaded)
        model, wanted = loaded.model, self._own_labels
        whole = isinstance(model, ImageClassifier)
        count = number_of_classes(model)
        known = model.labels if whole else class_names(model)
        places = None if self.probe and not whole else places_of(wanted, known, count)
        labels = wanted if places is None or not known else known
        self.number(labels, places)
        self.new_head = ""
        if places is not None:
            built = copy.deepcopy(model)
            if not isinstance(built, ImageClassifier):
                built = ImageClassifier(built, labels, classes_of_its_own=True)
        else:
            built = ImageClassifier(image_encoder(model), wanted, seed=seed)
            self.new_head = f"a new head of {len(wanted)} classes would be random"
            if count:
                self.new_head += f"; {both_lists(wanted, known, count)}"
        built.train()
        if self.probe and built.head is not None:
            built.encoder.requires_grad_(False)
        return built

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call of the classifier."""
        return [{"pixel_values": self.normalize(batch["pixels"])}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy on augmented images."""
        batch = to_device(batch, device_of(model))
        scores = model(pixel_values=self.training_pixels(model, batch["pixels"]))
        return F.cross_entropy(scores, batch["labels"], label_smoothing=self.smoothing)

    @torch.no_grad()
    def outcomes(self, model: nn.Module, batch: Batch) -> Outcomes:
        """Right or wrong, of each image."""
        with evaluating(model):
            scores = model(pixel_values=self.normalize(batch["pixels"].to(device_of(model)))).float().cpu()
        return Outcomes.of_hits((scores.argmax(1) == batch["labels"]) & scores.isfinite().all(1))

    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """``accuracy`` (and ``top5``) on all readable images of the split."""
        return self.score(lambda pixels: model(pixel_values=pixels), model, split, batch_size)
