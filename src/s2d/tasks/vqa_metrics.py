"""Metrics of answers in words: exact match, VQA accuracy, ANLS, yes or no."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2d.errors import InputError

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = {"a", "an", "the"}
_ANLS_LEAST = 0.5  # Biten et al. 2019: a smaller similarity counts as 0


@dataclass(frozen=True)
class Answer:
    """The answers of people to one question.

    Attributes:
        texts: The answers as in the data.
    """

    texts: tuple[str, ...]

    @property
    def common(self) -> str:
        """The most frequent answer; the earlier one of a tie."""
        return Counter(self.texts).most_common(1)[0][0]


def answers_in(cell: Any, place: str) -> Answer:
    """The answers in a table's cell: a text, or a list of texts or of ``{"answer": text}``.

    Raises:
        InputError: Something else.
    """
    found = cell if isinstance(cell, list) else [cell]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in found]
    kept = tuple(text for text in texts if isinstance(text, str) and text.strip())
    if not texts or len(kept) < len(texts):
        raise InputError(f"{place}: expected an answer or a list of answers, not {str(cell)[:60]!r}")
    return Answer(kept)


def normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, numbers to ten as digits.

    The VQA evaluation (Antol et al. 2015) also repairs contractions without apostrophe, which is left out here.
    """
    text = re.sub(r"(?<!\d)[.,]|[.,](?!\d)", " ", text.lower())
    text = re.sub(r"[^\w\s.,:'/%$-]", " ", text)
    return " ".join(_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)


def score_answers(said: Sequence[str], right: Sequence[Answer]) -> dict[str, float]:
    """Points from 0 to 100.

    Args:
        said: One text per question.
        right: The answers of people.

    Returns:
        ``vqa_accuracy``: an answer counts in full when three others gave it, averaged over leaving each person out
            (VQAv2); with fewer than three answers, when any of them gave it.
        ``exact_match``: it is the most common answer.
        ``anls``: average normalized Levenshtein similarity to the nearest answer (DocVQA).
        ``yes_no``, ``yes_no_f1``: accuracy, and F1 of yes, on questions whose most common answer is yes or no (POPE);
            only where there are some. An answer that begins with neither is wrong.
    """
    vqa = exact = anls = 0.0
    verdicts: list[tuple[str, str]] = []
    for text, answer in zip(said, right, strict=True):
        mine, others = normalized(text), [normalized(other) for other in answer.texts]
        common = normalized(answer.common)
        if len(others) < 3:
            vqa += mine in others
        else:
            given = others.count(mine)
            counts = [given - (other == mine) for other in others]
            vqa += sum(min(1.0, count / 3) for count in counts) / len(counts)
        exact += mine == common
        anls += max(similarity(text.strip().lower(), other.strip().lower()) for other in answer.texts)
        if common in ("yes", "no"):
            verdicts.append((mine.split(" ")[0], common))
    total = len(said)
    scores = {"vqa_accuracy": 100 * vqa / total, "exact_match": 100 * exact / total, "anls": 100 * anls / total}
    if verdicts:
        hits = sum(verdict == ("yes", "yes") for verdict in verdicts)
        marked = sum(mine == "yes" for mine, _ in verdicts) + sum(common == "yes" for _, common in verdicts)
        scores["yes_no"] = 100 * sum(mine == common for mine, common in verdicts) / len(verdicts)
        scores["yes_no_f1"] = 200 * hits / marked if marked else 0.0
    return scores


def similarity(one: str, other: str) -> float:
    """1 minus the Levenshtein distance over the longer length; 0 where less than half is alike."""
    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        above, row[0] = row[0], number
        for column, another in enumerate(other, 1):
            above, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, above + (letter != another))
    alike = 1 - row[-1] / longest
    return alike if alike >= _ANLS_LEAST else 0.0
