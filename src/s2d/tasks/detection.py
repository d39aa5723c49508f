"""Object detection with a YOLOS-type model: a vision transformer that predicts a set of boxes."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d.data.annotated_images import read_image_rows
from s2d.data.base import SPLITS, Batch, Split
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.classes import both_lists, match, only_numbered
from s2d.models.image_heads import class_names
from s2d.models.preprocessing import preprocessing_of
from s2d.models.running import evaluating
from s2d.optional import require
from s2d.tasks.base import device_of, register, to_device
from s2d.tasks.image_base import ImageRows

_OBJECTS = ("objects", "annotations", "object")
_BOXES = ("bbox", "boxes", "bboxes")
_CATEGORIES = ("category", "categories", "category_id", "label", "labels", "class_labels")
_MOST = 100  # detections per image that COCO's metric uses
_METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@register("detection")
class Detection(ImageRows):
    """Find objects in images with a YOLOS-type detector (arXiv 2106.00666); COCO's average precision.

    The loss is the model's own: a bipartite matching of predicted and true boxes (DETR). The metrics, in points, are
    pycocotools': ``ap`` (mean over IoU from 0.5 to 0.95), ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``,
    ``ap_large``; a size of which there is no object is left out. Images are stretched to the model's own size, where
    the model's authors keep their proportions, so its published numbers are not quite reached.

    Args:
        data: See `s2d.tasks.image_base`. The objects of an image are ``{"bbox": [[x, y, width, height], ...],
            "category": [...]}`` in pixels of the image as viewers show it; categories are names, or numbers from 0.
        image: Name of the image column; found by usual names when None.
        objects: Name of the column of the objects; likewise.
        boxes: ``xywh`` (COCO), or ``xyxy`` for two corners.
        classes: Names of the classes, where the data only number them.
    """

    primary = "ap"
    separable = False  # normalized by the number of boxes in the batch

    def __init__(
        self,
        data: str | os.PathLike[str],
        image: str | None = None,
        objects: str | None = None,
        boxes: Literal["xywh", "xyxy"] = "xywh",
        classes: Sequence[str] | None = None,
    ) -> None:
        if boxes not in ("xywh", "xyxy"):
            raise InputError(f"boxes={boxes!r} is unknown; choose xywh or xyxy")
        require("pycocotools.coco", "detection")
        require("scipy", "detection")  # the matching of transformers' loss
        super().__init__(read_image_rows(data, image, {"objects": (objects, _OBJECTS)}))
        found = {split: [_objects(row.cells[0], boxes, row.place) for row in self.rows[split]] for split in SPLITS}
        kinds = {kind for rows in found.values() for _, own in rows for kind in own}
        numbered = all(isinstance(kind, int) for kind in kinds)
        names = [str(n) for n in range(max((k for k in kinds if isinstance(k, int)), default=0) + 1)]
        names = names if numbered else sorted(str(kind) for kind in kinds)
        self.labels = tuple(names if classes is None else map(str, classes))
        self._own_labels = self.labels
        number_of = {name: number for number, name in enumerate(self.labels)}
        self._boxes: dict[Split, list[Tensor]] = {}
        self._kinds: dict[Split, list[Tensor]] = {}
        for split in SPLITS:
            rows = found[split]
            self._boxes[split] = [own for own, _ in rows]
            self._kinds[split] = []
            for (_, own), row in zip(rows, self.rows[split], strict=True):
                numbers = [kind if numbered else number_of.get(str(kind), -1) for kind in own]
                if any(not 0 <= int(number) < len(self.labels) for number in numbers):
                    raise InputError(
                        f"{row.place}: category {own[0]!r} is outside the {len(self.labels)} classes "
                        f"({', '.join(self.labels[:6])})"
                    )
                self._kinds[split].append(torch.tensor(numbers, dtype=torch.long))
        self._own_kinds = self._kinds
        self._edges: dict[Split, dict[int, tuple[int, int]]] = {}

    def prepare(self, loaded: Loaded) -> None:
        """Decode the images, stretched to the model's size."""
        config: Any = getattr(loaded.model, "config", None)
        if not hasattr(loaded.model, "class_labels_classifier") or not hasattr(config, "image_size"):
            raise InputError(
                f"{type(loaded.model).__name__} is no detector that s2d knows; load a YolosForObjectDetection"
            )
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        own = preprocessing_of(loaded.processor, loaded.source)
        stretched = replace(own, height=int(height), width=int(width), shortest=None)
        super().prepare(replace(loaded, processor=stretched))

    def build(self, loaded: Loaded, seed: int = 0) -> nn.Module:
        """A copy of the detector. It keeps its classifier if that has these classes by name; else the head is new.

        Where one side only numbers the classes, the classifier is kept if it has enough of them.
        """
        self.prepare(loaded)
        model: Any = copy.deepcopy(loaded.model)
        wanted, known, count = self._own_labels, class_names(model), int(model.config.num_labels)
        places = match(wanted, known) if known else None
        if places is None and len(wanted) <= count and (not known or only_numbered(wanted) or only_numbered(known)):
            places = list(range(len(wanted)))
        self.labels, self._kinds = wanted, self._own_kinds
        self.new_head = ""
        if places is not None and places != list(range(len(wanted))):
            self.labels, numbers = known, torch.tensor(places)
            self._kinds = {split: [numbers[own] for own in rows] for split, rows in self._own_kinds.items()}
        if places is None:
            self.new_head = f"a new end of {len(wanted)} classes would be random; {both_lists(wanted, known, count)}"
            last = model.class_labels_classifier.layers[-1]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                new = nn.Linear(last.in_features, len(self.labels) + 1).to(last.weight.device)
            model.class_labels_classifier.layers[-1] = new
            model.config.id2label = dict(enumerate(self.labels))
            model.config.label2id = {name: number for number, name in enumerate(self.labels)}
        return model.train()

    def beside(self, split: Split, rows: Tensor) -> Batch:
        """Only ``row``; boxes differ in number and are looked up by it."""
        return {"row": rows, "trained": torch.full_like(rows, int(split == "train"))}

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call: the images."""
        return [{"pixel_values": self.normalize(batch["pixels"])}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """DETR's loss, on training rows."""
        batch = to_device(batch, device_of(model))
        labels = []
        for row in batch["row"].tolist():
            height, width = self._size("train", row)
            scale = torch.tensor([width, height, width, height])
            boxes = self._boxes["train"][row]
            centred = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1) / scale
            kinds = self._kinds["train"][row]
            labels.append({"class_labels": kinds.to(device_of(model)), "boxes": centred.to(device_of(model))})
        return model(pixel_values=self.normalize(batch["pixels"]), labels=labels).loss

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """COCO's average precision on all readable images of the split."""
        device = device_of(model)
        found: list[dict[str, Any]] = []
        seen: list[int] = []
        with evaluating(model):
            for batch in self.batches(split, batch_size=batch_size):
                output = model(**self.inputs({"pixels": batch["pixels"].to(device)})[0])
                scores, kinds = output.logits.float().softmax(-1)[..., :-1].nan_to_num(0.0).max(-1)
                for row, score, kind, box in zip(
                    batch["row"].tolist(), scores.cpu(), kinds.cpu(), output.pred_boxes.float().cpu(), strict=True
                ):
                    seen.append(row)
                    height, width = self._size(split, row)
                    corner = torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, 2:]], 1).nan_to_num(0.0)
                    corner = corner * torch.tensor([width, height, width, height])
                    for index in score.topk(min(_MOST, len(score))).indices.tolist():
                        found.append(_detection(row, int(kind[index]), corner[index].tolist(), float(score[index])))
        if not seen:
            raise InputError(f"none of the images of {split} can be read; {'; '.join(self.notes())}")
        return average_precision(
            {row: (self._boxes[split][row], self._kinds[split][row]) for row in seen}, found, self.labels
        )

    def _size(self, split: Split, row: int) -> tuple[int, int]:
        """Height and width of an image as it is shown, from its head."""
        image = int(self._image_of[split][row])
        known = self._edges.setdefault(split, {})
        if image not in known:
            source = self._sources[split][image]
            with require("PIL.Image", "vision").open(io.BytesIO(source) if isinstance(source, bytes) else source) as f:
                turned = f.getexif().get(0x0112, 1) >= 5  # EXIF's orientations that lie on the side
                known[image] = (f.width, f.height) if turned else (f.height, f.width)
        return known[image]


def average_precision(
    truth: dict[int, tuple[Tensor, Tensor]], found: list[dict[str, Any]], labels: Sequence[str]
) -> dict[str, float]:
    """COCO's average precision, by pycocotools.

    Args:
        truth: For each image its boxes `[objects, 4]` as x, y, width, height in pixels, and their classes `[objects]`.
        found: ``image_id``, ``category_id``, ``bbox`` and ``score`` of each detection.
        labels: Names of the classes.

    Returns:
        The metrics of `Detection`, in points; without any object of a size, its metric is left out.
    """
    coco_module, evaluation = require("pycocotools.coco", "detection"), require("pycocotools.cocoeval", "detection")
    annotations = [
        {"image_id": image, "category_id": int(kind), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for image, (boxes, kinds) in truth.items()
        for box, kind in zip(boxes.tolist(), kinds, strict=True)
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco = coco_module.COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in truth],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(labels)],
        }
        coco.createIndex()
        known = [detection for detection in found if detection["category_id"] < len(labels)]
        if not known or not annotations:
            return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
        judge = evaluation.COCOeval(coco, coco.loadRes(known), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    scores = dict(zip(_METRICS, judge.stats[: len(_METRICS)].tolist(), strict=True))
    return {name: 100 * score for name, score in scores.items() if score >= 0}


def _detection(row: int, kind: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": row, "category_id": kind, "bbox": box, "score": score}


def _objects(cell: Any, form: str, place: str) -> tuple[Tensor, list[int | str]]:
    """Boxes `[objects, 4]` as x, y, width, height, and their categories."""
    if isinstance(cell, list):  # of one dictionary an object
        keys = {key for item in cell if isinstance(item, dict) for key in item}
        cell = {key: [item.get(key) for item in cell if isinstance(item, dict)] for key in keys} if cell else {}
    if not isinstance(cell, dict):
        raise InputError(
            f'{place}: the objects are a {type(cell).__name__}; expected {{"bbox": [...], "category": [...]}}'
        )
    boxes = next((cell[name] for name in _BOXES if name in cell), [])
    kinds = next((cell[name] for name in _CATEGORIES if name in cell), [])
    try:
        table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{place}: a box is not four numbers: {str(boxes)[:60]}") from None
    if len(table) != len(kinds):
        raise InputError(f"{place}: {len(table)} boxes and {len(kinds)} categories; give each box one category")
    if not all(isinstance(kind, int | str) for kind in kinds):
        raise InputError(f"{place}: a category is neither a name nor a number: {str(kinds)[:60]}")
    if form == "xyxy":
        table = torch.cat([table[:, :2], table[:, 2:] - table[:, :2]], 1)
    if not bool(torch.isfinite(table).all()) or bool((table[:, 2:] <= 0).any()):
        raise InputError(f"{place}: a box has no width or height: {str(boxes)[:60]} (as {form}; or boxes=xyxy)")
    return table, list(kinds)
