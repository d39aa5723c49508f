"""Conditioning without labels: texts, and the published model as the teacher.

The distance from the original, and its sources: `s2d.tasks.teacher`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.data.base import SPLITS, Batch, Split, check_batch_size
from s2d.data.splits import split_by_content
from s2d.data.texts import read_texts
from s2d.data.tokens import digest, require_tokenizer, row_batches
from s2d.distributed.processes import inside
from s2d.errors import InputError
from s2d.models import Loaded, SentenceEncoder
from s2d.models.dual_encoder import DualEncoder, has_two_towers
from s2d.models.heads import encoder_of
from s2d.models.running import evaluating
from s2d.tasks.base import device_of, register, to_device
from s2d.tasks.teacher import FeatureLoss, Teacher, divergence, head_of, hidden_states, known_head, mean_divergence
from s2d.tasks.text_base import TokenizedTexts


@register("unlabelled-text")
class UnlabelledText(TokenizedTexts):
    """Stay the model that was published, on texts without labels: embeddings of an encoder, or next-token scores.

    The loss of an encoder is that of `s2d.tasks.teacher.FeatureLoss`: its embeddings and its last layer's tokens. The
    loss of a causal language model is KL(original || model) per token, in nats.

    Metrics of an encoder: ``cosine``, the mean over texts of the cosine between its embedding and the original's, times
    100, and ``drift``, 100 minus that. Of a language model: ``drift``, the mean KL per token in nats, and
    ``agreement``, the percentage of tokens after which both expect the same next one.

    Texts are the lines of .txt files and the rows of .jsonl and .parquet files; duplicates and blanks are left out. A
    text's split depends on nothing but the text: about 5 % are validation and 5 % test.

    Args:
        data: A file, or a folder with such files.
        original: The teacher, as `s2d.load` takes it. None: the model from which the task's first model was made, as
            noted in a conditioned or quantized folder of s2d; else that first model itself.
        column: The text column of tables; None for the column named text, or the only column.
        max_length: Texts are cut to so many tokens.
        embedding: Weight of an embedding's distance.
        features: Weight of the distance of the last layer's tokens.
        train: Most texts in the train split.
        heldout: Most texts in the validation and in the test split.
    """

    primary = "drift"
    higher_is_better = False
    opposed = ("cosine", "agreement")
    distils = True

    def __init__(
        self,
        data: str | os.PathLike[str],
        original: str | None = None,
        column: str | None = None,
        max_length: int = 96,
        embedding: float = 10.0,
        features: float = 1.0,
        train: int = 100_000,
        heldout: int = 500,
    ) -> None:
        if max_length < 2:
            raise InputError(f"max_length must be at least 2 tokens, not {max_length}")
        self._distance = FeatureLoss(embedding, features)
        super().__init__(max_length)
        self.original = original or ""
        self.embedding, self.features = embedding, features
        texts = ((text, text.encode("utf-8", "surrogatepass")) for text in read_texts(Path(data), column))
        self._texts = split_by_content(texts, train, heldout, what="text", shown=os.fspath(data))
        self._teacher = Teacher(
            self.original,
            _model_of,
            _kind,
            lambda loaded: require_tokenizer(loaded, self.name).get_vocab(),
            "tokenizers",
        )

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of the texts of all splits."""
        return digest(text for split in SPLITS for text in self._texts[split])

    def notes(self) -> list[str]:
        """Which model is the original, where it was not named."""
        return self._teacher.notes

    def texts(self, split: Split) -> list[str]:
        """The texts of a split."""
        return self._texts[split]

    def build(self, loaded: Loaded, seed: int = 0) -> nn.Module:
        """A copy of the causal language model, or a sentence encoder on a copy of the encoder; nothing is random.

        Raises:
            InputError: No original is named and this model is none; or the original is of another kind or width.
        """
        if isinstance(loaded.model, DualEncoder) or has_two_towers(loaded.model):
            raise InputError(
                f"{loaded.source} is a model of images and texts, which is conditioned on images: "
                "--task unlabelled-images"
            )
        self.prepare(loaded)
        model = self._teacher.pupil(loaded)
        if head_of(model) is not None:
            model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
        return model.train()

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """Batches of ``input_ids`` and ``attention_mask`` `[batch, tokens]`."""
        table = self._table(split)
        for rows in row_batches(len(table), check_batch_size(batch_size), seed=seed, shuffle=shuffle):
            ids, mask = table.take(rows)
            yield {"input_ids": ids, "attention_mask": mask}

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call of the model."""
        return [dict(batch)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The distance from the original; see the class."""
        batch = to_device(batch, device_of(model))
        teacher = self._teacher.model
        mask = batch["attention_mask"].bool()
        if head_of(model) is not None:
            return mean_divergence(model, teacher, batch)
        embedding, features = _embed(model, batch)
        with torch.no_grad():
            wanted_embedding, wanted_features = _embed(teacher, batch)
        return self._distance((embedding, features[mask]), (wanted_embedding, wanted_features[mask]))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """``drift``, and ``cosine`` of an encoder or ``agreement`` of a language model; see the class."""
        teacher = self._teacher.model
        head = head_of(model)
        first, second, count = 0.0, 0.0, 0
        with evaluating(model):
            for batch in self.batches(split, batch_size=batch_size):
                batch = to_device(batch, device_of(model))
                mask = batch["attention_mask"].bool()
                if head is None:
                    found, wanted = _embed(model, batch)[0], _embed(teacher, batch)[0]
                    parts = F.cosine_similarity(found.double(), wanted.double(), dim=-1), torch.zeros(1)
                else:
                    known = known_head(teacher)
                    parts = divergence(
                        hidden_states(model, head, batch)[mask], hidden_states(teacher, known, batch)[mask], head, known
                    )
                first, second = first + parts[0].sum().item(), second + parts[1].sum().item()
                count += len(parts[0])
        if not math.isfinite(first):  # a broken model agrees with nothing
            return {"drift": math.inf, "cosine" if head is None else "agreement": 0.0}
        if head is None:
            return {"drift": 100 * (1 - first / count), "cosine": 100 * first / count}
        return {"drift": first / count, "agreement": 100 * second / count}


@contextmanager
def _noting_features(encoder: nn.Module, notes: list[Tensor]) -> Iterator[None]:
    hook = encoder.register_forward_hook(lambda _, __, output: notes.append(output.last_hidden_state))
    try:
        yield
    finally:
        hook.remove()


def _embed(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Embeddings `[batch, width]` and the last layer's tokens `[batch, tokens, width]`."""
    notes: list[Tensor] = []
    with _noting_features(_core(model), notes):
        return model(**batch), notes[-1]


def _model_of(loaded: Loaded) -> nn.Module:
    """The compared part: the causal language model as it is, or the encoder with mean pooling."""
    if head_of(loaded.model) is not None:
        return loaded.model
    return SentenceEncoder(encoder_of(loaded.model))


def _core(model: nn.Module) -> nn.Module:
    own = inside(model)
    return own.encoder if isinstance(own, SentenceEncoder) else own


def _kind(model: nn.Module) -> tuple[object, ...]:
    core = _core(model)
    config = getattr(core, "config", None)
    return type(core), getattr(config, "hidden_size", None), getattr(config, "vocab_size", None)
