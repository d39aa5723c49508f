"""Fixed sizes: batch and tokens that a file keeps, for runtimes that compile one shape, and inputs that fit them.

Shapes: B rows, T tokens of a row. Integers of two dimensions ``[B, T]`` are sequences; everything else has its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.errors import InputError

AXES = ("batch", "tokens")
PADDING, ALONG_TOKENS = "s2d.padding", "s2d.along_tokens"  # what a file with fixed sizes says of itself


def parse_shape(text: str | None) -> dict[str, int]:
    """``"batch=1,tokens=128"`` as sizes by name.

    Raises:
        InputError: Another name, or no size.
    """
    sizes: dict[str, int] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, size = (each.strip() for each in part.partition("="))
        if name not in AXES or not size.isdecimal() or not 1 <= int(size) <= 2**20:
            raise InputError(f"--shape {text}: sizes are {' and '.join(AXES)}, as in --shape batch=1,tokens=128")
        sizes[name] = int(size)
    return sizes


def is_sequence(value: Tensor) -> bool:
    """Whether an input is tokens by rows."""
    return value.ndim == 2 and not value.is_floating_point()


def whole_shape(shape: Mapping[str, int], inputs: Mapping[str, Tensor], why: str = "") -> dict[str, int]:
    """The sizes that a file fixes, each of them named; the batch is 1 unless given.

    Args:
        shape: Some of ``batch`` and ``tokens``.
        inputs: A batch of keyword inputs.
        why: Who asks for fixed sizes, for messages.

    Raises:
        InputError: Texts without a length, or a length without texts.
    """
    texts = any(map(is_sequence, inputs.values()))
    if "tokens" in shape and not texts:
        raise InputError("--shape tokens=... is for texts, and these inputs are none; give batch alone")
    batch = shape.get("batch", 1)
    if texts and "tokens" not in shape:
        raise InputError(f"{why or 'a batch alone fixes no length'}; add --shape batch={batch},tokens=128")
    return {"batch": batch, **({"tokens": shape["tokens"]} if texts else {})}


def padding_id(model: nn.Module, tokenizer: Any = None) -> int:
    """The token that fills a sequence up: the tokenizer's, or that of the model's configuration, or 0."""
    found = getattr(tokenizer, "pad_token_id", None)
    if found is None:
        told = (getattr(getattr(each, "config", None), "pad_token_id", None) for each in model.modules())
        found = next((each for each in told if isinstance(each, int)), 0)
    return int(found)


def padded(value: Tensor, tokens: int, fill: int) -> Tensor:
    """``[B, T]`` filled up to ``[B, tokens]``."""
    return F.pad(value, (0, tokens - value.shape[1]), value=fill)


def fitted(inputs: Mapping[str, Tensor], sizes: Mapping[str, int], padding: int) -> list[dict[str, Tensor]]:
    """Inputs of any batch as batches of the fixed sizes; the last repeats its last row.

    Args:
        inputs: Keyword inputs, ``[B, ...]`` each.
        sizes: ``batch``, and ``tokens`` for texts.
        padding: Fills ``input_ids`` up; everything else is filled with 0.

    Raises:
        InputError: A sequence is longer, or shorter and without a mask.
    """
    made = dict(inputs)
    tokens = sizes.get("tokens")
    for name, value in inputs.items():
        if tokens is None or not is_sequence(value) or value.shape[1] == tokens:
            continue
        if value.shape[1] > tokens:
            raise InputError(
                f"{name} has {value.shape[1]} tokens, and the file takes {tokens}: export with "
                f"--shape tokens={value.shape[1]}, or shorten texts with -o task.max_length={tokens}"
            )
        if not any("mask" in each for each in inputs):
            raise InputError(f"{name} has {value.shape[1]} tokens and no mask, so it cannot be filled up to {tokens}")
        made[name] = padded(value, tokens, padding if name == "input_ids" else 0)
    rows, batch = len(next(iter(made.values()))), sizes["batch"]
    places = [torch.arange(start, start + batch).clamp(max=rows - 1) for start in range(0, rows, batch)]
    return [{name: value[place] for name, value in made.items()} for place in places]


def along_tokens(model: Callable[..., Mapping[str, Tensor]], example: Mapping[str, Tensor]) -> list[str]:
    """The outputs ``[B, T, ...]`` that have a value for every token: those that shrink with a token less.

    Args:
        model: Keyword inputs to outputs by name.
        example: Sequences of two tokens or more.
    """
    shorter = {name: value[:, :-1] if is_sequence(value) else value for name, value in example.items()}
    before, after = model(**example), model(**shorter)
    return [name for name, value in before.items() if value.ndim > 1 and value.shape[1] != after[name].shape[1]]


def joined(
    found: Sequence[Mapping[str, Tensor]], rows: int, tokens: int | None, along: Sequence[str]
) -> dict[str, Tensor]:
    """Outputs of `fitted` batches as those of the batch before, filling removed."""
    whole = {name: torch.cat([each[name] for each in found])[:rows] for name in found[0]}
    return {name: value[:, :tokens] if name in along else value for name, value in whole.items()}
