"""Retrieval on data that every machine already holds: the docstrings of its installed packages.

The query is a docstring's summary line, the document is the rest of it; the right document is to be found among all
documents of the split. Trained with the symmetric in-batch contrastive loss usual for sentence encoders (InfoNCE, arXiv
1807.03748; cosine similarities times a scale, as in Sentence-BERT's multiple-negatives ranking loss).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.data.base import SPLITS, Batch, Split, check_batch_size, check_split
from s2d.data.docstring_corpus import Pair, collect
from s2d.data.tokens import (
    TokenTable,
    by_length,
    check_max_length,
    digest,
    require_tokenizer,
    row_batches,
    tokenize,
    tokenizer_key,
)
from s2d.errors import InputError
from s2d.models import Loaded, SentenceEncoder
from s2d.models.heads import encoder_of
from s2d.models.running import evaluating
from s2d.tasks.base import Task, device_of, from_all_ranks, register, to_device


@register("docstrings")
class Docstrings(Task):
    """Find the documentation that belongs to a summary line, over the docstrings of installed packages.

    Metrics, in points: ``mrr@10`` (mean reciprocal rank, 0 below rank 10) and ``recall@1``. A tie counts against the
    model, so an encoder that maps everything to one point scores 0.

    Args:
        train: Most pairs in the train split.
        validation: Most pairs in the validation split.
        test: Most pairs in the test split. What is in test depends neither on `train` nor on `validation`.
        query_length: Queries are cut to so many tokens.
        document_length: Documents are cut to so many tokens.
        scale: Factor on cosine similarities in the loss.
        packages: Import names of packages to read, ``"stdlib"`` for the standard library; None for the documented
            default (`s2d.data.docstring_corpus.DEFAULT_PACKAGES`), which keeps results comparable.
    """

    primary = "mrr@10"

    def __init__(
        self,
        train: int = 6000,
        validation: int = 500,
        test: int = 1000,
        query_length: int = 32,
        document_length: int = 96,
        scale: float = 20.0,
        packages: Sequence[str] | None = None,
    ) -> None:
        for name, size in (("train", train), ("validation", validation), ("test", test)):
            if size < 2:
                raise InputError(f"task docstrings needs at least 2 {name} pairs, not {size}")
        if scale <= 0:
            raise InputError(f"the similarity scale must be positive, not {scale}")
        if isinstance(packages, str):
            packages = packages.split(",")
        self.query_length, self.document_length, self.scale = query_length, document_length, scale
        self._pairs = _collected((train, validation, test), None if packages is None else tuple(packages))
        self._tables: dict[Split, tuple[TokenTable, TokenTable]] = {}
        self._tokenized_by = ""

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of all queries and documents of all splits."""
        return digest(text for split in SPLITS for pair in self._pairs[split] for text in (pair.query, pair.document))

    def sizes(self) -> dict[str, int]:
        """Number of pairs of each split."""
        return {split: len(pairs) for split, pairs in self._pairs.items()}

    def pairs(self, split: Split) -> list[Pair]:
        """The texts themselves."""
        return list(self._pairs[check_split(split)])

    def prepare(self, loaded: Loaded) -> None:
        """Tokenize queries and documents with the model's tokenizer."""
        tokenizer = require_tokenizer(loaded, self.name)
        if self._tokenized_by == (key := tokenizer_key(tokenizer)):
            return
        lengths = (
            check_max_length(loaded, self.query_length, "query_length"),
            check_max_length(loaded, self.document_length, "document_length"),
        )
        for split, pairs in self._pairs.items():
            self._tables[split] = (
                tokenize(tokenizer, [pair.query for pair in pairs], lengths[0]),
                tokenize(tokenizer, [pair.document for pair in pairs], lengths[1]),
            )
        self._tokenized_by = key

    def build(self, loaded: Loaded, seed: int = 0) -> SentenceEncoder:
        """Mean pooling and L2 normalisation on a copy of the encoder; nothing is random, so `seed` plays no part."""
        self.prepare(loaded)
        return SentenceEncoder(copy.deepcopy(encoder_of(loaded.model))).train()

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """Batches of ``query_input_ids``, ``query_attention_mask`` `[batch, tokens]` and the same of ``document_``."""
        queries, documents = self._table(split)
        for rows in row_batches(len(queries), check_batch_size(batch_size), seed=seed, shuffle=shuffle):
            query_ids, query_mask = queries.take(rows)
            document_ids, document_mask = documents.take(rows)
            yield {
                "query_input_ids": query_ids,
                "query_attention_mask": query_mask,
                "document_input_ids": document_ids,
                "document_attention_mask": document_mask,
            }

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The two calls of the encoder: queries, documents."""
        return [
            {"input_ids": batch[f"{side}_input_ids"], "attention_mask": batch[f"{side}_attention_mask"]}
            for side in ("query", "document")
        ]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Symmetric InfoNCE: each query against the batch's documents, and each document against its queries."""
        own_rows = (model(**inputs) for inputs in self.inputs(to_device(batch, device_of(model))))
        query, document = (from_all_ranks(rows) for rows in own_rows)
        scores = self.scale * query @ document.T  # [batch, batch]
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """``mrr@10`` and ``recall@1`` of every query of the split against every document of it."""
        tables = self._table(split)
        with evaluating(model):
            query, document = (_embed(model, table, check_batch_size(batch_size)) for table in tables)
        rank = ranks(query @ document.T).double()
        return {
            "mrr@10": 100 * torch.where(rank <= 10, 1 / rank, 0.0).mean().item(),
            "recall@1": 100 * (rank == 1).double().mean().item(),
        }

    def _table(self, split: Split) -> tuple[TokenTable, TokenTable]:
        if check_split(split) not in self._tables:
            raise RuntimeError("the data is not tokenized yet: call build(loaded) or prepare(loaded) first")
        return self._tables[split]


def ranks(scores: Tensor) -> Tensor:
    """The rank, from 1, of each row's own column in `[n, n]` scores; ties and NaN count against it.

    Returns:
        `[n]` integers.
    """
    own = scores.diagonal().unsqueeze(1)
    return (~(scores < own)).sum(1)  # a row's own column is never below itself, so it counts once


def _embed(model: nn.Module, table: TokenTable, batch_size: int) -> Tensor:
    """`[texts, width]` embeddings in fp32 on the CPU, in the table's order."""
    device = device_of(model)
    rows_of: list[Tensor] = []
    parts: list[Tensor] = []
    for rows in by_length(table.lengths, batch_size):
        ids, mask = table.take(rows)
        parts.append(model(input_ids=ids.to(device), attention_mask=mask.to(device)).float().cpu())
        rows_of.append(rows)
    embeddings = torch.empty(len(table), parts[0].shape[1])
    embeddings[torch.cat(rows_of)] = torch.cat(parts)
    return embeddings


@lru_cache(maxsize=2)
def _collected(sizes: tuple[int, int, int], packages: tuple[str, ...] | None) -> dict[Split, list[Pair]]:
    return collect(dict(zip(SPLITS, sizes, strict=True)), packages)
