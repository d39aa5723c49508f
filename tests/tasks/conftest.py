"""A tiny text encoder with a real tokenizer, made offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from s2d.models import Loaded, family_of, load


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2D_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _tokenizer(words: list[str]) -> Any:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


WORDS = [f"w{index}" for index in range(60)]


@pytest.fixture()
def encoder() -> Loaded:
    """A random BERT of one block over the words w0 ... w59."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return Loaded(model, family_of(model), "tiny-bert", _tokenizer(WORDS), None, "0" * 16)


@pytest.fixture()
def decoder() -> Loaded:
    """A random Llama of one block over the same words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, pad_token_id=0, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    return Loaded(model, family_of(model), "tiny-llama", _tokenizer(WORDS), None, "0" * 16)


@pytest.fixture()
def vit() -> Loaded:
    """A random ViT of three blocks and three classes."""
    pytest.importorskip("PIL")
    pytest.importorskip("transformers")
    return load("new:vit-tiny")


@pytest.fixture()
def clip() -> Loaded:
    """A random CLIP of two towers of two blocks."""
    pytest.importorskip("PIL")
    pytest.importorskip("transformers")
    return load("new:clip-tiny")


@pytest.fixture()
def llava() -> Loaded:
    """A random image tower of two blocks before a random Llama of as many."""
    pytest.importorskip("PIL")
    pytest.importorskip("transformers")
    return load("new:llava-tiny")


@pytest.fixture()
def yolos() -> Loaded:
    """A random detector of three blocks."""
    pytest.importorskip("PIL")
    pytest.importorskip("transformers")
    return load("new:yolos-tiny")
