"""MNIST's files: the same pixels as in the file, for every reader of images; damaged ones have their line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from tests.tiny_images import make_idx

from s2d.audit import audit_batches
from s2d.data import images
from s2d.data.idx import idx_in, read_images, read_labels
from s2d.data.image_folders import read_labelled_images
from s2d.errors import InputError
from s2d.models import load
from s2d.tasks import create

image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return make_idx(tmp_path / "digits", {"train.gz": 60, "t10k": 12})


def pixels(source: bytes) -> np.ndarray:
    return np.asarray(image.open(io.BytesIO(source)))


def test_pixels_are_those_of_the_file(digits: Path) -> None:
    expected = np.frombuffer((digits / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(12, 9, 7)
    found = read_images(digits / "t10k-images-idx3-ubyte")
    assert len(found) == 12
    assert all(np.array_equal(pixels(source), each) for source, each in zip(found, expected, strict=True))
    assert read_labels(digits / "t10k-labels-idx1-ubyte") == [0, 1, 2] * 4


def test_splits_are_train_and_test_and_validation_is_taken_out_of_train(digits: Path) -> None:
    splits, names = read_labelled_images(str(digits))
    assert names == ("0", "1", "2")
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 54, "validation": 6, "test": 12}
    assert splits["test"][4].cells == ("1",) and splits["test"][4].place.endswith("t10k-images-idx3-ubyte, image 5")


@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte", "train-images.idx3-ubyte", "emnist-train-images-idx3-ubyte.gz"]
)
def test_usual_spellings(tmp_path: Path, name: str) -> None:
    made = make_idx(tmp_path, {"train.gz" if name.endswith(".gz") else "train": 3})
    for file in list(made.iterdir()):
        kind, number = ("images", "3") if "images" in file.name else ("labels", "1")
        file.rename(tmp_path / name.replace("images", kind).replace("idx3", f"idx{number}"))
    assert set(idx_in(tmp_path)) == {"train"}


def test_a_task_an_audit_and_a_pile_read_them(digits: Path) -> None:
    loaded = load("new:vit-tiny")
    task = create("image-classification", data=digits, classes=["a", "b", "c"])
    task.prepare(loaded)
    batch = next(task.batches("test", batch_size=100))
    assert batch["pixels"].shape == (12, 3, 32, 32) and task.labels == ("a", "b", "c")  # pyright: ignore
    assert sum(len(batch["pixel_values"]) for batch in audit_batches(loaded, digits)) == 60  # pyright: ignore
    assert images.holds_images(digits) and len(images.read_images(digits)) == 72


def test_damaged_files_are_named(digits: Path) -> None:
    file, labels = digits / "t10k-images-idx3-ubyte", digits / "t10k-labels-idx1-ubyte"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-1], "cut off or too long"),
        (whole + b"x", "cut off or too long"),
        (whole[:9], "no IDX file"),
        (b"\x00\x00\x0d" + whole[3:], "no IDX file"),  # floats
        (whole[:4] + bytes(4) + whole[8:], "is empty: its axes are 0 x 9 x 7"),
        (whole[:4] + b"\xff" * 12 + whole[16:], "cut off|cannot read"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_labelled_images(str(digits))
    file.write_bytes(whole)
    (digits / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b no")
    with pytest.raises(InputError, match=r"cannot read .*train-images"):
        read_labelled_images(str(digits))
    (digits / "train-images-idx3-ubyte").write_bytes(whole)
    with pytest.raises(InputError, match="labels, train-labels-idx1-ubyte, are not beside it"):
        read_labelled_images(str(digits))
    (digits / "train-images-idx3-ubyte").unlink()
    make_idx(digits, {"train.gz": 60})
    labels.write_bytes((digits / "t10k-labels-idx1-ubyte").read_bytes()[:4] + (5).to_bytes(4, "big") + bytes(5))
    with pytest.raises(InputError, match="holds 12 images, t10k-labels-idx1-ubyte beside it 5 labels"):
        read_labelled_images(str(digits))
    make_idx(digits, {"train": 60})
    with pytest.raises(InputError, match="two files of train images"):
        read_labelled_images(str(digits))
