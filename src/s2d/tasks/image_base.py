"""Shared code of tasks on images: the data, their batches, accuracy, and messages about images left out."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from s2d.data.augmentation import augment
from s2d.data.base import SPLITS, Batch, Split, check_batch_size, check_split
from s2d.data.image_folders import read_labelled_images
from s2d.data.image_rows import ImageRow
from s2d.data.image_table import ImageTable
from s2d.data.tokens import digest, row_batches
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.preprocessing import Preprocessing, preprocessing_of
from s2d.models.running import evaluating
from s2d.tasks.base import Task, device_of


class ImageRows(Task):
    """A task on images and their annotations. An image that occurs in several rows is decoded once."""

    ragged = False
    augment = False  # where training images are changed at random

    def __init__(self, rows: dict[Split, list[ImageRow]]) -> None:
        self.rows = rows
        self._sources: dict[Split, list[Path | bytes]] = {}
        self._image_of: dict[Split, Tensor] = {}
        for split, members in self.rows.items():
            known: dict[Path | bytes, int] = {}
            self._image_of[split] = torch.tensor([known.setdefault(row.source, len(known)) for row in members])
            self._sources[split] = list(known)
        self._fingerprint = digest(
            part
            for split in SPLITS
            for row in self.rows[split]
            for part in (split, self.text_of(row), digest([row.content().hex()]))
        )
        self._tables: dict[Split, ImageTable] = {}
        self._preprocessing: Preprocessing | None = None

    @staticmethod
    def text_of(row: ImageRow) -> str:
        """The annotations of an image, for the fingerprint."""
        return str(row.cells)

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of all splits: images and their annotations."""
        return self._fingerprint

    def sizes(self) -> dict[str, int]:
        """Number of rows of each split, without those whose image is known to be unreadable."""
        return {split: int(self._readable(split).numel()) for split in SPLITS}

    def prepare(self, loaded: Loaded) -> None:
        """Note the model's preprocessing; a split's images are decoded when it is first used."""
        preprocessing = preprocessing_of(loaded.processor, loaded.source)
        if preprocessing == self._preprocessing:
            return
        for split, sources in self._sources.items():
            self._tables[split] = ImageTable(sources, preprocessing)
            if self._tables[split].first_readable() is None:
                raise InputError(f"none of the {len(sources)} images of {split} can be read; {self.notes()[-1]}")
        self._preprocessing = preprocessing

    def notes(self) -> list[str]:
        """One line for each split with images found unreadable so far."""
        lines = []
        for split, table in self._tables.items():
            images = self._image_of[split].tolist()
            places = {image: row.place for image, row in zip(images, self.rows[split], strict=True)}
            line = table.note(split, places)
            lines += [line] if line else []
        return lines

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """Batches of ``pixels`` `[batch, 3, height, width]` (bytes) and what `beside` makes of their rows."""
        if check_split(split) not in self._tables:
            raise RuntimeError("the images' size is not known yet: call build(loaded) or prepare(loaded) first")
        table = self._tables[split]
        table.decode()
        readable = self._readable(split)
        for chosen in row_batches(len(readable), check_batch_size(batch_size), seed=seed, shuffle=shuffle):
            rows = readable[chosen]
            images = self._image_of[split][rows]
            pixels, kept = table.take(images)
            rows = rows[torch.isin(images, kept)]  # what is not in memory turns out to be unreadable only now
            if len(rows):
                yield {"pixels": pixels, **self.beside(split, rows)}

    @abstractmethod
    def beside(self, split: Split, rows: Tensor) -> Batch:
        """The other entries of a batch beside the pixels, for rows by index `[batch]`."""

    def normalize(self, pixels: Tensor) -> Tensor:
        """The model's input."""
        assert self._preprocessing is not None
        return self._preprocessing.normalize(pixels)

    def training_pixels(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """The model's input in training, made from bytes: flipped and shifted at random, if that is enabled."""
        return self.normalize(augment(pixels) if self.augment and model.training else pixels)

    def _readable(self, split: Split) -> Tensor:
        images = self._image_of[split]
        bad = list(self._tables[split].unreadable) if split in self._tables else []
        return torch.arange(len(images))[~torch.isin(images, torch.tensor(bad, dtype=torch.long))]


class LabelledImages(ImageRows):
    """A task on labelled images; subclasses define the model's output."""

    def __init__(
        self,
        data: str | os.PathLike[str],
        image: str | None,
        label: str | None,
        classes: Sequence[str] | None,
        augment: bool,
    ) -> None:
        rows, found = read_labelled_images(os.fspath(data), image, label)
        if classes is not None and len(classes) != len(found):
            raise InputError(
                f"{data} has {len(found)} classes, but classes names {len(classes)}: {', '.join(found[:6])}"
            )
        super().__init__(rows)
        self.augment = augment
        self._own_labels = found if classes is None else tuple(str(name) for name in classes)
        self.labels: tuple[str, ...] = self._own_labels
        numbers = {name: number for number, name in enumerate(found)}
        self._own_classes = self._classes = {
            split: torch.tensor([numbers[row.cells[0]] for row in members]) for split, members in rows.items()
        }

    @staticmethod
    def text_of(row: ImageRow) -> str:
        """The name of the class."""
        return row.cells[0]

    def beside(self, split: Split, rows: Tensor) -> Batch:
        """``labels`` `[batch]`."""
        return {"labels": self._classes[split][rows]}

    def number(self, labels: tuple[str, ...], places: list[int] | None) -> None:
        """Number the classes as a model does; None for the data's own numbers."""
        self.labels, self._classes = labels, self._own_classes
        if places is not None:
            self._classes = {split: torch.tensor(places)[numbers] for split, numbers in self._own_classes.items()}

    @torch.no_grad()
    def score(
        self, scores_of: Callable[[Tensor], Tensor], model: nn.Module, split: Split, batch_size: int
    ) -> dict[str, float]:
        """``accuracy`` and, with more than ten classes, ``top5``; `scores_of` makes `[batch, classes]` of pixels."""
        device = device_of(model)
        first = fifth = seen = 0
        with evaluating(model):
            for batch in self.batches(split, batch_size=batch_size):
                scores = scores_of(self.normalize(batch["pixels"].to(device))).float().cpu()
                # NaN scores are no answer; a ranking would treat them as the largest.
                ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == batch["labels"].unsqueeze(1)
                ranked &= scores.isfinite().all(1, keepdim=True)
                first, fifth, seen = first + int(ranked[:, 0].sum()), fifth + int(ranked.sum()), seen + len(ranked)
        if not seen:
            raise InputError(f"none of the images of {split} can be read; {'; '.join(self.notes())}")
        metrics = {"accuracy": 100 * first / seen}
        return metrics if len(self.labels) <= 10 else {**metrics, "top5": 100 * fifth / seen}
