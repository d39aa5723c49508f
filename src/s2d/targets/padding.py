"""Which tokens of a call are real: the padding masks that models receive.

The names here are for what no graph can tell. Where one was traced, it says whose mask a key of the batch is, and the
names are not asked (`s2d.models.masks`, `s2d.decay.traced_model`). Three cases are left: a forward without a trace (the
teacher's, a model that cannot be traced, a part that a training loop calls by itself), tokens that the model picked or
moved after its mask was laid on them, and a traced batch without any padding, whose values do not show whether 0 or 1
marks a token. In each the only witness is the argument's name, which transformers and torch keep by contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

MASKS = frozenset({"attention_mask", "src_key_padding_mask", "key_padding_mask"})
# The number added to the scores of a hidden token is far below any score, in every model.
_HIDDEN = -1e3


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name; the named ones alone where the call does not fit the signature."""
    with suppress(TypeError):
        return {**kwargs, **signature.bind_partial(*args, **kwargs).arguments}
    return kwargs


def real_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The real tokens of a call by its mask, ``[B, T]`` boolean; None without a mask.

    An ``attention_mask`` is non-zero at real tokens; a floating-point one without any 1 is added to the scores. Torch's
    own ``src_key_padding_mask`` and ``key_padding_mask`` are True at padding, or added to the scores.
    """
    given = _by_name(signature, args, kwargs)
    shown = given.get("attention_mask")
    if isinstance(shown, Tensor) and shown.ndim == 2:
        multiplied = not shown.is_floating_point() or bool(((shown == 0) | (shown == 1)).all() & shown.any())
        return shown.bool() if multiplied else shown > _HIDDEN
    hidden = given.get("src_key_padding_mask")
    # In cross-attention the mask belongs to other tokens.
    if hidden is None and given.get("query") is given.get("key"):
        hidden = given.get("key_padding_mask")
    if not isinstance(hidden, Tensor) or hidden.ndim != 2:
        return None
    return hidden > _HIDDEN if hidden.is_floating_point() else ~hidden.bool()


def given_mask(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has a mask of any layout, or is a call of an attention, whose model may have one."""
    names = [name for name in ("attention_mask", "src_key_padding_mask") if name in signature.parameters]
    given = _by_name(signature, args, kwargs)
    return not names or any(given.get(name) is not None for name in names)


def without_first(
    real: Tensor | None, signature: inspect.Signature, args: Any, kwargs: Any, count: int
) -> Tensor | None:
    """The real tokens except the first ``count`` of a sequence. Without a mask, ids or embeddings give the shape."""
    if real is None:
        given = _by_name(signature, args, kwargs).values()
        tensors = [value for value in given if isinstance(value, Tensor)]
        tokens = [t for t in tensors if (t.ndim == 2 and not t.is_floating_point()) or t.ndim == 3]
        if not tokens:
            return None
        real = torch.ones(tokens[0].shape[:2], dtype=torch.bool, device=tokens[0].device)
    real = real.clone()
    real[:, :count] = False
    return real
