"""Folders, Parquet and data sets give the same images; heads are kept where they fit; bad images have their line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_images import CLASSES, make_folders, make_parquet, picture
from torch import nn

from s2d.audit import audit_batches
from s2d.data import image_table
from s2d.errors import InputError
from s2d.models import Loaded, family_of, load, save_model
from s2d.models.image_heads import ImageClassifier
from s2d.tasks import create
from s2d.tasks.image_classification import ImageClassification

pytest.importorskip("PIL")
pytest.importorskip("transformers")


def task(data: Path | str, **options: Any) -> ImageClassification:
    made = create("image-classification", data=data, **options)
    assert isinstance(made, ImageClassification)
    return made


@pytest.fixture(scope="module")
def vit() -> Loaded:
    return load("new:vit-tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("images"), {"train": 6, "val": 2, "test": 3})


def first(made: ImageClassification, loaded: Loaded, split: Any = "train") -> tuple[torch.Tensor, torch.Tensor]:
    made.prepare(loaded)
    batch = next(made.batches(split, batch_size=100))
    return batch["pixels"], batch["labels"]


def test_folders_and_parquet_hold_the_same_images(folders: Path, vit: Loaded, tmp_path: Path) -> None:
    by_folder = task(folders)
    assert by_folder.labels == CLASSES and by_folder.sizes() == {"train": 18, "validation": 6, "test": 9}
    make_parquet(tmp_path / "train-00000-of-00001.parquet", 6)
    make_parquet(tmp_path / "validation.parquet", 2)
    make_parquet(tmp_path / "test.parquet", 3)
    by_table = task(tmp_path)
    assert by_table.labels == CLASSES and by_table.sizes() == by_folder.sizes()
    found, labels = first(by_folder, vit)
    rows, numbers = first(by_table, vit)
    assert labels.tolist() == sorted(numbers.tolist())
    assert torch.equal(found, rows[numbers.argsort(stable=True)])


def test_a_data_set_of_the_datasets_library_is_read(vit: Loaded, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    make_parquet(tmp_path / "train.parquet", 6)
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "c"))
    table.save_to_disk(tmp_path / "saved")
    made = task(f"datasets:{tmp_path / 'saved'}")
    assert made.labels == CLASSES and sum(made.sizes().values()) == 18
    assert first(made, vit)[0].shape[1:] == (3, 32, 32)


def test_missing_splits_are_carved_by_content(vit: Loaded, tmp_path: Path) -> None:
    whole = task(make_folders(tmp_path / "a", {"": 10}))
    assert whole.sizes() == {"train": 21, "validation": 3, "test": 6}
    for split in ("validation", "test"):
        assert first(whole, vit, split)[1].bincount().tolist() == [whole.sizes()[split] // 3] * 3


def test_pixels_are_what_transformers_own_processor_makes(folders: Path, tmp_path: Path) -> None:
    """The same resizing, cropping and normalization, for a stretched and for a cropped model."""
    from PIL import Image

    for name in ("vit-tiny", "clip-tiny"):
        loaded = load(f"new:{name}")
        assert loaded.processor is not None
        loaded.processor.save_pretrained(tmp_path)
        import transformers

        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")  # as here
        made = task(folders)
        made.prepare(replace(loaded, processor=processor))
        inputs = made.inputs(next(made.batches("test", batch_size=4)))[0]["pixel_values"]
        files = sorted((folders / "test" / "cat").glob("*.png"))
        expected = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(inputs[: len(files)], expected, atol=1e-5, rtol=0)


def test_a_fitting_head_is_kept_and_another_is_replaced(folders: Path, vit: Loaded) -> None:
    own = task(folders).build(vit)
    assert own.head is None
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(own.eval()(x), vit.model(x).logits)
    probe = task(folders, probe=True).build(vit)
    assert isinstance(probe.head, nn.Linear) and probe.head.out_features == 3
    trainable = [name for name, p in probe.named_parameters() if p.requires_grad]
    assert trainable == ["head.weight", "head.bias"]
    for name in ("siglip-tiny", "clip-tiny"):
        built = task(folders).build(load(f"new:{name}"))
        assert built.head is not None and built(x).shape == (2, 3)
        assert not any("text_model" in part for part, _ in built.named_modules()), "only the image tower"
        assert family_of(built).name == name.partition("-")[0]


def test_a_classifier_survives_saving(folders: Path, tmp_path: Path) -> None:
    loaded = load("new:siglip-tiny")
    built = task(folders).build(loaded, seed=3).eval()
    save_model(built, tmp_path / "saved", processor=loaded.processor)
    again = load(tmp_path / "saved")
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(again.model, ImageClassifier) and again.model.labels == CLASSES
    assert torch.equal(again.model(x), built(x))
    made = task(folders)
    made.prepare(again)
    assert made.evaluate(again.model, "test") == pytest.approx(task_score(made, built), rel=1e-6)


def task_score(made: ImageClassification, model: nn.Module) -> dict[str, float]:
    """Accuracy by hand."""
    batch = next(made.batches("test", batch_size=100))
    scores = model(**made.inputs(batch)[0])
    return {"accuracy": 100 * float((scores.argmax(1) == batch["labels"]).float().mean())}


def test_it_learns(folders: Path, vit: Loaded) -> None:
    made = task(folders, augment=True)
    model = made.build(vit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for epoch in range(12):
        for batch in made.batches("train", batch_size=18, seed=epoch, shuffle=True):
            optimizer.zero_grad()
            made.loss(model, batch).backward()
            optimizer.step()
    assert made.evaluate(model, "test")["accuracy"] > 90


def test_unreadable_images_are_left_out_and_listed(vit: Loaded, tmp_path: Path) -> None:
    make_folders(tmp_path, {"train": 6, "val": 2, "test": 3})
    (tmp_path / "train" / "cat" / "1.png").write_bytes(picture(0)[:60])
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"<html>not found</html>")
    made = task(tmp_path)
    pixels, labels = first(made, vit)
    assert len(pixels) == len(labels) == made.sizes()["train"] == 16
    (line,) = made.notes()
    assert "2 of 18" in line and "cat/1.png" in line and "dog/2.png" in line


def test_images_too_many_for_memory_are_decoded_when_asked_for(
    folders: Path, vit: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, _ = first(task(folders), vit)
    monkeypatch.setattr(image_table, "MEMORY", 0)
    later, _ = first(task(folders), vit)
    assert torch.equal(at_once, later)


def test_only_the_splits_that_are_used_are_decoded(folders: Path, vit: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    plain = image_table.ImageTable._one
    monkeypatch.setattr(image_table.ImageTable, "_one", lambda self, row: opened.append(row) or plain(self, row))
    made = task(folders)
    made.prepare(vit)
    assert opened == [0, 0, 0], "one of each split shows that it can be read"
    for _ in range(2):
        batches = list(made.batches("test", batch_size=2))
    assert len(opened) == 3 + sum(len(batch["labels"]) for batch in batches)


def test_grey_and_transparent_images_become_colours(vit: Loaded, tmp_path: Path) -> None:
    from PIL import Image

    make_folders(tmp_path, {"train": 6, "val": 2, "test": 3})
    Image.new("L", (20, 20), 128).save(tmp_path / "train" / "cat" / "0.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(tmp_path / "train" / "dog" / "0.png")
    assert first(task(tmp_path), vit)[0].shape == (18, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda p: (p / "train" / "fox").mkdir(), "class folder .*fox holds no images"),
        (lambda p: (p / "test" / "cat").rename(p / "test" / "yak"), "class 'yak' does not occur in train"),
    ],
)
def test_odd_folders_have_their_line(change: Any, line: str, tmp_path: Path) -> None:
    change(make_folders(tmp_path, {"train": 2, "val": 1, "test": 1}))
    with pytest.raises(InputError, match=line):
        task(tmp_path)


def test_bad_input_has_its_line(folders: Path, vit: Loaded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder or file"):
        task(tmp_path / "none")
    with pytest.raises(InputError, match="3 classes, but classes names 2"):
        task(folders, classes=["a", "b"])
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="cannot read .*train.parquet as Parquet"):
        task(tmp_path)
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        task(folders).build(replace(vit, processor=None))
    with pytest.raises(InputError, match="no configuration new:vit-tiy; did you mean vit-tiny"):
        load("new:vit-tiy")
    with pytest.raises(InputError, match="give seed=NUMBER"):
        load("new:vit-tiny?depth=3")


def test_a_model_with_random_weights_is_audited_on_a_folder_of_images(folders: Path, vit: Loaded) -> None:
    (batch,) = audit_batches(vit, folders / "test")
    made = task(folders)
    made.prepare(vit)
    assert isinstance(batch, dict)
    expected = made.inputs(next(made.batches("test", batch_size=100)))[0]["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"].sum(0), expected.sum(0))
