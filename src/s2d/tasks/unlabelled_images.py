"""Conditioning without labels: images, and the published model as the teacher.

The distance from the original, and its sources: `s2d.tasks.teacher`.
"""

from __future__ import annotations

import inspect
import math
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.data.base import Batch, Split
from s2d.data.docstring_corpus import STDLIB, collect
from s2d.data.images import content_of, read_images
from s2d.data.splits import split_by_content
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.dual_encoder import DualEncoder, has_two_towers
from s2d.models.image_heads import feature_width, image_tower, number_of_classes
from s2d.models.image_views import ImageView, view_images
from s2d.models.preprocessing import preprocessing_of
from s2d.models.running import evaluating
from s2d.tasks.base import device_of, register
from s2d.tasks.image_base import ImageRows
from s2d.tasks.teacher import FeatureLoss, Teacher

# Parts of a model of two towers that take the image tower's features into the common space.
_PROJECTIONS = ("visual_projection", "image_projection")
# Texts for the other tower, where a model is called as a whole: as many as images in a batch, again and again.
_TEXTS = 16


@register("unlabelled-images")
class UnlabelledImages(ImageRows):
    """Stay the model that was published, on images without labels: its features, and a classifier's scores.

    The model stays what it is: an encoder, a classifier with its head, or CLIP and SigLIP, of which the image tower is
    trained and the text tower stays. The loss is that of `s2d.tasks.teacher.FeatureLoss` on the pooled features (of
    CLIP and SigLIP, the vectors that texts are compared with) and the last layer's tokens; of a classifier,
    ``scores * KL(original || model)`` of its classes in nats is added.

    Metrics: ``cosine``, the mean over images of the cosine between its pooled features and the original's, times 100,
    and ``drift``, 100 minus that. Of a classifier ``drift`` is the mean KL in nats, and ``agreement`` the percentage of
    images that both put into the same class.

    An image's split depends on nothing but its bytes: about 5 % are validation and 5 % test; duplicates are left out.

    Args:
        data: A folder with images or Parquet files at any depth, one Parquet file, or ``datasets:NAME``.
        original: The teacher, as `s2d.load` takes it. None: the model from which the task's first model was made, as
            noted in a conditioned or quantized folder of s2d; else that first model itself.
        image: The image column of tables; found by usual names when None.
        embedding: Weight of the pooled features' distance.
        features: Weight of the distance of the last layer's tokens.
        scores: Weight of the distance of a classifier's scores.
        train: Most images in the train split.
        heldout: Most images in the validation and in the test split.
    """

    primary = "drift"
    higher_is_better = False
    opposed = ("cosine", "agreement")
    distils = True

    def __init__(
        self,
        data: str | os.PathLike[str],
        original: str | None = None,
        image: str | None = None,
        embedding: float = 10.0,
        features: float = 1.0,
        scores: float = 1.0,
        train: int = 100_000,
        heldout: int = 500,
    ) -> None:
        self._distance = FeatureLoss(embedding, features)
        if not 0 <= scores < math.inf:
            raise InputError(f"scores is a weight, 0 or above, not {scores}")
        self.original = original or ""
        self.embedding, self.features, self.scores = embedding, features, scores
        contents = ((row, content_of(row)) for row in read_images(data, image))
        super().__init__(split_by_content(contents, train, heldout, what="image", shown=os.fspath(data)))
        self._teacher = Teacher(
            self.original,
            lambda loaded: _whole(loaded.model),
            _kind,
            lambda loaded: preprocessing_of(loaded.processor, loaded.source),
            "preprocessing",
        )
        self._classifies = False
        self._keyword = "pixel_values"
        self._texts: dict[str, Tensor] | None = None  # of a model of two towers

    def prepare(self, loaded: Loaded) -> None:
        """Decode the images to the model's size; tokenize docstrings where a model has a text tower."""
        image_tower(loaded.model)  # refuses a model that reads no images
        super().prepare(loaded)
        whole = _whole(loaded.model)
        self._keyword = next(iter(inspect.signature(whole.forward).parameters))
        self._texts = None
        if isinstance(whole, DualEncoder) and loaded.tokenizer is not None:
            pairs = collect({"train": _TEXTS, "validation": 0, "test": 0}, (STDLIB,))["train"]
            self._texts = whole.tokenize(loaded.tokenizer, [f"{pair.query} {pair.document}" for pair in pairs])

    def notes(self) -> list[str]:
        """Images that cannot be read, and which model is the original, where it was not named."""
        return [*super().notes(), *self._teacher.notes]

    def build(self, loaded: Loaded, seed: int = 0) -> nn.Module:
        """A copy of the model, two towers behind one pair of methods; nothing is random.

        Raises:
            InputError: No original is named and this model is none; or the original is of another kind or width.
        """
        self.prepare(loaded)
        model = self._teacher.pupil(loaded)
        self._classifies = number_of_classes(model) == number_of_classes(self._teacher.model) > 0
        if isinstance(model, DualEncoder):
            model.requires_grad_(False)
            for name, module in model.named_modules():
                if module is image_tower(model) or name.rpartition(".")[2] in _PROJECTIONS:
                    module.requires_grad_(True)
        return model.train()

    def result(self, model: nn.Module) -> nn.Module:
        """The model that was given to `build`: the model of two towers itself."""
        return model.encoder if isinstance(model, DualEncoder) else model

    def beside(self, split: Split, rows: Tensor) -> Batch:
        """Nothing: images have no annotations here."""
        return {}

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call of the model: the images, and as many docstrings for a text tower."""
        pixels = self.normalize(batch["pixels"])
        if self._texts is None:
            return [{self._keyword: pixels}]
        rows = torch.arange(len(pixels)) % len(next(iter(self._texts.values())))
        return [{self._keyword: pixels, **{name: part[rows] for name, part in self._texts.items()}}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The distance from the original; see the class."""
        found = self._view(model, batch)
        with torch.no_grad():
            wanted = self._view(self._teacher.model, batch)
        assert found.embedding is not None and found.tokens is not None
        assert wanted.embedding is not None and wanted.tokens is not None
        distance = self._distance((found.embedding, found.tokens), (wanted.embedding, wanted.tokens))
        if found.scores is None or wanted.scores is None:
            return distance
        return distance + self.scores * _divergence(found.scores, wanted.scores).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """``drift``, ``cosine``, and ``agreement`` of a classifier; see the class. An exported classifier shows no
        features, so ``cosine`` is left out.
        """
        teacher = self._teacher.model
        sums: dict[str, float] = {}
        count = 0
        with evaluating(model):
            for batch in self.batches(split, batch_size=batch_size):
                found, wanted = self._view(model, batch), self._view(teacher, batch)
                parts: dict[str, Tensor] = {}
                if found.embedding is not None and wanted.embedding is not None:
                    pair = found.embedding.double(), wanted.embedding.double()
                    parts["cosine"] = 100 * F.cosine_similarity(*pair, dim=-1)
                if found.scores is not None and wanted.scores is not None:
                    parts["drift"] = _divergence(found.scores, wanted.scores)
                    parts["agreement"] = 100 * (found.scores.argmax(-1) == wanted.scores.argmax(-1)).double()
                for name, values in parts.items():
                    sums[name] = sums.get(name, 0.0) + values.sum().item()
                count += len(batch["pixels"])
        if not count:
            raise InputError(f"none of the images of {split} can be read; {'; '.join(self.notes())}")
        metrics = {name: total / count for name, total in sums.items()}
        if not all(map(math.isfinite, metrics.values())):  # a broken model agrees with nothing
            return {"drift": math.inf, **{name: 0.0 for name in metrics if name != "drift"}}
        drift = metrics["drift"] if self._classifies else max(0.0, 100 - metrics["cosine"])
        return {"drift": drift, **{name: value for name, value in metrics.items() if name != "drift"}}

    def _view(self, model: nn.Module, batch: Batch) -> ImageView:
        pixels = self.normalize(batch["pixels"].to(device_of(model)))
        return view_images(model, {self._keyword: pixels}, scores=self._classifies)


def _whole(model: nn.Module) -> nn.Module:
    """The model as it is called: itself, or its two towers behind one pair of methods."""
    return DualEncoder(model) if has_two_towers(model) else model


def _kind(model: nn.Module) -> tuple[object, ...]:
    tower = image_tower(model)
    return type(tower), feature_width(tower), isinstance(model, DualEncoder)


def _divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """KL(original || model) of the classes `[images]` in nats, from scores `[images, classes]`."""
    pair = found.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
