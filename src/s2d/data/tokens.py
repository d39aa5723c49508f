"""Texts as integer tensors: tokenized once, cut into batches by indexing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2d.errors import InputError
from s2d.models import Loaded


@dataclass(frozen=True)
class TokenTable:
    """Many tokenized texts.

    Attributes:
        ids: `[texts, longest]` token ids, padded on the right.
        lengths: `[texts]` number of real tokens of each text.
    """

    ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and attention mask `[rows, longest]` of some texts, by index `[rows]`."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return self.ids[rows, :width], (torch.arange(width) < lengths.unsqueeze(1)).long()


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> TokenTable:
    """All texts through a transformers tokenizer, each cut to `max_length` tokens.

    Raises:
        InputError: A text gives no token at all.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), 1024):
        chunk = list(texts[start : start + 1024])
        rows += tokenizer(chunk, truncation=True, max_length=max_length, padding=False)["input_ids"]
    empty = next((index for index, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise InputError(f"the tokenizer makes no token of text number {empty + 1}: {texts[empty][:60]!r}")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), padding)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return TokenTable(ids, lengths)


def require_tokenizer(loaded: Loaded, task: str) -> Any:
    """The loaded model's tokenizer, or InputError."""
    if loaded.tokenizer is None or not callable(loaded.tokenizer):
        raise InputError(f"task {task} reads text, but {loaded.source} comes without a tokenizer; load a text model")
    known, rows = getattr(loaded.tokenizer, "vocab_size", None), _vocabulary(loaded.model)
    if isinstance(known, int) and rows is not None and known > rows:
        raise InputError(
            f"the tokenizer of {loaded.source} has {known} tokens and the model {rows}: they do not belong together; "
            "put the model's own tokenizer files beside its weights"
        )
    return loaded.tokenizer


def _vocabulary(model: Any) -> int | None:
    """Rows of the token embedding, None where they are not known."""
    model = getattr(model, "encoder", model)
    model = getattr(model, "text_model", model)
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def most_tokens(loaded: Loaded) -> int | None:
    """The longest text, in tokens, that the model's positions and its tokenizer allow; None without a limit."""
    config = getattr(getattr(loaded.model, "encoder", loaded.model), "config", None)
    config = getattr(config, "text_config", config)  # of CLIP, SigLIP and LLaVA
    limits = (getattr(config, "max_position_embeddings", None), getattr(loaded.tokenizer, "model_max_length", None))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def check_max_length(loaded: Loaded, max_length: int, name: str) -> int:
    """The length, if the model has enough positions; else InputError."""
    if max_length < 1:
        raise InputError(f"{name} must be at least 1, not {max_length}")
    most = most_tokens(loaded)
    if most is not None and max_length > most:
        raise InputError(
            f"{name} is {max_length}, but {loaded.source} has only {most} positions; choose at most {most}"
        )
    return max_length


def tokenizer_key(tokenizer: Any) -> str:
    """A key that identifies a tokenizer: a digest of its definition where there is one, else the object itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"{type(tokenizer).__name__}-{id(tokenizer)}"
    return digest([backend.to_str()])


def row_batches(rows: int, batch_size: int, *, seed: int, shuffle: bool) -> Iterator[Tensor]:
    """Indices `[batch]` of one pass over `rows` examples."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator) if shuffle else torch.arange(rows)
    yield from order.split(batch_size)


def by_length(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Indices `[batch]` of one pass in order of length, so that little of a batch is padding."""
    yield from lengths.argsort(stable=True).split(batch_size)


def digest(parts: Iterable[str]) -> str:
    """Short SHA-256 of a sequence of texts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode("utf-8", "surrogatepass"))
        sha.update(b"\0")
    return sha.hexdigest()[:16]
