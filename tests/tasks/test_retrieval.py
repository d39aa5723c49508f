"""Recall by hand and by the model's own scores; layouts; what is wrong with captions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_images import picture

from s2d.errors import InputError
from s2d.models import load
from s2d.tasks import create
from s2d.tasks.retrieval import Retrieval, recalls

pytest.importorskip("PIL")
pytest.importorskip("transformers")


def make_folder(path: Path, captions: dict[str, list[Any]]) -> Path:
    number = 0
    for split, texts in captions.items():
        folder = path / split
        folder.mkdir(parents=True)
        lines = []
        for text in texts:
            (folder / f"{number}.png").write_bytes(picture(number))
            lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
            number += 1
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["a red thing", "something green", "blue all over"]
    texts = {
        "train": [words[n % 3] for n in range(12)],
        "val": [words[n] for n in range(3)],
        "test": [[f"red {n}", f"rosy {n}"] if n % 2 else f"red {n}" for n in range(7)],
    }
    return make_folder(tmp_path_factory.mktemp("pairs"), texts)


def task(data: Path, **options: Any) -> Retrieval:
    made = create("retrieval", data=data, **options)
    assert isinstance(made, Retrieval)
    return made


def test_recall_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3]])
    found = recalls(scores, [[1], [0, 2]])  # image 0 has text 1, image 1 texts 0 and 2
    # Images: text 0 beats image 0's own; image 1's own text 0 is first. Texts: 0 -> image 0, wrong; 1 and 2 right.
    assert found["image_to_text_r1"] == 50 and found["image_to_text_r5"] == 100
    assert found["text_to_image_r1"] == pytest.approx(200 / 3)
    assert found["mean_r1"] == pytest.approx((50 + 200 / 3) / 2)


def test_equal_scores_and_no_numbers_are_no_hits() -> None:
    assert recalls(torch.ones(20, 20), [[n] for n in range(20)])["mean_r1"] == 0
    assert recalls(torch.full((3, 3), torch.nan), [[n] for n in range(3)])["mean_r1"] == 0


@pytest.mark.parametrize("name", ["clip-tiny", "siglip-tiny"])
def test_recall_is_that_of_the_models_own_scores(name: str, folder: Path) -> None:
    loaded, made = load(f"new:{name}"), task(folder)
    model = made.build(loaded).eval()
    texts = ["red 0", "red 1", "rosy 1", "red 2", "red 3", "rosy 3", "red 4", "red 5", "rosy 5", "red 6"]
    own = [[0], [1, 2], [3], [4, 5], [6], [7, 8], [9]]
    pixels = next(made.batches("test", batch_size=7))["pixels"]
    tokens = model.tokenize(loaded.tokenizer, texts)
    with torch.no_grad():
        scores = loaded.model(pixel_values=made.normalize(pixels), **tokens).logits_per_image
    first = [scores[n].argmax().item() in own[n] for n in range(7)]
    assert made.evaluate(model, "test", batch_size=3)["image_to_text_r1"] == pytest.approx(100 * sum(first) / 7)
    calls = made.inputs(next(made.batches("train", batch_size=4)))
    assert model(**calls[0]).shape[0] == 4


def test_training_on_pairs_learns(folder: Path) -> None:
    loaded, made = load("new:siglip-tiny"), task(folder)
    model = made.build(loaded)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(25):
        for batch in made.batches("train", batch_size=12, seed=epoch, shuffle=True):
            optimizer.zero_grad()
            made.loss(model, batch).backward()
            optimizer.step()
    assert made.evaluate(model, "validation")["mean_r1"] > 80


def test_an_image_in_several_rows_is_one_image(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for split, shift in (("train", 0), ("test", 20)):
        rows = {
            "image": [picture(n // 2 + shift) for n in range(20)],
            "caption": [f"picture {n} of {split}" for n in range(20)],
        }
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{split}.parquet")
    made = task(tmp_path)
    model = made.build(load("new:clip-tiny"))
    assert len(made._tables["test"]) == 10 and made.sizes()["test"] == 20
    trained = {row.content() for row in made.rows["train"]}
    assert not trained & {row.content() for row in made.rows["validation"]}, "no image is on both sides"
    assert set(made.evaluate(model, "test")) >= {"mean_r1", "image_to_text_r5", "text_to_image_r1"}


def test_damaged_images_are_left_out_also_when_streamed(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    made_folder = make_folder(tmp_path, {"train": ["a", "b", "c", "d"], "val": ["a"], "test": ["a", "b"]})
    (made_folder / "train" / "1.png").write_bytes(b"no image")
    monkeypatch.setattr(importlib.import_module("s2d.data.image_table"), "MEMORY", 0)
    made = task(made_folder)
    made.build(load("new:clip-tiny"))
    assert sum(len(batch["pixels"]) for batch in made.batches("train", batch_size=2)) == 3
    assert "1 of 4 images cannot be read" in made.notes()[0] and "row 2" in made.notes()[0]


@pytest.mark.parametrize("caption", [None, "", [], [3]])
def test_a_caption_that_is_none_has_its_line(caption: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a caption"):
        task(make_folder(tmp_path, {"train": ["a", caption], "val": ["b"], "test": ["c"]}))


def test_bad_input_has_its_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'title'"):
        task(folder, caption="title")
    with pytest.raises(InputError, match="no metadata file"):
        task(tmp_path)
    with pytest.raises(InputError, match="no image and text tower"):
        task(folder).build(load("new:vit-tiny"))
