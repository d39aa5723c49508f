"""Tiny random models of every kind, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture()
def bert_folder(tmp_path: Path) -> Path:
    """A folder as transformers saves it: a random BERT of two blocks, without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path / "bert"
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture()
def edit_config() -> Any:
    """A function that changes entries of a folder's config.json."""
    import json

    def edit(folder: Path, **changes: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit
