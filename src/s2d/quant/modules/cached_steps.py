"""Decoding with a cache: a step has few tokens, and the prefix is counted from the start of the sequence."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant.numerics.quantizer import Quantizer

# Names of the cache argument in versions of transformers; the old one is still accepted.
CACHES, INPUTS = ("past_key_values", "cache", "cache_params"), ("input_ids", "inputs_embeds")


class CachedSteps:
    """A forward pre-hook that tells a module's quantizers how many tokens the cache holds and how many come now."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the call's cache; without a cache the call's first token is the first of the sequence.

        Raises:
            InputError: The model has an encoder as well, whose tokens the cache does not count.
        """
        with suppress(TypeError):
            kwargs = {**kwargs, **inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments}
        tokens = next((len(x[0]) for name in INPUTS if isinstance(x := kwargs.get(name), Tensor)), 0)
        before = _length(next((cache for name in CACHES if (cache := kwargs.get(name)) is not None), None))
        if before and getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            raise InputError("a prefix and a cache do not go together in an encoder-decoder; pass use_cache=False")
        for each in module.modules():
            if isinstance(each, Quantizer):
                each.cached = (before, tokens)


def install(model: nn.Module) -> None:
    """Put the hook on a model whose quantizers keep a prefix, and on its parts that take ids and a cache."""
    take_out(model)
    if any(isinstance(each, Quantizer) and each.prefix for each in model.modules()):
        for module in model.modules():
            names = inspect.signature(module.forward).parameters.keys()
            if not names.isdisjoint(CACHES) and not names.isdisjoint(INPUTS):
                module.register_forward_pre_hook(CachedSteps(), with_kwargs=True)


def take_out(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, CachedSteps):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


def _length(cache: Any) -> int:
    """Tokens that a cache holds: transformers' own, or a tuple of keys and values a layer."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache else 0
