"""Image-text retrieval: the caption of an image among all captions, and the image of a caption among all images."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2d.data.annotated_images import read_image_rows
from s2d.data.base import SPLITS, Batch, Split
from s2d.data.tokens import require_tokenizer, tokenizer_key
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.dual_encoder import DualEncoder, as_dual, own_loss
from s2d.models.running import evaluating
from s2d.tasks.base import device_of, register, to_device
from s2d.tasks.image_base import ImageRows

_CAPTIONS = ("caption", "captions", "text", "texts", "sentences", "raw", "description")
_RANKS = (1, 5, 10)


@register("retrieval")
class Retrieval(ImageRows):
    """Find the caption of an image, and the image of a caption, with CLIP or SigLIP.

    Every caption of a split is compared with every image of it, as in the evaluations on COCO and Flickr30k (CLIP,
    arXiv 2103.00020): ``image_to_text_r1`` is the share of images of which one of their own captions comes first,
    ``text_to_image_r1`` the share of captions whose own image does; likewise ``r5`` and ``r10``. ``mean_r1`` is the
    mean of both ways. Fine-tuning uses the model's own loss; images in a batch that share a caption match it all.

    Args:
        data: See `s2d.tasks.image_base`; a caption cell holds one text or a list of them.
        image: Name of the image column; found by usual names when None.
        caption: Name of the caption column; likewise.
        augment: Shift and mirror training images. Off, since captions may tell left from right.
    """

    primary = "mean_r1"
    separable = False

    def __init__(
        self,
        data: str | os.PathLike[str],
        image: str | None = None,
        caption: str | None = None,
        augment: bool = False,
    ) -> None:
        super().__init__(read_image_rows(data, image, {"caption": (caption, _CAPTIONS)}))
        self.augment = augment
        self._captions: dict[Split, list[str]] = {}  # distinct texts of a split
        self._own: dict[Split, list[list[int]]] = {}  # of each row
        for split in SPLITS:
            known: dict[str, int] = {}
            self._own[split] = [
                [known.setdefault(text, len(known)) for text in _texts(row.cells[0], row.place)]
                for row in self.rows[split]
            ]
            self._captions[split] = list(known)
        self._tokens: dict[Split, dict[str, Tensor]] = {}
        self._tokenized_for = ""

    def prepare(self, loaded: Loaded) -> None:
        """Decode the images, tokenize the captions."""
        dual = as_dual(loaded.model)
        super().prepare(loaded)
        tokenizer = require_tokenizer(loaded, self.name)
        if self._tokenized_for != tokenizer_key(tokenizer):
            self._tokens = {split: dual.tokenize(tokenizer, texts) for split, texts in self._captions.items()}
            self._tokenized_for = tokenizer_key(tokenizer)

    def build(self, loaded: Loaded, seed: int = 0) -> DualEncoder:
        """A copy of the model behind one pair of methods."""
        self.prepare(loaded)
        return copy.deepcopy(as_dual(loaded.model)).train()

    def beside(self, split: Split, rows: Tensor) -> Batch:
        """``row`` and one of its captions, ``caption``, by number; the first, except in training."""
        own = [self._own[split][row] for row in rows.tolist()]
        pick = [texts[int(torch.randint(len(texts), ()))] if split == "train" else texts[0] for texts in own]
        return {"row": rows, "caption": torch.tensor(pick)}

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call: training images and their captions."""
        return [{"pixel_values": self.normalize(batch["pixels"]), **self._text("train", batch["caption"].unique())}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Images against the captions of the batch."""
        device = device_of(model)
        captions = batch["caption"].unique()
        own = [set(self._own["train"][row]) for row in batch["row"].tolist()]
        match = torch.tensor([[caption in mine for caption in captions.tolist()] for mine in own], device=device)
        pixels = self.training_pixels(model, batch["pixels"].to(device))
        scores = model(pixel_values=pixels, **to_device(self._text("train", captions), device))
        return own_loss(model, scores, match)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways on all readable images of the split, in points."""
        assert isinstance(model, DualEncoder)
        device = device_of(model)
        with evaluating(model):
            images: dict[int, Tensor] = {}
            number_of: dict[int, int] = {}
            own: list[list[int]] = []
            for batch in self.batches(split, batch_size=batch_size):
                vectors = model.image(self.normalize(batch["pixels"].to(device))).float().cpu()
                for row, vector in zip(batch["row"].tolist(), vectors, strict=True):
                    image = int(self._image_of[split][row])  # an image may stand in several rows, one for each caption
                    if image not in images:
                        number_of[image] = len(images)
                        images[image] = vector
                        own.append([])
                    own[number_of[image]] += self._own[split][row]
            if not images:
                raise InputError(f"none of the images of {split} can be read; {'; '.join(self.notes())}")
            parts = [
                model.text(**to_device(self._text(split, rows), device)).float().cpu()
                for rows in torch.arange(len(self._captions[split])).split(batch_size)
            ]
        return recalls(torch.stack(list(images.values())) @ torch.cat(parts).T, own)

    def _text(self, split: Split, captions: Tensor) -> dict[str, Tensor]:
        return {name: part[captions] for name, part in self._tokens[split].items()}


def recalls(scores: Tensor, own: list[list[int]]) -> dict[str, float]:
    """Recall both ways.

    Args:
        scores: `[images, texts]`, larger is nearer; NaN is no answer.
        own: For each image, the numbers of its texts. Texts of no image are candidates too.

    Returns:
        ``mean_r1`` and ``image_to_text_rN``, ``text_to_image_rN`` for N of 1, 5 and 10, in points.
    """
    match = torch.zeros(scores.shape, dtype=torch.bool)
    for image, texts in enumerate(own):
        match[image, texts] = True
    scores = scores.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    found: dict[str, float] = {}
    for way, table, right in (("image_to_text", scores, match), ("text_to_image", scores.T, match.T)):
        asked = right.any(1)
        table, right = table[asked], right[asked]
        best = table.masked_fill(~right, -torch.inf).max(1).values
        # The number of wrong ones that are at least as near: a tie is no hit.
        before = ((table >= best.unsqueeze(1)) & ~right).sum(1)
        for rank in _RANKS:
            found[f"{way}_r{rank}"] = 100 * float((before < rank).double().mean())
    return {"mean_r1": (found["image_to_text_r1"] + found["text_to_image_r1"]) / 2, **found}


def _texts(cell: Any, place: str) -> Iterator[str]:
    texts = [cell] if isinstance(cell, str) else cell
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError(f"{place}: expected a caption or a list of captions, not {str(cell)[:60]!r}")
    yield from texts
