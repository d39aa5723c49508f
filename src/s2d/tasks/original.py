"""The model as it was published, as a teacher: which one it is, and how far a language model is from it.

Source: knowledge distillation (arXiv 1503.02531) at temperature 1, on next-token distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s2d.errors import InputError
from s2d.models import Loaded, load, read_notes
from s2d.models.checkpoints import CONFIG_NAME
from s2d.tasks.base import Batch, device_of
from s2d.tasks.tokens import require_tokenizer

# Tokens whose scores over the vocabulary exist at a time: 50 MB for a vocabulary of 50,000.
_CHUNK = 256


def find_original(loaded: Loaded, original: str, task: str) -> Loaded:
    """The model that teaches another.

    Args:
        loaded: The one that is taught, or compared.
        original: What was named, as `s2d.load` takes it; empty for the loaded model itself.
        task: Its name, for messages.

    Raises:
        InputError: None is named and this model is none; or they do not read the same tokens.
    """
    remedy = "name the model that it was made from: -o task.original=MODEL"
    if original:
        found = load(original, device=device_of(loaded.model))
        tokenizers = [require_tokenizer(each, task) for each in (found, loaded)]
        if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
            raise InputError(f"{original} and {loaded.source} have different tokenizers; {remedy}")
        return found
    if any(type(module).__module__.startswith("s2d.quant") for module in loaded.model.modules()):
        raise InputError(f"{loaded.source} is quantized, so it cannot be its own original; {remedy}")
    if (Path(loaded.source) / CONFIG_NAME).is_file() and "conditioned" in read_notes(loaded.source):
        raise InputError(f"{loaded.source} is conditioned, so it cannot be its own original; {remedy}")
    return loaded


def divergence(
    found: Tensor,
    wanted: Tensor,
    head: Callable[[Tensor], Tensor],
    original_head: Callable[[Tensor], Tensor],
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """KL(original || model) of the next-token distributions, and where both have the same most likely token.

    The scores over the vocabulary exist for `chunk` tokens at a time, in the backward pass too, where they are computed
    again.

    Args:
        found: The model's last hidden states `[tokens, width]`.
        wanted: The original's.
        head: Hidden states `[1, n, width]` to scores `[1, n, vocabulary]`.
        original_head: The original's.
        chunk: See above.

    Returns:
        `[tokens]` in nats, and `[tokens]` booleans.
    """

    def compare(h_s: Tensor, h_t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            expected = original_head(h_t.unsqueeze(0))[0].float().log_softmax(-1)
        scores = head(h_s.unsqueeze(0))[0].float().log_softmax(-1)
        return (expected.exp() * (expected - scores)).sum(-1), scores.argmax(-1) == expected.argmax(-1)

    pairs = list(zip(found.split(chunk), wanted.split(chunk), strict=True))
    if torch.is_grad_enabled():
        parts = [checkpoint(compare, h_s, h_t, use_reentrant=False) for h_s, h_t in pairs]
    else:
        parts = [compare(h_s, h_t) for h_s, h_t in pairs]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def mean_divergence(model: nn.Module, original: nn.Module, batch: Batch) -> Tensor:
    """KL(original || model) of the next token, a scalar: the mean over a batch's real tokens, in nats."""
    mask = batch["attention_mask"].bool()
    heads = known_head(model), known_head(original)
    found = hidden_states(model, heads[0], batch)[mask]
    with torch.no_grad():
        wanted = hidden_states(original, heads[1], batch)[mask]
    return divergence(found, wanted, *heads)[0].mean()


def hidden_states(model: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
    """What the head sees, `[batch, tokens, width]`; the head itself sees only one token of each text."""
    notes: list[Tensor] = []

    def shorten(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        notes.append(args[0])
        return (args[0][:, :1], *args[1:])

    hook = head.register_forward_pre_hook(shorten)
    try:
        model(**batch)
    finally:
        hook.remove()
    return notes[-1]


def head_of(model: nn.Module) -> nn.Module | None:
    """A causal language model's output layer; None of an encoder."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def known_head(model: nn.Module) -> nn.Module:
    """The output layer of a model that has one."""
    head = head_of(model)
    assert head is not None
    return head
