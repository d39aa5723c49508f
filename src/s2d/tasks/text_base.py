"""Shared code of tasks with one text per example: the texts of each split, tokenized once for each tokenizer."""

from __future__ import annotations

from abc import abstractmethod

from s2d.data.base import SPLITS, Split, check_split
from s2d.data.tokens import TokenTable, check_max_length, require_tokenizer, tokenize, tokenizer_key
from s2d.models import Loaded
from s2d.tasks.base import Task


class TokenizedTexts(Task):
    """A task on texts, each cut to `max_length` tokens; subclasses define the model's output."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._tables: dict[Split, TokenTable] = {}
        self._tokenized_by = ""

    @property
    def tokens(self) -> int:
        """Tokens of the longest text."""
        return self.max_length

    @abstractmethod
    def texts(self, split: Split) -> list[str]:
        """The texts of a split."""

    def sizes(self) -> dict[str, int]:
        """Number of texts of each split."""
        return {split: len(self.texts(split)) for split in SPLITS}

    def prepare(self, loaded: Loaded) -> None:
        """Tokenize all texts with the model's tokenizer."""
        tokenizer = require_tokenizer(loaded, self.name)
        if self._tokenized_by == (key := tokenizer_key(tokenizer)):
            return
        length = check_max_length(loaded, self.max_length, "max_length")
        self._tables = {split: tokenize(tokenizer, self.texts(split), length) for split in SPLITS}
        self._tokenized_by = key

    def _table(self, split: Split) -> TokenTable:
        if check_split(split) not in self._tables:
            raise RuntimeError("the data is not tokenized yet: call build(loaded) or prepare(loaded) first")
        return self._tables[split]
