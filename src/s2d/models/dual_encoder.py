"""Images and texts in one space: CLIP and SigLIP of transformers, and open_clip, behind one pair of methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.errors import InputError
from s2d.models.saved import describe, rebuild, register_architecture


class DualEncoder(nn.Module):
    """A model of two towers.

    Args:
        encoder: `CLIPModel`, `SiglipModel` (which SigLIP2's checkpoints of fixed size are, too), an open_clip model,
            or an `ImageTextPair`.

    Raises:
        InputError: The model has no pair of towers.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        if not any(hasattr(encoder, name) for name in ("get_image_features", "encode_image")):
            raise InputError(f"{type(encoder).__name__} has no image and text tower; load a CLIP or SigLIP model")
        self.encoder = encoder

    @property
    def sigmoid(self) -> bool:
        """Whether it was trained with the sigmoid loss (arXiv 2303.15343) and so has a bias."""
        return getattr(self.encoder, "logit_bias", None) is not None

    def tokenize(self, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
        """Texts in the format of the model's training: for open_clip and SigLIP padded to a fixed length without mask.

        Returns:
            Keywords of `text`, each `[texts, tokens]`.
        """
        if not hasattr(tokenizer, "pad"):  # open_clip's
            return {"input_ids": tokenizer(texts)}
        length = self._positions()
        if self.sigmoid and not getattr(self.encoder, "reads_masks", False):
            options: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
            return {"input_ids": tokenizer(texts, return_tensors="pt", **options)["input_ids"]}
        found = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def image(self, pixel_values: Tensor) -> Tensor:
        """`[images, 3, height, width]` to unit vectors `[images, width]`."""
        encoder: Any = self.encoder
        encode = encoder.get_image_features if hasattr(encoder, "get_image_features") else encoder.encode_image
        return F.normalize(_tensor(encode(pixel_values)), dim=-1)

    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[texts, tokens]` to unit vectors `[texts, width]`."""
        encoder: Any = self.encoder
        if not hasattr(encoder, "get_text_features"):
            return F.normalize(encoder.encode_text(input_ids), dim=-1)
        return F.normalize(_tensor(encoder.get_text_features(input_ids, attention_mask=attention_mask)), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The similarity of each image and text: scaled (and shifted) cosines `[images, texts]`."""
        encoder: Any = self.encoder
        scores = self.image(pixel_values) @ self.text(input_ids, attention_mask).T * encoder.logit_scale.exp()
        return scores + encoder.logit_bias if self.sigmoid else scores

    def _positions(self) -> int:
        stated = getattr(self.encoder, "text_positions", None)
        if isinstance(stated, int):
            return stated
        config: Any = getattr(self.encoder, "config", None)
        return int(config.text_config.max_position_embeddings)


def has_two_towers(model: nn.Module) -> bool:
    """Whether a model, not yet a `DualEncoder`, has a tower for images and one for texts."""
    return any(hasattr(model, name) for name in ("get_text_features", "encode_text"))


def as_dual(model: nn.Module) -> DualEncoder:
    """The model, behind one pair of methods."""
    return model if isinstance(model, DualEncoder) else DualEncoder(model)


def own_loss(model: nn.Module, scores: Tensor, match: Tensor) -> Tensor:
    """`pair_loss` as a `DualEncoder`, or what a library wrapped around one, was trained with."""
    dual = getattr(model, "module", model)
    assert isinstance(dual, DualEncoder)
    return pair_loss(scores, match, sigmoid=dual.sigmoid)


def pair_loss(scores: Tensor, match: Tensor, *, sigmoid: bool) -> Tensor:
    """The loss of image-text pairs: pairwise sigmoid (SigLIP, arXiv 2303.15343), or softmax both ways (CLIP).

    Args:
        scores: `[images, texts]`.
        match: Which text belongs to which image, bool `[images, texts]`; several may.
        sigmoid: Which of the two losses.

    Returns:
        A scalar, the mean over images.
    """
    if sigmoid:
        return -F.logsigmoid(torch.where(match, scores, -scores)).sum(1).mean()
    losses = []
    for logits, right in ((scores, match), (scores.T, match.T)):
        has = right.any(1)
        chosen = logits.masked_fill(~right, -torch.inf).logsumexp(1) - logits.logsumexp(1)
        losses.append(-chosen[has].mean())
    return torch.stack(losses).mean()


def _tensor(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


register_architecture(
    "dual-encoder",
    matches=lambda model: isinstance(model, DualEncoder),
    describe=lambda model: {"encoder": describe(model.encoder)},
    rebuild=lambda description: DualEncoder(rebuild(description["encoder"])),
)
