"""What an image model computes from images: pooled features, last tokens, and the scores of its own head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from s2d.distributed.processes import inside
from s2d.errors import InputError
from s2d.models.dual_encoder import DualEncoder
from s2d.models.image_heads import image_tower, pooled_features


@dataclass(frozen=True)
class ImageView:
    """One pass of a model.

    Attributes:
        embedding: The pooled features before any head, of two towers the image's vector in their common space,
            `[images, width]`. None for an exported classifier, which returns only its scores.
        tokens: Outputs of the last layer, as rows `[n, width]`; the embedding where a model gives nothing else.
        scores: Scores of the model's own classes `[images, classes]`; None where they were not asked for.
    """

    embedding: Tensor | None
    tokens: Tensor | None
    scores: Tensor | None


def view_images(model: nn.Module, inputs: dict[str, Tensor], *, scores: bool) -> ImageView:
    """Run a model on images, and record its features and tokens.

    Args:
        model: One that reads images alone, or a `DualEncoder`; distributed or exported, too.
        inputs: Its one keyword with the prepared images `[images, 3, height, width]`.
        scores: The model has a classification head, whose scores are wanted.

    Raises:
        InputError: The model does not read images, or has two towers and is trained by several processes.
    """
    own = inside(model)
    with _noting(image_tower(own)) as notes:
        if isinstance(own, DualEncoder):
            if own is not model:
                raise InputError("a model of two towers is conditioned by one process; start it without torchrun")
            output: Any = own.image(*inputs.values())
            notes["embedding"] = output
        else:
            output = model(**inputs)
    embedding, tokens = notes.get("embedding"), notes.get("tokens")
    if embedding is None and not scores:
        embedding = pooled_features(output)
    tokens = embedding if tokens is None else tokens
    found = (output if isinstance(output, Tensor) else output.logits) if scores else None
    return ImageView(embedding, None if tokens is None else tokens.flatten(0, -2), found)


@contextmanager
def _noting(tower: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Note ``embedding`` and ``tokens`` of a tower's next pass, as far as it shows them."""
    notes: dict[str, Tensor] = {}
    undo: list[Callable[[], None]] = []
    trunk: Any = getattr(tower, "trunk", tower)  # open_clip's image towers made by timm

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:  # transformers
            notes["embedding"], notes["tokens"] = pooled_features(output), output.last_hidden_state

    undo.append(tower.register_forward_hook(note).remove)
    if hasattr(trunk, "forward_features"):  # timm: neither its tokens nor what its head reads come out of a module
        features, head = trunk.forward_features, _first(trunk.get_classifier())

        def noted(*args: Any, **options: Any) -> Tensor:
            notes["tokens"] = features(*args, **options)
            return notes["tokens"]

        trunk.forward_features = noted
        undo.append(lambda: delattr(trunk, "forward_features"))

        def note_input(module: nn.Module, args: Any) -> None:
            notes["embedding"] = args[0]

        if isinstance(head, nn.Module):
            undo.append(head.register_forward_pre_hook(note_input).remove)
    elif isinstance(layers := getattr(tower, "transformer", None), nn.Module):  # open_clip's own

        def note_tokens(module: nn.Module, args: Any, output: Any) -> None:
            notes["tokens"] = output

        undo.append(layers.register_forward_hook(note_tokens).remove)
    try:
        yield notes
    finally:
        for each in undo:
            each()


def _first(heads: Any) -> Any:
    """Distilled models of timm have two."""
    return heads[0] if isinstance(heads, tuple) else heads
