"""Every token is scored once with the context promised; perplexity is right on a model that can be computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2d.data.windows import cut_windows
from s2d.errors import InputError
from s2d.models import Loaded, save_model
from s2d.tasks import create


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(10, 4, 4), (11, 4, 2), (9, 4, 1), (4, 4, 4), (3, 8, 8), (13, 4, 3)]
)
def test_each_token_is_scored_once_and_with_context(tokens: int, window: int, stride: int) -> None:
    text = torch.arange(100, 100 + tokens)
    ids, mask, labels = cut_windows(text, window, stride, None)
    scored = labels[labels != -100].tolist()
    assert len(set(scored)) == len(scored), "none twice"
    assert (labels[:, 0] == -100).all(), "a window's first token has no context"
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert (mask.sum(1) >= 2).all() and not labels[mask == 0].ne(-100).any()
    if stride < window:
        assert scored == text[1:].tolist()
        for row in range(1, len(ids)):
            context = (labels[row] != -100).nonzero()[0].item()
            assert context >= window - stride or row == len(ids) - 1
    else:
        starts = set(text[::window].tolist())
        assert set(scored) == set(text.tolist()) - starts


def test_number_of_windows_is_bounded() -> None:
    assert len(cut_windows(torch.arange(1000), 10, 10, 3)[0]) == 3
    assert len(cut_windows(torch.arange(1000), 10, 10, None)[0]) == 100
    assert len(cut_windows(torch.arange(1001), 10, 10, None)[0]) == 100, "one left-over token cannot be scored"


class Bigram(nn.Module):
    """Says that the next token is the same as this one with probability 3/4, else any of 60 equally."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        same = torch.nn.functional.one_hot(input_ids, 64).float()
        return SimpleNamespace(logits=torch.log(same * 0.75 + 0.25 / 64) + self.anchor)


@pytest.mark.parametrize("stride", [8, 3])
def test_perplexity_by_hand(stride: int, tmp_path: Path, decoder: Loaded) -> None:
    (tmp_path / "train.txt").write_text("w1 w2 w3\n" * 9)
    (tmp_path / "valid.txt").write_text("w1 w2 w3\n" * 9)
    words = ["w1"] * 5 + ["w2"] * 5 + ["w3"] * 4
    (tmp_path / "test.txt").write_text(" ".join(words))
    task = create("language-modeling", data=tmp_path, window=8, stride=stride)
    task.prepare(decoder)
    scored = [i for i in range(1, 14) if stride < 8 or i % 8]
    losses = [-math.log((words[i] == words[i - 1]) * 0.75 + 0.25 / 64) for i in scored]
    metrics = task.evaluate(Bigram(), "test", batch_size=2)
    assert metrics["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_missing_splits_are_taken_from_the_others(tmp_path: Path) -> None:
    def texts(**files: int) -> dict[str, int]:
        folder = tmp_path / "-".join(files)
        folder.mkdir()
        for name, lines in files.items():
            (folder / f"{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(lines)))
        made = create("language-modeling", data=folder)
        return {split: len(text.splitlines()) for split, text in made._texts.items()}  # type: ignore[attr-defined]

    assert texts(train=100) == {"train": 72, "validation": 8, "test": 20}
    assert texts(valid=100, test=10) == {"train": 90, "validation": 10, "test": 10}
    assert texts(validation=100) == {"train": 72, "validation": 10, "test": 18}
    assert texts(train=50, test=10) == {"train": 45, "validation": 5, "test": 10}
    assert texts(train=50, dev=7, test=10) == {"train": 50, "validation": 7, "test": 10}
    with pytest.raises(InputError, match="neither a train nor a validation text"):
        texts(test=10)


def test_bad_input(tmp_path: Path, encoder: Loaded, decoder: Loaded) -> None:
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w3 w4 w5\n" * 50)
    with pytest.raises(InputError, match="task language-modeling needs a causal language model; tiny-bert predicts no"):
        create("language-modeling", data=path).build(encoder)
    with pytest.raises(InputError, match="window is 33, but tiny-llama has only 32 positions; choose at most 32"):
        create("language-modeling", data=path, window=33).build(decoder)
    for options, expected in (
        ({"window": 1}, "at least 2 tokens, not 1"),
        ({"window": 8, "stride": 9}, "stride must be from 1 to the window's 8 tokens, not 9"),
        ({"windows": 0}, "number of windows must be positive"),
    ):
        with pytest.raises(InputError, match=expected):
            create("language-modeling", data=path, **options)
    for content, expected in ((b"", "is empty"), (b"\xff", "is not UTF-8"), (b"one line", "too few lines")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=expected):
            create("language-modeling", data=path)
    with pytest.raises(InputError, match="there is no folder or file"):
        create("language-modeling", data=tmp_path / "nowhere")


@pytest.fixture()
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"w{i % 7} w{i % 5} w{i * i % 11}\n" for i in range(200)))
    return path


def test_a_beginning_is_seen_and_not_scored(text: Path, decoder: Loaded) -> None:
    plain, begun = (create("language-modeling", data=text, window=8 + bos, bos=bos) for bos in (False, True))
    decoder.tokenizer.bos_token = "[CLS]"  # pyright: ignore[reportOptionalMemberAccess]
    for task in (plain, begun):
        task.prepare(decoder)
    for a, b in zip(plain.batches("test", batch_size=3), begun.batches("test", batch_size=3), strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"][:, 1:]) and torch.equal(a["labels"], b["labels"][:, 1:])
        first = decoder.tokenizer.bos_token_id  # pyright: ignore[reportOptionalMemberAccess]
        assert (b["input_ids"][:, 0] == first).all() and (b["labels"][:, 0] == -100).all()
        assert (b["attention_mask"][:, 0] == 1).all()
    decoder.tokenizer.bos_token = None  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(InputError, match="tiny-llama has no token for a beginning; leave out bos"):
        create("language-modeling", data=text, window=8, bos=True).prepare(decoder)


def test_the_original_teaches(text: Path, decoder: Loaded) -> None:
    """The loss is the divergence of whole distributions, 0 at the start, and the text's own tokens play no part."""
    task = create("language-modeling", data=text, window=8, loss="original")
    model = task.build(decoder)
    batch = next(task.batches("train", batch_size=4))
    assert task.loss(model, batch).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    inputs = task.inputs(batch)[0]
    with torch.no_grad():
        found, wanted = (m(**inputs).logits.log_softmax(-1) for m in (model, decoder.model))
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    assert task.loss(model, batch).item() == pytest.approx(divergence.mean().item(), rel=1e-4)
    changed = {**batch, "labels": batch["labels"].roll(1, 0)}
    assert task.loss(model, changed).item() == task.loss(model, batch).item()
    task.loss(model, batch).backward()
    assert all(p.grad is None for p in decoder.model.parameters()), "the original is not trained"


def test_an_original_that_does_not_match_is_one_line(
    text: Path, decoder: Loaded, encoder: Loaded, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_model(encoder.model, other, tokenizer=decoder.tokenizer)
    task = create("language-modeling", data=text, window=8, loss="original", original=str(other))
    with pytest.raises(InputError, match="cannot teach tiny-llama: it gives 0 scores per token, not 6"):
        task.build(decoder)
    with pytest.raises(InputError, match="unknown loss 'orginal'; did you mean original?"):
        create("language-modeling", data=text, loss="orginal")
