"""Zero-shot classification: an image's class is the one whose descriptions lie nearest."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2d.data.base import Batch, Split
from s2d.data.tokens import digest, require_tokenizer
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.dual_encoder import DualEncoder, as_dual, own_loss
from s2d.models.running import evaluating
from s2d.tasks.base import device_of, register, to_device
from s2d.tasks.image_base import LabelledImages

# Seven of CLIP's eighty, the ones its authors recommend (openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet).
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@register("zero-shot")
class ZeroShot(LabelledImages):
    """Classify images by the names of their classes, with CLIP or SigLIP.

    Each class is the mean of its descriptions' unit vectors, one for each template (CLIP, arXiv 2103.00020, section
    3.1.4). Fine-tuning goes on as the model was pretrained: images against descriptions of the classes in the batch.
    The metrics are ``accuracy`` and, with more than ten classes, ``top5``, in points.

    Args:
        data, image, label: As for ``image-classification``.
        classes: Names of the classes as they stand in a sentence; needed where the data only number them.
        templates: Sentences with ``{}`` for the name.
        augment: Flip and shift training images.
    """

    primary = "accuracy"
    separable = False

    def __init__(
        self,
        data: str | os.PathLike[str],
        image: str | None = None,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
        augment: bool = True,
    ) -> None:
        super().__init__(data, image, label, classes, augment)
        if not templates or not all("{}" in template for template in templates):
            raise InputError(f"every template needs a {{}} for the name of the class; these are {list(templates)}")
        if all(name.isdecimal() for name in self.labels):
            raise InputError(f"the classes of {data} are numbers; name them: -o 'task.classes=[cat, dog, ...]'")
        self.templates = tuple(templates)
        self._texts: dict[str, Tensor] = {}  # [classes * templates, tokens]
        self._tokenized_for = ""

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of the images and of the descriptions that they are compared with."""
        return digest([super().fingerprint, *self.labels, *self.templates])

    def prepare(self, loaded: Loaded) -> None:
        """Decode the images, tokenize the descriptions."""
        dual = as_dual(loaded.model)
        super().prepare(loaded)
        if self._tokenized_for != loaded.fingerprint:
            tokenizer = require_tokenizer(loaded, self.name)
            texts = [template.format(name) for name in self.labels for template in self.templates]
            self._texts = dual.tokenize(tokenizer, texts)
            self._tokenized_for = loaded.fingerprint

    def build(self, loaded: Loaded, seed: int = 0) -> DualEncoder:
        """A copy of the model behind one pair of methods."""
        self.prepare(loaded)
        return copy.deepcopy(as_dual(loaded.model)).train()

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call: the images, and a description of each of their classes."""
        texts = self._described(batch["labels"].unique(), torch.zeros(len(self.labels), dtype=torch.long))
        return [{"pixel_values": self.normalize(batch["pixels"]), **texts}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Images against descriptions of the batch's classes, the template of each drawn at random."""
        present = batch["labels"].unique()
        texts = self._described(present, torch.randint(len(self.templates), (len(self.labels),)))
        batch, device = to_device(batch, device_of(model)), device_of(model)
        pixels = self.training_pixels(model, batch["pixels"])
        scores = model(pixel_values=pixels, **to_device(texts, device))
        match = batch["labels"].unsqueeze(1) == present.to(device)
        return own_loss(model, scores, match)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """``accuracy`` (and ``top5``) on all readable images of the split."""
        assert isinstance(model, DualEncoder)
        classes = self._class_vectors(model, batch_size)
        return self.score(lambda pixels: model.image(pixels) @ classes.T, model, split, batch_size)

    def _class_vectors(self, model: DualEncoder, batch_size: int) -> Tensor:
        """Unit vectors `[classes, width]`."""
        device = device_of(model)
        rows = len(self.labels) * len(self.templates)
        with evaluating(model):
            parts = [
                model.text(**{name: part[start : start + batch_size].to(device) for name, part in self._texts.items()})
                for start in range(0, rows, batch_size)
            ]
        vectors = torch.cat(parts).view(len(self.labels), len(self.templates), -1).mean(1)
        return torch.nn.functional.normalize(vectors, dim=-1)

    def _described(self, classes: Tensor, template: Tensor) -> dict[str, Tensor]:
        rows = classes * len(self.templates) + template[classes]
        return {name: part[rows] for name, part in self._texts.items()}
