"""Zero-shot scores are transformers' own; both losses are their formulas; training on pairs works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_images import CLASSES, make_folders
from torch.nn import functional as F

from s2d.errors import InputError
from s2d.models import load, save_model
from s2d.models.dual_encoder import DualEncoder, pair_loss
from s2d.tasks import create
from s2d.tasks.zero_shot import ZeroShot

pytest.importorskip("PIL")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("images"), {"train": 6, "val": 2, "test": 3})


def task(data: Path, **options: Any) -> ZeroShot:
    made = create("zero-shot", data=data, **options)
    assert isinstance(made, ZeroShot)
    return made


@pytest.mark.parametrize("name", ["clip-tiny", "siglip-tiny"])
def test_scores_are_those_of_the_model(name: str, folders: Path) -> None:
    loaded, made = load(f"new:{name}"), task(folders, templates=["a {}."])
    model = made.build(loaded).eval()
    assert isinstance(model, DualEncoder)
    batch = next(made.batches("test", batch_size=9))
    inputs = made.inputs(batch)[0]
    with torch.no_grad():
        expected = loaded.model(**inputs).logits_per_image
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-4)
    right = 100 * float((expected.argmax(1) == batch["labels"]).float().mean())
    assert made.evaluate(model, "test") == {"accuracy": pytest.approx(right)}


@pytest.mark.parametrize("name", ["clip-tiny", "siglip-tiny"])
def test_training_on_pairs_learns_and_is_saved(name: str, folders: Path, tmp_path: Path) -> None:
    loaded, made = load(f"new:{name}"), task(folders)
    model = made.build(loaded)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(20):
        for batch in made.batches("train", batch_size=18, seed=epoch, shuffle=True):
            optimizer.zero_grad()
            made.loss(model, batch).backward()
            optimizer.step()
    score = made.evaluate(model, "test")
    assert score["accuracy"] > 80
    save_model(model, tmp_path / "m", tokenizer=loaded.tokenizer, processor=loaded.processor)
    again = load(tmp_path / "m")
    assert task(folders).build(again).training and made.evaluate(again.model, "test") == score


def test_sigmoid_loss_is_its_formula() -> None:
    scores, match = torch.randn(4, 3), torch.eye(4, 3, dtype=torch.bool)
    signs = torch.where(match, 1.0, -1.0)
    expected = -torch.log(1 / (1 + torch.exp(-signs * scores))).sum() / 4
    torch.testing.assert_close(pair_loss(scores, match, sigmoid=True), expected)


def test_softmax_loss_is_clips_for_one_to_one_pairs() -> None:
    scores = torch.randn(5, 5)
    match = torch.eye(5, dtype=torch.bool)
    expected = (F.cross_entropy(scores, torch.arange(5)) + F.cross_entropy(scores.T, torch.arange(5))) / 2
    torch.testing.assert_close(pair_loss(scores, match, sigmoid=False), expected)


def test_bad_input_has_its_line(folders: Path) -> None:
    with pytest.raises(InputError, match="needs a {} for the name"):
        task(folders, templates=["a photo"])
    with pytest.raises(InputError, match="are numbers; name them"):
        task(folders, classes=["0", "1", "2"])
    with pytest.raises(InputError, match="no image and text tower"):
        task(folders).build(load("new:vit-tiny"))
    assert task(folders).labels == CLASSES


def test_other_descriptions_are_other_data(folders: Path) -> None:
    """So that a training with other templates or names is never continued as if it were this one."""
    marks = [task(folders), task(folders, templates=["a {}."]), task(folders, classes=["tom", "rex", "moray"])]
    assert len({made.fingerprint for made in marks}) == 3
