"""Language modelling on plain text: perplexity by the strided protocol."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.data.base import SPLITS, Batch, Split, check_batch_size, check_split
from s2d.data.split_files import read_utf8, split_files
from s2d.data.tokens import check_max_length, digest, require_tokenizer, row_batches, tokenizer_key
from s2d.data.windows import IGNORED, cut_windows, with_first
from s2d.errors import InputError, choices
from s2d.models import Loaded
from s2d.models.running import evaluating
from s2d.tasks.base import Outcomes, Task, device_of, register, to_device
from s2d.tasks.teacher import find_original, head_of, mean_divergence

_SUFFIXES = (".txt",)
LOSSES = ("text", "original")


@register("language-modeling")
class LanguageModeling(Task):
    """Predict the next token of plain text, from .txt files.

    Protocol: a split's text is tokenized as one sequence, without special tokens, and read through windows of `window`
    tokens that start every `stride` tokens. Each token is scored once, in the first window that holds it; only tokens
    with no token before them in their window are not scored. With ``stride == window`` the windows do not overlap (what
    most quantization papers report); a smaller stride gives each token at least ``window - stride`` tokens of context.
    No token marks the beginning of a window unless `bos` puts the tokenizer's own there, where it is never scored.
    Metrics: ``perplexity`` (lower is better; infinite when the model's output is not finite) and its logarithm ``nll``.

    A folder has one file per split, named ``train``, ``test`` and ``validation`` (or ``valid``, ``val``, ``dev``).
    Where train is missing it is the first 90 % of validation's lines; where test or validation is missing it is the
    last 20 % or 10 % of train's.

    Args:
        data: The folder or file.
        window: Tokens the model sees at once.
        stride: Tokens between the starts of windows, at most `window`, which is the default. Train never overlaps.
        windows: Read at most so many windows of each split; None for all.
        bos: Begin each window with the tokenizer's beginning-of-sequence token; `window` counts it.
        loss: What training minimizes: ``text``, the mean negative log-likelihood of the text, or ``original``, without
            anything to learn from the text: KL(original || model) of the next token, averaged over all tokens.
        original: The teacher with ``loss=original``. None: the model from which the task's first model was made, as
            noted in a conditioned folder of s2d; else that first model itself.
    """

    primary = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        data: str | os.PathLike[str],
        window: int = 512,
        stride: int | None = None,
        windows: int | None = None,
        bos: bool = False,
        loss: str = "text",
        original: str | None = None,
    ) -> None:
        if window < 2:
            raise InputError(f"the window must hold at least 2 tokens, not {window}")
        if stride is not None and not 1 <= stride <= window:
            raise InputError(f"the stride must be from 1 to the window's {window} tokens, not {stride}")
        if windows is not None and windows < 1:
            raise InputError(f"the number of windows must be positive, not {windows}")
        if loss not in LOSSES:
            raise InputError(f"unknown loss {loss!r}; {choices(loss, LOSSES)}")
        if bos and window < 3:
            raise InputError(f"the window must hold at least 3 tokens with bos, not {window}")
        self.window, self.stride, self.windows = window, stride or window, windows
        self.bos, self._loss, self.original = bos, loss, original or ""
        self.distils = loss == "original"
        self._teacher: nn.Module | None = None
        self._texts = _texts(Path(data))
        self._windows: dict[Split, tuple[Tensor, Tensor, Tensor]] = {}
        self._tokenized_by = ""

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return self.window

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of the texts of all splits."""
        return digest(self._texts[split] for split in SPLITS)

    def sizes(self) -> dict[str, int]:
        """Number of windows of each split."""
        return {split: len(self._table(split)[0]) for split in SPLITS}

    def prepare(self, loaded: Loaded) -> None:
        """Tokenize all texts with the model's tokenizer and cut the windows."""
        tokenizer = require_tokenizer(loaded, self.name)
        if self._tokenized_by == (key := tokenizer_key(tokenizer)):
            return
        window = check_max_length(loaded, self.window, "window")
        for split, text in self._texts.items():
            tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if len(tokens) < 2:
                raise InputError(f"the {split} text makes {len(tokens)} tokens; at least 2 are needed")
            read = window - self.bos
            stride = read if split == "train" else min(self.stride, read)
            self._windows[split] = cut_windows(tokens, read, stride, self.windows)
            if self.bos:
                self._windows[split] = with_first(self._windows[split], _bos(loaded, tokenizer))
        self._tokenized_by = key

    def build(self, loaded: Loaded, seed: int = 0) -> nn.Module:
        """A copy of the causal language model as it is; nothing is random, so `seed` plays no part.

        Raises:
            InputError: The model predicts no tokens, or the original does not fit it.
        """
        if head_of(loaded.model) is None:
            raise InputError(f"task {self.name} needs a causal language model; {loaded.source} predicts no tokens")
        self.prepare(loaded)
        if self._loss == "original":
            self._check_original(loaded)
        model = copy.deepcopy(loaded.model)
        model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
        return model.train()

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """Batches of ``input_ids``, ``attention_mask``, ``labels`` `[batch, window]`; -100 where nothing is scored."""
        ids, mask, labels = self._table(split)
        for rows in row_batches(len(ids), check_batch_size(batch_size), seed=seed, shuffle=shuffle):
            width = int(mask[rows].sum(1).max())
            yield {
                "input_ids": ids[rows, :width],
                "attention_mask": mask[rows, :width],
                "labels": labels[rows, :width],
            }

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call of the model."""
        return [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the scored tokens, or the mean divergence from the original."""
        if self._teacher is not None:
            batch = to_device(batch, device_of(model))
            return mean_divergence(model, self._teacher, self.inputs(batch)[0])
        total, count = self._negative_log_likelihood(model, batch)
        return total / max(count, 1)

    def _check_original(self, loaded: Loaded) -> None:
        """Find the teacher, unless it is known, and check that its vocabulary is the model's."""
        if self._teacher is None:
            found = find_original(
                loaded, self.original, lambda each: require_tokenizer(each, self.name).get_vocab(), "tokenizers"
            )
            self._teacher = found.model.eval()
        theirs, own = _vocabulary(self._teacher), _vocabulary(loaded.model)
        if theirs != own:
            raise InputError(
                f"{self.original or 'the original'} cannot teach {loaded.source}: it gives {theirs} scores per token, "
                f"not {own}; name the model that it was made from: -o task.original=MODEL"
            )

    @torch.no_grad()
    def outcomes(self, model: nn.Module, batch: Batch) -> Outcomes:
        """The summed negative log-likelihood of each window, and its number of scored tokens."""
        labels = batch["labels"][:, 1:]
        with evaluating(model):
            logits = model(**self.inputs(to_device(batch, device_of(model)))[0]).logits[:, :-1].float().cpu()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return Outcomes(losses.double().sum(1), (labels != IGNORED).double().sum(1), exponential=True)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 4) -> dict[str, float]:
        """``perplexity`` and ``nll`` over every scored token of the split."""
        total, count = 0.0, 0
        with evaluating(model):
            for batch in self.batches(split, batch_size=batch_size):
                part, tokens = self._negative_log_likelihood(model, batch)
                total, count = total + part.item(), count + tokens
        nll = total / count if math.isfinite(total) else math.inf
        return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll}

    def _negative_log_likelihood(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Sum over the scored tokens, and their number."""
        batch = to_device(batch, device_of(model))
        logits = model(**self.inputs(batch)[0]).logits[:, :-1]  # position t predicts token t + 1
        labels = batch["labels"][:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, int((labels != IGNORED).sum())

    def _table(self, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        if check_split(split) not in self._windows:
            raise RuntimeError("the data is not tokenized yet: call build(loaded) or prepare(loaded) first")
        return self._windows[split]


def _vocabulary(model: nn.Module) -> int:
    """The scores of a model for each token."""
    head = head_of(model)
    return 0 if head is None else len(head.get_parameter("weight"))


def _bos(loaded: Loaded, tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise InputError(f"the tokenizer of {loaded.source} has no token for a beginning; leave out bos")
    return tokenizer.bos_token_id


def _texts(data: Path) -> dict[Split, str]:
    files = split_files(data, _SUFFIXES)
    lines = {split: _read_lines(file) for split, file in files.items()}
    if "train" not in lines:
        if "validation" not in lines:
            raise InputError(f"{data} has neither a train nor a validation text; add train.txt")
        whole = lines["validation"]
        files["train"] = files["validation"]
        cut = _cut(whole, 0.1, files["train"])
        lines["train"], lines["validation"] = whole[:cut], whole[cut:]
    carved: tuple[tuple[Split, float], ...] = (("test", 0.2), ("validation", 0.1))
    for split, share in carved:
        if split not in lines:
            cut = _cut(lines["train"], share, files["train"])
            lines["train"], lines[split] = lines["train"][:cut], lines["train"][cut:]
    return {split: "".join(lines[split]) for split in SPLITS}


def _cut(lines: list[str], share: float, file: Path) -> int:
    cut = len(lines) - max(1, round(share * len(lines)))
    if cut < 1:
        raise InputError(f"{file} has too few lines to be divided into splits; give a file for each split")
    return cut


def _read_lines(file: Path) -> list[str]:
    text = read_utf8(file)
    if not text.strip():
        raise InputError(f"{file} is empty; give a file with text")
    return text.splitlines(keepends=True)
