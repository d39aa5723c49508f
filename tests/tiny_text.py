"""A BERT of two small blocks, its tokenizer, and a table of labelled nonsense, all made on the spot."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2d.models import Loaded
from s2d.tasks import Task, create

CLASSES = ("fruit", "tools", "birds")
WORDS = {
    "fruit": ("apple", "pear", "plum", "fig", "lemon"),
    "tools": ("hammer", "saw", "drill", "plane", "file"),
    "birds": ("robin", "heron", "wren", "finch", "crow"),
}
FILLERS = ("the", "a", "old", "new", "very", "good", "bad", "one", "two", "three")


def make_model(folder: Path, width: int = 16) -> Path:
    """A folder as transformers saves it: a random BERT and a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    words = [word for group in WORDS.values() for word in group]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *words]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    vocab: Any = {word: number for number, word in enumerate(vocabulary)}
    transformers.BertTokenizerFast(vocab=vocab, model_max_length=32).save_pretrained(folder)
    return folder


def make_texts(file: Path, count: int) -> Path:
    """A file with so many different lines of four known words, at most 4,096."""
    words = ("apple", "robin", "saw", "the", "old", "wren", "fig", "drill")
    file.write_text("\n".join(" ".join(words[i >> n & 7] for n in range(4)) for i in range(count)))
    return file


def make_data(folder: Path, *, train: int = 120, test: int = 45) -> Path:
    """A folder with train.csv and test.csv: sentences of 2 to 20 words, their class by the words in them."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    for split, size in (("train", train), ("test", test)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(size):
                label = CLASSES[number % len(CLASSES)]
                words = generator.choices(WORDS[label], k=generator.randint(1, 4))
                words += generator.choices(FILLERS, k=generator.randint(1, 16))
                generator.shuffle(words)
                writer.writerow([" ".join(words), label])
    return folder


def make_task(folder: Path, loaded: Loaded) -> Task:
    """The classification of `make_data`, made ready for a model."""
    made = create("text-classification", data=make_data(folder), max_length=24)
    made.prepare(loaded)
    return made


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
