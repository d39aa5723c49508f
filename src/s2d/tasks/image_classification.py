"""Image classification: the whole model, or only a linear probe on a frozen encoder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.image_heads import ImageClassifier, class_names, image_encoder, number_of_classes
from s2d.models.preprocessing import Preprocessing, preprocessing_of
from s2d.tasks.augmentation import augment
from s2d.tasks.base import (
    SPLITS,
    Batch,
    Split,
    Task,
    check_batch_size,
    check_split,
    device_of,
    register,
    to_device,
)
from s2d.tasks.image_files import ImageExample, read_labelled_images
from s2d.tasks.image_table import ImageTable
from s2d.tasks.tokens import digest, row_batches


class LabelledImages(Task):
    """What tasks on labelled images share: the data, their batches, and what is said about images left out."""

    ragged = False

    def __init__(
        self, data: str | os.PathLike[str], image: str | None, label: str | None, classes: Sequence[str] | None
    ) -> None:
        self._examples, found = read_labelled_images(os.fspath(data), image, label)
        if classes is not None and len(classes) != len(found):
            raise InputError(f"{data} has {len(found)} classes, but classes names {len(classes)}: {', '.join(found[:6])}")
        self.labels: tuple[str, ...] = found if classes is None else tuple(str(name) for name in classes)
        numbers = {name: number for number, name in enumerate(found)}
        self._classes = {
            split: torch.tensor([numbers[example.label] for example in examples])
            for split, examples in self._examples.items()
        }
        self._tables: dict[Split, ImageTable] = {}
        self._preprocessing: Preprocessing | None = None

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of all splits: labels, and the images' bytes or the names of their files."""
        return digest(
            part
            for split in SPLITS
            for example in self._examples[split]
            for part in (split, example.label, digest([example.content().hex()]))
        )

    def sizes(self) -> dict[str, int]:
        """Number of images of each split, without those known to be unreadable."""
        bad = {split: len(table.unreadable) for split, table in self._tables.items()}
        return {split: len(examples) - bad.get(split, 0) for split, examples in self._examples.items()}

    def prepare(self, loaded: Loaded) -> None:
        """Decode the images to the model's size."""
        preprocessing = preprocessing_of(loaded.processor, loaded.source)
        if preprocessing == self._preprocessing:
            return
        for split, examples in self._examples.items():
            self._tables[split] = ImageTable([example.source for example in examples], preprocessing)
            if len(self._tables[split].unreadable) == len(examples):
                raise InputError(f"none of the {len(examples)} images of {split} can be read; {self.notes()[-1]}")
        self._preprocessing = preprocessing

    def notes(self) -> list[str]:
        """One line for each split with unreadable images: how many, and the first ones."""
        lines = []
        for split, table in self._tables.items():
            bad = sorted(table.unreadable.items())
            if bad:
                listed = "; ".join(f"{self._examples[split][row].place}: {reason}" for row, reason in bad[:3])
                lines.append(f"{split}: {len(bad)} of {len(table)} images cannot be read and are left out ({listed})")
        return lines

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """Batches of ``pixels`` `[batch, 3, height, width]` (bytes) and ``labels`` `[batch]`."""
        table = self._table(split)
        readable = torch.tensor([row for row in range(len(table)) if row not in table.unreadable])
        for rows in row_batches(len(readable), check_batch_size(batch_size), seed=seed, shuffle=shuffle):
            pixels, kept = table.take(readable[rows])
            if len(kept):
                yield {"pixels": pixels, "labels": self._classes[split][kept]}

    def normalize(self, pixels: Tensor) -> Tensor:
        """What the model reads."""
        assert self._preprocessing is not None
        return self._preprocessing.normalize(pixels)

    def examples(self, split: Split) -> list[ImageExample]:
        """The images of a split, as they are stored."""
        return self._examples[split]

    def _table(self, split: Split) -> ImageTable:
        if check_split(split) not in self._tables:
            raise RuntimeError("the images are not decoded yet: call build(loaded) or prepare(loaded) first")
        return self._tables[split]


@register("image-classification")
class ImageClassification(LabelledImages):
    """Assign images to classes: folders, Parquet or a data set of the `datasets` library.

    A model with a trained head for just these classes keeps it; else its pooled features go through a new linear layer.
    Cross-entropy; the metrics are ``accuracy`` and, with more than ten classes, ``top5``, in points. Training images
    are flipped and shifted at random, unless `augment` is false.

    Args:
        data: See `s2d.tasks.image_files.read_labelled_images`. Splits that are missing are taken out of train: 20 % for
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
        super().__init__(data, image, label, classes)
        self.augment, self.smoothing, self.probe = augment, smoothing, probe

    def build(self, loaded: Loaded, seed: int = 0) -> ImageClassifier:
        """A classifier on a copy of the model; a trained head for these classes is kept."""
        self.prepare(loaded)
        model = loaded.model
        if isinstance(model, ImageClassifier) and len(model.labels) == len(self.labels):
            built = copy.deepcopy(model)
        elif not self.probe and self._fits(model, loaded.source):
            built = ImageClassifier(copy.deepcopy(model), self.labels, classes_of_its_own=True)
        else:
            built = ImageClassifier(image_encoder(model), self.labels, seed=seed)
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
        pixels = augment(batch["pixels"]) if self.augment and model.training else batch["pixels"]
        scores = model(pixel_values=self.normalize(pixels))
        return F.cross_entropy(scores, batch["labels"], label_smoothing=self.smoothing)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """``accuracy`` (and ``top5``) on all readable images of the split."""
        device, was_training = device_of(model), model.training
        model.eval()
        first = fifth = seen = 0
        try:
            for batch in self.batches(split, batch_size=batch_size):
                scores = model(pixel_values=self.normalize(batch["pixels"].to(device))).float().cpu()
                # NaN scores are no answer; ranking would take them for the largest.
                ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == batch["labels"].unsqueeze(1)
                ranked &= scores.isfinite().all(1, keepdim=True)
                first, fifth, seen = first + int(ranked[:, 0].sum()), fifth + int(ranked.sum()), seen + len(ranked)
        finally:
            model.train(was_training)
        metrics = {"accuracy": 100 * first / seen}
        return metrics if len(self.labels) <= 10 else {**metrics, "top5": 100 * fifth / seen}

    def _fits(self, model: nn.Module, source: str) -> bool:
        """Whether the model's own head is for these classes, in this order as far as names tell."""
        if number_of_classes(model) != len(self.labels):
            return False
        names = class_names(model)
        same = {_plain(name) for name in names} == {_plain(name) for name in self.labels}
        if same and [_plain(name) for name in names] != [_plain(name) for name in self.labels]:
            raise InputError(
                f"{source} has the classes of this data in another order; give them in the model's order: "
                f"-o 'task.classes=[{', '.join(names[:3])}, ...]' and number the labels so"
            )
        return True


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
