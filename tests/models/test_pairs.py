"""A pair of towers scores as its formula says, trains its image tower only, and comes back from the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_images import make_folders
from torch import nn
from torch.nn import functional as F

from s2d import quant
from s2d.errors import InputError
from s2d.models import load, save_model
from s2d.models.dual_encoder import DualEncoder
from s2d.models.fresh import byte_tokenizer
from s2d.models.pairs import ImageTextPair
from s2d.tasks import create
from s2d.tasks.base import calibration_inputs

pytest.importorskip("PIL")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def name(tmp_path: Path) -> str:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=260
    )
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "text")
    byte_tokenizer(512).save_pretrained(tmp_path / "text")
    return f"pair:new:vit-tiny+{tmp_path / 'text'}"


def test_scores_are_the_formula(name: str) -> None:
    loaded = load(name)
    pair, dual = loaded.model, DualEncoder(loaded.model).eval()
    assert isinstance(pair, ImageTextPair) and loaded.family.name == "pair" and dual.sigmoid
    tokens = dual.tokenize(loaded.tokenizer, ["a cat", "a longer dog"])
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        scores = dual(pixels, **tokens)
        hidden = pair.text.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        text = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        image = F.normalize(pair.image_projection(pair.image(pixels).last_hidden_state[:, 0]), dim=-1)
    torch.testing.assert_close(scores, 10 * image @ text.T - 10, rtol=1e-4, atol=1e-4)


def test_only_the_image_tower_learns_and_both_are_saved(name: str, tmp_path: Path) -> None:
    loaded = load(name)
    task = create("zero-shot", data=make_folders(tmp_path / "d", {"train": 6, "val": 2, "test": 3}))
    model = task.build(loaded)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for epoch in range(20):
        for batch in task.batches("train", batch_size=18, seed=epoch, shuffle=True):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and not any(key.startswith("encoder.text.") for key in changed)
    score = task.evaluate(model, "test")
    assert score["accuracy"] > 80
    save_model(model, tmp_path / "m", tokenizer=loaded.tokenizer, processor=loaded.processor)
    again = load(tmp_path / "m")
    assert task.evaluate(task.build(again), "test") == score  # type: ignore[arg-type]
    spec = quant.QuantSpec.parse({"base": "w4a4", "overrides": {"*text.encoder*": "keep"}})
    sites = quant.planned(again.model, spec, calibration_inputs(task, 4, 4, 0))
    quantized = [site for site in sites if site.format]
    assert quantized and all(site.module.startswith("encoder.image.") for site in quantized)
    assert sum(site.what == "probs" for site in quantized) == 3


@pytest.mark.parametrize("wrong", ["pair:new:vit-tiny", "pair:+x", "pair:new:vit-tiny+new:vit-tiny"])
def test_bad_names_have_their_line(wrong: str) -> None:
    with pytest.raises(InputError, match="pair:"):
        load(wrong)


def test_the_image_tower_may_be_a_classifier(name: str, tmp_path: Path) -> None:
    from s2d.models.image_heads import ImageClassifier

    vit = load("new:vit-tiny?seed=2")
    save_model(
        ImageClassifier(vit.model, ["a", "b", "c"], classes_of_its_own=True), tmp_path / "c", processor=vit.processor
    )
    pair = load(f"pair:{tmp_path / 'c'}+{name.rpartition('+')[2]}").model
    assert isinstance(pair, nn.Module)
    given, own = vit.model.vit.state_dict(), pair.get_submodule("image").state_dict()
    assert all(torch.equal(given[key], own[key]) for key in own if key in given)
