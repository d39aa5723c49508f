"""Questions about images, answered in words by a LLaVA-type model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d.data.annotated_images import read_image_rows
from s2d.data.augmentation import augment
from s2d.data.base import SPLITS, Batch, Split
from s2d.data.tokens import require_tokenizer, tokenizer_key
from s2d.errors import InputError
from s2d.models import Loaded
from s2d.models.running import evaluating
from s2d.tasks.base import device_of, register, to_device
from s2d.tasks.image_base import ImageRows
from s2d.tasks.vqa_metrics import Answer, answers_in, score_answers

_QUESTIONS = ("question", "query", "questions")
_ANSWERS = ("answers", "answer", "label", "multiple_choice_answer")
PROMPT = "USER: <image>\n{question}\nAnswer the question using a single word or phrase. ASSISTANT:"
_MARK = "<image>"
_IGNORED = -100  # label that cross-entropy ignores: no answer here


@register("visual-question-answering")
class VisualQuestionAnswering(ImageRows):
    """Answer questions about images with a LLaVA-type model: exact match, VQA accuracy, yes or no, ANLS.

    The answer is generated greedily after a prompt. Training is cross-entropy on the answer and its end; where a
    question has several answers, the one that most people gave. The metrics, in points, are those of
    `s2d.tasks.vqa_metrics.score_answers`: ``exact_match`` (GQA), ``vqa_accuracy`` (VQAv2), ``anls`` (DocVQA), and
    ``yes_no`` with ``yes_no_f1`` (POPE) where there are such questions.

    Args:
        data: See `s2d.tasks.image_base`; an answer cell holds one text, or a list of them (or of ``{"answer": text}``).
        image: Name of the image column; found by usual names when None.
        question, answer: Names of these columns; likewise.
        prompt: What the model is asked, with ``<image>`` and ``{question}``; LLaVA-1.5's own by default.
        max_answer: Most tokens of an answer.
        augment: Mirror and shift training images. Off, since questions may tell left from right.
    """

    primary = "vqa_accuracy"

    def __init__(
        self,
        data: str | os.PathLike[str],
        image: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        prompt: str = PROMPT,
        max_answer: int = 16,
        augment: bool = False,
    ) -> None:
        if prompt.count(_MARK) != 1 or "{question}" not in prompt:
            raise InputError(f"the prompt needs one {_MARK} and {{question}}; it is {prompt!r}")
        if max_answer < 1:
            raise InputError(f"max_answer must be at least 1, not {max_answer}")
        super().__init__(
            read_image_rows(data, image, {"question": (question, _QUESTIONS), "answer": (answer, _ANSWERS)})
        )
        self.prompt, self.max_answer, self.augment = prompt, max_answer, augment
        self.answers: dict[Split, list[Answer]] = {}
        for split in SPLITS:
            for row in self.rows[split]:
                if not isinstance(row.cells[0], str) or not row.cells[0].strip():
                    raise InputError(f"{row.place}: the question is {str(row.cells[0])[:40]!r}; expected a text")
            self.answers[split] = [answers_in(row.cells[1], row.place) for row in self.rows[split]]
        self._tokenizer: Any = None
        self._made_for = ""
        self._image_tokens: list[int] = []

    def prepare(self, loaded: Loaded) -> None:
        """Decode the images; find out how many tokens one takes."""
        model = loaded.model
        if getattr(getattr(model, "config", None), "image_token_id", None) is None or not hasattr(model, "generate"):
            raise InputError(
                f"{type(model).__name__} does not answer questions about images; load a LLaVA-type model "
                "(LlavaForConditionalGeneration)"
            )
        super().prepare(loaded)
        tokenizer = require_tokenizer(loaded, self.name)
        key = tokenizer_key(tokenizer) + loaded.fingerprint
        if key != self._made_for:
            table = self._tables["train"]
            readable = table.first_readable()
            assert readable is not None  # or the images were refused before
            pixels = self.normalize(table.take(torch.tensor([readable]))[0])
            config: Any = model.config
            self._image_tokens = [int(config.image_token_id)] * image_tokens(model, pixels)
            self._tokenizer, self._made_for = tokenizer, key

    def build(self, loaded: Loaded, seed: int = 0) -> nn.Module:
        """A copy of the model."""
        self.prepare(loaded)
        return copy.deepcopy(loaded.model).train()

    def beside(self, split: Split, rows: Tensor) -> Batch:
        """Prompt and answer ``input_ids``, ``attention_mask``, ``labels``, padded on the left; and ``row``."""
        prompts = [self._prompt(self.rows[split][row].cells[0]) for row in rows.tolist()]
        answers = [self._ids(" " + self.answers[split][row].common)[: self.max_answer] for row in rows.tolist()]
        end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        whole = [prompt + answer + end for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[_IGNORED] * len(p) + a + end for p, a in zip(prompts, answers, strict=True)]
        ids, mask = self._padded(whole)
        return {"row": rows, "input_ids": ids, "attention_mask": mask, "labels": _left(labels, _IGNORED)}

    def inputs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The one call: images, prompts and answers."""
        pixels = self.normalize(batch["pixels"])
        return [{"pixel_values": pixels, "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the answers' tokens. Only these are scored: the vocabulary is large, the prompt long."""
        batch = to_device(batch, device_of(model))
        if self.augment and model.training:
            batch = {**batch, "pixels": augment(batch["pixels"])}
        answers = int((batch["labels"] != _IGNORED).sum(1).max())  # they end the padded rows
        logits = model(**self.inputs(batch)[0], logits_to_keep=answers + 1).logits  # some models give all (BLIP-2)
        scores = logits[:, -answers - 1 : -1]
        wanted = batch["labels"][:, -answers:]
        return F.cross_entropy(scores.flatten(0, 1).float(), wanted.flatten(), ignore_index=_IGNORED)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split = "test", batch_size: int = 64) -> dict[str, float]:
        """See `s2d.tasks.vqa_metrics.score_answers`; on all rows with a readable image."""
        device = device_of(model)
        said: list[str] = []
        right: list[Answer] = []
        with evaluating(model):
            for batch in self.batches(split, batch_size=batch_size):
                rows = batch["row"].tolist()
                said += self.answer(model, batch["pixels"].to(device), [self.rows[split][r].cells[0] for r in rows])
                right += [self.answers[split][row] for row in rows]
        if not said:
            raise InputError(f"none of the images of {split} can be read; {'; '.join(self.notes())}")
        return score_answers(said, right)

    @torch.no_grad()
    def answer(self, model: nn.Module, pixels: Tensor, questions: Sequence[str]) -> list[str]:
        """The model's answers to questions about images `[batch, 3, height, width]` (bytes)."""
        ids, mask = self._padded([self._prompt(question) for question in questions])
        generate: Any = model.generate
        found = generate(
            input_ids=ids.to(pixels.device),
            attention_mask=mask.to(pixels.device),
            pixel_values=self.normalize(pixels),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_answer,
            pad_token_id=self._padding,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        return self._tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)

    @property
    def _padding(self) -> int:
        number = self._tokenizer.pad_token_id
        return number if number is not None else self._tokenizer.eos_token_id or 0

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt(self, question: str) -> list[int]:
        before, _, after = self.prompt.partition(_MARK)
        start = self._tokenizer.bos_token_id
        head = ([] if start is None else [start]) + (self._ids(before) if before else [])
        return head + self._image_tokens + self._ids(after.replace("{question}", question.strip()))

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        return _left(rows, self._padding), _left([[1] * len(row) for row in rows], 0)


@torch.no_grad()
def image_tokens(model: Any, pixels: Tensor) -> int:
    """How many tokens of the decoder one image `[1, 3, height, width]` takes."""
    features = getattr(model, "model", model).get_image_features(pixel_values=pixels.to(device_of(model)))
    features = getattr(features, "pooler_output", features)  # transformers 5 wraps them
    return int(features[0].shape[-2])


def _left(rows: list[list[int]], padding: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[padding] * (width - len(row)) + row for row in rows])
