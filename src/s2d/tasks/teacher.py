"""The published model as the teacher: how it is found, and the distance of another model from it.

Sources: knowledge distillation (arXiv 1503.02531) at temperature 1, on the distributions of tokens or classes; for
encoders the teacher's embedding and its last features, as in MiniLM-style and sentence-embedding distillation (arXiv
2004.09813).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from s2d.data.base import Batch
from s2d.distributed.processes import inside
from s2d.errors import InputError
from s2d.models import Loaded, load
from s2d.tasks.base import device_of

# Tokens whose scores over the vocabulary exist at a time: 50 MB for a vocabulary of 50,000.
_CHUNK = 256


def find_original(loaded: Loaded, original: str, reads: Callable[[Loaded], object], called: str) -> Loaded:
    """The teacher of another model.

    Args:
        loaded: The student, or the model to compare.
        original: The teacher's name, as `s2d.load` takes it. Empty: the model from which the loaded one was made, if
            its folder notes it, else the loaded model itself.
        reads: A key for how a model reads its data, such as its vocabulary. It must be equal for both.
        called: Noun for that key, for messages.

    Raises:
        InputError: None is named and this model is none; it cannot be loaded; or they do not read alike.
    """
    remedy = "name the model that it was made from: -o task.original=MODEL"
    name = original or loaded.origin[0]
    if not original and name == loaded.source:
        if any(type(module).__module__.startswith("s2d.quant") for module in loaded.model.modules()):
            raise InputError(f"{loaded.source} is quantized, so it cannot be its own original; {remedy}")
        if "conditioned" in loaded.notes:  # in place, or by whoever did not note the model
            raise InputError(f"{loaded.source} is conditioned, so it cannot be its own original; {remedy}")
        return loaded
    try:
        found = load(name, device=device_of(loaded.model))
    except InputError as error:
        if original:
            raise
        raise InputError(
            f"{loaded.source} was made from {name}, which cannot be read now ({error}); {remedy}"
        ) from error
    if reads(found) != reads(loaded):
        raise InputError(f"{name} and {loaded.source} have different {called}; {remedy}")
    return found


class Teacher:
    """The original of a task, found when the task first meets a model."""

    def __init__(
        self,
        original: str,
        part: Callable[[Loaded], nn.Module],
        kind: Callable[[nn.Module], object],
        reads: Callable[[Loaded], object],
        called: str,
    ) -> None:
        """Find nothing yet.

        Args:
            original: See `find_original`.
            part: What is compared of a model.
            kind: Of such a part: equal for both, or they cannot be compared.
            reads: See `find_original`.
            called: Likewise.
        """
        self._original, self._part, self._kind = original, part, kind
        self._reads, self._called = reads, called
        self._model: nn.Module | None = None
        self.notes: list[str] = []  # which model it is, if the user named none

    @property
    def model(self) -> nn.Module:
        """The part of the original that is compared, in evaluation mode."""
        if self._model is None:
            raise RuntimeError("the original is not known yet: call build(loaded) first")
        return self._model

    def pupil(self, loaded: Loaded) -> nn.Module:
        """A copy of the part of a model that is compared.

        Raises:
            InputError: No original is named and this model is none; or the original is of another kind or width.
        """
        if self._model is None:
            found = find_original(loaded, self._original, self._reads, self._called)
            self._model = self._part(found).eval()
            if found.source not in (self._original, loaded.source):
                self.notes = [f"the original is {found.source}, which {loaded.source} was made from"]
        model = copy.deepcopy(self._part(loaded))
        if self._kind(model) != self._kind(self._model):
            raise InputError(
                f"{loaded.source} cannot be compared with {self._original or 'the original'}: "
                "they are models of different kinds or widths; name the model that it was made from"
            )
        return model


@dataclass(frozen=True)
class FeatureLoss:
    """How far an encoder is from the original: ``embedding * (1 - cos) + features * distance``.

    The first term is the mean over examples of the pooled embeddings' distance. The second is the mean squared distance
    of the last layer's tokens as a share of the original's variance.

    Attributes:
        embedding: Weight of an embedding's distance.
        features: Weight of the distance of the last layer's tokens.
    """

    embedding: float
    features: float

    def __post_init__(self) -> None:
        if min(self.embedding, self.features) < 0 or not 0 < self.embedding + self.features < math.inf:
            raise InputError(
                "embedding and features are weights, one of them at least above 0, "
                f"not {self.embedding} and {self.features}"
            )

    def __call__(self, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, a scalar, from embeddings `[batch, width]` and tokens `[n, width]` of model and original."""
        distance = 1 - F.cosine_similarity(found[0].float(), wanted[0].float(), dim=-1).mean()
        return self.embedding * distance + self.features * variance_share(found[1], wanted[1])


def variance_share(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance of vectors `[n, D]` as a share of the teacher's variance, a scalar in fp32."""
    found, wanted = found.float(), wanted.float()
    spread = (wanted - wanted.mean(0)).square().mean()
    return (found - wanted).square().mean() / spread.clamp(min=1e-12)


def divergence(
    found: Tensor,
    wanted: Tensor,
    head: Callable[[Tensor], Tensor],
    original_head: Callable[[Tensor], Tensor],
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """KL(original || model) of the next-token distributions, and where both have the same most likely token.

    The scores over the vocabulary exist for `chunk` tokens at a time. The backward pass computes them again.

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
    """The hidden states before the head, `[batch, tokens, width]`; the head is run on one token of each text only."""
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
    return getattr(inside(model), "get_output_embeddings", lambda: None)()


def known_head(model: nn.Module) -> nn.Module:
    """The output layer of a model that has one."""
    head = head_of(model)
    assert head is not None
    return head
