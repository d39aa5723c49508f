"""Models that s2d builds on an encoder, kept under ``encoder.``: a sentence embedding, a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.errors import InputError
from s2d.models.saved import describe, rebuild, register_architecture


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of each row's real tokens.

    Args:
        hidden: `[batch, tokens, width]`.
        attention_mask: `[batch, tokens]`, 1 for real tokens; each row has at least one.

    Returns:
        `[batch, width]`.
    """
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)


def hidden_width(encoder: nn.Module) -> int:
    """The width of an encoder's output tokens.

    Raises:
        InputError: The encoder does not say.
    """
    config = getattr(encoder, "config", None)
    for name in ("hidden_size", "dim", "d_model"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    raise InputError(f"{type(encoder).__name__} does not state the width of its tokens (config.hidden_size)")


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder within a model: what s2d's models are built on, a transformers model without its head, or itself."""
    if isinstance(model, SentenceEncoder | TextClassifier):
        return model.encoder
    backbone = getattr(model, "base_model", None)  # transformers: itself when there is no head
    return backbone if isinstance(backbone, nn.Module) else model


class SentenceEncoder(nn.Module):
    """Texts to unit vectors: mean over real tokens, then L2 normalisation (Sentence-BERT, arXiv 1908.10084)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, tokens]` ids and mask to `[batch, width]` unit vectors."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(mean_pool(hidden, attention_mask), dim=-1)


class TextClassifier(nn.Module):
    """Texts to class scores: mean over real tokens, then one linear layer.

    Args:
        encoder: A text encoder of the transformers kind.
        labels: Names of the classes, in the order of the scores.
        seed: For the head's random start; the global random state is not touched.
    """

    def __init__(self, encoder: nn.Module, labels: Sequence[str], *, seed: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = tuple(labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(hidden_width(encoder), len(self.labels))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, tokens]` ids and mask to `[batch, classes]` scores."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(mean_pool(hidden, attention_mask))


def _classifier(description: dict[str, Any]) -> TextClassifier:
    return TextClassifier(rebuild(description["encoder"]), description["labels"])


register_architecture(
    "sentence-encoder",
    matches=lambda model: isinstance(model, SentenceEncoder),
    describe=lambda model: {"encoder": describe(model.encoder)},
    rebuild=lambda description: SentenceEncoder(rebuild(description["encoder"])),
)
register_architecture(
    "text-classifier",
    matches=lambda model: isinstance(model, TextClassifier),
    describe=lambda model: {"encoder": describe(model.encoder), "labels": list(model.labels)},
    rebuild=_classifier,
)
