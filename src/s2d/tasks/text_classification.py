"""Classification of texts: any table with a text and a label column."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.data.base import SPLITS, Batch, Split, check_batch_size
from s2d.data.split_files import split_files
from s2d.data.splits import CARVED, carve
from s2d.data.tables import TABLE_SUFFIXES, Table, find_columns, read_table
from s2d.data.tokens import by_length, digest, row_batches
from s2d.errors import InputError
from s2d.models import Loaded, TextClassifier
from s2d.models.classes import both_lists, match, only_numbered, places_of
from s2d.models.heads import encoder_of
from s2d.models.image_heads import class_names
from s2d.models.running import evaluating
from s2d.tasks.base import Outcomes, device_of, register, to_device
from s2d.tasks.text_base import TokenizedTexts


@dataclass(frozen=True)
class Example:
    """One labelled text, and its location."""

    text: str
    label: str
    place: str


@register("text-classification")
class TextClassification(TokenizedTexts):
    """Assign texts to classes, from CSV, TSV, JSON lines or Parquet with a text and a label column.

    The encoder's mean-pooled tokens go through one linear layer, or a transformers model's own head is kept;
    cross-entropy; the metric is ``accuracy`` in points.

    A folder has one file per split, named ``train``, ``test`` and ``validation`` (or ``valid``, ``val``, ``dev``). A
    split without a file (or both, when `data` is a single file) is taken out of train: 20 % for test, 10 % for
    validation, the same share of every class, chosen by a hash of the text and so independent of order. The classes
    are those of train.

    Args:
        data: The folder or file.
        text: Name of the text column; found by usual names when None. Without a header, columns are ``0``, ``1``, ...
        label: Name of the label column; likewise.
        max_length: Texts are cut to so many tokens.
    """

    primary = "accuracy"
    adds_head = True

    def __init__(
        self, data: str | os.PathLike[str], text: str | None = None, label: str | None = None, max_length: int = 64
    ) -> None:
        super().__init__(max_length)
        self._examples = _splits(Path(data), text, label)
        self._own_labels = self.labels = _class_names(self._examples["train"])
        self._own_classes = self._classes = {split: self._class_numbers(split) for split in SPLITS}

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of all texts and labels of all splits."""
        return digest(part for split in SPLITS for ex in self._examples[split] for part in (split, ex.text, ex.label))

    def texts(self, split: Split) -> list[str]:
        """The texts of a split."""
        return [example.text for example in self._examples[split]]

    def build(self, loaded: Loaded, seed: int = 0) -> nn.Module:
        """A classifier on a copy of the encoder.

        A model that was loaded with this task's classes (by name, in any order, or more of them) keeps its head: a
        `TextClassifier`, or a sequence classifier of transformers. Where one side only numbers its classes, as many on
        both sides are the same ones in their order. The task then uses the model's classes.
        """
        self.prepare(loaded)
        model, wanted = loaded.model, self._own_labels
        known, places = class_names(model), None
        if isinstance(model, TextClassifier):
            known = model.labels
            places = match(wanted, known)
        elif type(model).__name__.endswith("ForSequenceClassification") and (known or only_numbered(wanted)):
            places = places_of(wanted, known, int(model.config.num_labels))  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportArgumentType]
        self._number(wanted if places is None else known or wanted, places)
        self.new_head = ""
        if places is not None:
            return copy.deepcopy(model).train()
        self.new_head = f"a new head of {len(wanted)} classes would be random"
        if known:
            self.new_head += f"; {both_lists(wanted, known, len(known))}"
        return TextClassifier(copy.deepcopy(encoder_of(model)), wanted, seed=seed).train()

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """Batches of ``input_ids`` and ``attention_mask`` `[batch, tokens]` and ``labels`` `[batch]`."""
        count = len(self._table(split))
        for rows in row_batches(count, check_batch_size(batch_size), seed=seed, shuffle=shuffle):
            yield self._batch(split, rows)

    def _batch(self, split: Split, rows: Tensor) -> Batch:
        ids, mask = self._table(split).take(rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": self._classes[split][rows]}

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call of the classifier."""
        return [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        batch = to_device(batch, device_of(model))
        return F.cross_entropy(_scores(model(**self.inputs(batch)[0])), batch["labels"])

    @torch.no_grad()
    def outcomes(self, model: nn.Module, batch: Batch) -> Outcomes:
        """Right or wrong, of each text."""
        device = device_of(model)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        with evaluating(model):
            scores = _scores(model(input_ids=ids, attention_mask=mask)).float().cpu()
        # NaN scores are no answer; argmax would treat them as the largest.
        return Outcomes.of_hits((scores.argmax(1) == batch["labels"]) & scores.isfinite().all(1))

    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """``accuracy`` on the whole split."""
        table = self._table(split)
        parts = [
            self.outcomes(model, self._batch(split, rows))
            for rows in by_length(table.lengths, check_batch_size(batch_size))
        ]
        return {"accuracy": Outcomes.joined(parts).score()}

    def _number(self, labels: tuple[str, ...], places: list[int] | None) -> None:
        """Number the classes as a model does; None for the data's own numbers."""
        self.labels, self._classes = labels, self._own_classes
        if places is not None:
            self._classes = {split: torch.tensor(places)[numbers] for split, numbers in self._own_classes.items()}

    def _class_numbers(self, split: Split) -> Tensor:
        numbers = {name: number for number, name in enumerate(self.labels)}
        for example in self._examples[split]:
            if example.label not in numbers:
                close = difflib.get_close_matches(example.label, self.labels, n=2)
                hint = f"close: {', '.join(close)}" if close else f"train has {', '.join(self.labels[:6])}"
                raise InputError(f"{example.place}: label {example.label!r} does not occur in train ({hint})")
        return torch.tensor([numbers[example.label] for example in self._examples[split]])


def _scores(output: Any) -> Tensor:
    """Class scores ``[batch, classes]``: what a classifier returns, or transformers' part of it."""
    return getattr(output, "logits", output)


def _splits(data: Path, text: str | None, label: str | None) -> dict[Split, list[Example]]:
    """The examples of every split. A split without a file is taken out of train."""
    files = split_files(data, TABLE_SUFFIXES)
    if "train" not in files:
        raise InputError(f"{data} has no train file ({' or '.join('train' + suffix for suffix in TABLE_SUFFIXES)})")
    examples = {split: _examples(read_table(file, (text, label)), text, label) for split, file in files.items()}
    for split, share in CARVED:
        if split not in examples:
            examples["train"], examples[split] = _carve(examples["train"], share, split, files["train"])
    return {split: examples[split] for split in SPLITS}


def _examples(table: Table, text: str | None, label: str | None) -> list[Example]:
    text_name, label_name = find_columns(table, text, label)
    examples = []
    for number, (words, name) in enumerate(zip(table.column(text_name), table.column(label_name), strict=True)):
        place = f"{table.path}, row {table.first_line + number}"
        if not isinstance(words, str) or not words.strip():
            raise InputError(f"{place}: the text (column {text_name!r}) is empty or not text; remove or repair the row")
        if name is None or not str(name).strip():
            raise InputError(f"{place}: the label (column {label_name!r}) is empty; remove or repair the row")
        examples.append(Example(words, _label_text(name), place))
    return examples


def _label_text(label: Any) -> str:
    """One spelling for a label, whether a file stores it as text, integer, or integer turned float."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def _class_names(examples: Sequence[Example]) -> tuple[str, ...]:
    names = {example.label for example in examples}
    if len(names) < 2:
        raise InputError(
            f"{examples[0].place}: all rows of train have label {examples[0].label!r}; two classes are needed"
        )
    return tuple(sorted(names, key=int if all(name.lstrip("-").isdecimal() for name in names) else None))


def _carve(examples: list[Example], share: float, split: Split, path: Path) -> tuple[list[Example], list[Example]]:
    """The examples that stay and those that are taken."""
    stay, taken = carve([example.label for example in examples], [example.text.encode() for example in examples], share)
    if not taken:
        raise InputError(f"{path} has too few rows to take a {split} split out of it; add a {split} file")
    return [examples[index] for index in stay], [examples[index] for index in taken]
