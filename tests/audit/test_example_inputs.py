"""Inputs made for an audit: texts, windows, images; from files, lists, or the standard library's docstrings."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2d.audit import audit, audit_batches
from s2d.errors import InputError
from s2d.models import Family, Loaded, families


class Words:
    """A tokenizer of whole words; its ids are the lengths of the words."""

    pad_token_id = 0
    model_max_length = 64

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
        def ids(words: str) -> list[int]:
            return [len(word) % 50 + 1 for word in words.split()][: options.get("max_length", 10**9)]

        return {"input_ids": ids(text) if isinstance(text, str) else [ids(words) for words in text]}


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(64, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.fc(self.table(input_ids))


class ImageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.fc(pixel_values.mean((2, 3)))


class PositionalImageModel(ImageModel):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)


class BothModel(TextModel):
    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input_ids, attention_mask) + pixel_values.mean()


class Processor:
    def preprocess(self) -> None: ...

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        assert all(image.mode == "RGB" for image in images)
        return {"pixel_values": torch.stack([torch.full((3, 4, 4), image.width / 10) for image in images])}


def family(name: str) -> Family:
    return families()[name]


def text_model(**changes: Any) -> Loaded:
    return Loaded(**{**vars(Loaded(TextModel(), family("bert"), "tiny", Words(), None, "0")), **changes})


def tokens(batches: Any) -> list[list[int]]:
    """The real tokens of every text."""
    return [
        row[kept.bool()].tolist()
        for b in batches
        for row, kept in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


def test_texts_that_are_given_are_tokenized_padded_and_audited() -> None:
    loaded = text_model()
    batches = audit_batches(loaded, texts=["a bb", "  ", "ccc", "dddd eeeee ffffff"])
    assert sorted(tokens(batches)) == [[2, 3], [4], [5, 6, 7]]
    assert audit(loaded.model, batches).run["tokens"] == 6


def test_without_data_docstrings_of_the_standard_library_are_used() -> None:
    first, second = audit_batches(text_model(), num=20), audit_batches(text_model(), num=20)
    assert tokens(first) == tokens(second) and len(tokens(first)) == 20
    assert max(map(len, tokens(first))) <= 64  # the model's own limit


def test_number_and_length_can_be_chosen() -> None:
    texts = [" ".join("x" * 30) for _ in range(50)]
    found = tokens(audit_batches(text_model(), texts=texts, num=7, length=5))
    assert [len(ids) for ids in found] == [5] * 7
    with pytest.raises(InputError, match="at least 1, not 0"):
        audit_batches(text_model(), num=0)
    with pytest.raises(InputError, match="length is 100, but tiny has only 64 positions"):
        audit_batches(text_model(), texts=texts, length=100)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "a bb\n\nccc\n"),
        ("texts.csv", "id,text,label\n1,a bb,x\n2,ccc,y\n"),
        ("texts.tsv", "1\ta bb\n2\tccc\n"),
        ("texts.jsonl", '{"sentence": "a bb", "n": 1}\n{"sentence": "ccc", "n": 2}\n'),
    ],
)
def test_texts_come_from_any_table_or_plain_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert sorted(tokens(audit_batches(text_model(), tmp_path / name))) == [[2, 3], [4]]


def test_of_a_folder_the_validation_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    (tmp_path / "valid.txt").write_text("bb\n")
    assert tokens(audit_batches(text_model(), tmp_path)) == [[3]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no text"),
        (b"\n  \n", "there is no text"),
        (b"a\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_file_without_texts_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        audit_batches(text_model(), tmp_path / "texts.txt")
    assert "texts.txt" in str(caught.value)


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder or file"):
        audit_batches(text_model(), tmp_path / "none.txt")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(InputError, match="not a table that can be read"):
        audit_batches(text_model(), tmp_path / "image.png")
    with pytest.raises(InputError, match="texts is a list of sentences"):
        audit_batches(text_model(), texts="one sentence")
    with pytest.raises(InputError, match="there is no text"):
        audit_batches(text_model(), texts=[])
    with pytest.raises(InputError, match="tiny comes without a tokenizer"):
        audit_batches(text_model(tokenizer=None))


# -- language models ---------------------------------------------------------------------------------------------------


def test_language_models_get_windows_of_running_text(tmp_path: Path) -> None:
    loaded = text_model(family=family("llama"))
    (tmp_path / "text.txt").write_text("a bb ccc\n\ndddd eeeee\nffffff ggggggg\n" * 100)
    batches = audit_batches(loaded, tmp_path / "text.txt", num=3, length=8)
    assert [tuple(b["input_ids"].shape) for b in batches if isinstance(b, dict)] == [(1, 8)] * 3
    whole = [id for ids in tokens(batches) for id in ids]
    assert whole[:9] == [2, 3, 4, 5, 6, 7, 8, 2, 3]
    assert len(audit_batches(loaded, num=2)) == 2
    with pytest.raises(InputError, match="makes 1 tokens"):
        audit_batches(loaded, texts=["one"])


def test_only_as_much_of_a_long_text_is_read_as_needed() -> None:
    loaded = text_model(family=family("llama"))
    texts: Any = ["some words that go on"] * 100_000
    sizes: list[int] = []

    class Counting(Words):
        def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
            sizes.append(len(text))
            return super().__call__(text, **options)

    loaded.tokenizer = Counting()
    audit_batches(loaded, texts=texts, num=2, length=16)
    assert sizes and max(sizes) < 1000


# -- images ------------------------------------------------------------------------------------------------------------


def image_model(model: nn.Module, processor: Any) -> Loaded:
    return Loaded(model, family("vit"), "tiny-vit", None, processor, "0")


def test_image_models_need_images_and_a_processor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data FOLDER"):
        audit_batches(image_model(ImageModel(), Processor()))
    with pytest.raises(InputError, match="without an image processor"):
        audit_batches(image_model(ImageModel(), None), tmp_path)


@pytest.fixture()
def pictures(tmp_path: Path) -> Path:
    pil = pytest.importorskip("PIL.Image")
    for index in range(1, 6):
        folder = tmp_path / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        pil.new("L", (index, 4), 100).save(folder / f"{index}.png")
    return tmp_path


def test_images_come_from_a_folder_through_the_models_processor(pictures: Path) -> None:
    loaded = image_model(ImageModel(), Processor())
    batches = audit_batches(loaded, pictures)
    widths = [value for b in batches if isinstance(b, dict) for value in b["pixel_values"][:, 0, 0, 0].tolist()]
    assert sorted(widths) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert audit(loaded.model, batches).run["tokens"] == 5
    assert len(audit_batches(loaded, pictures, num=2)[0]["pixel_values"]) == 2  # pyright: ignore[reportArgumentType,reportCallIssue]


def test_models_that_take_images_by_position_get_tensors(pictures: Path) -> None:
    loaded = image_model(PositionalImageModel(), lambda image: torch.full((3, 4, 4), float(image.width)))
    batches = audit_batches(loaded, pictures)
    assert all(isinstance(batch, Tensor) for batch in batches)
    assert audit(loaded.model, batches).run["tokens"] == 5


def test_models_of_both_get_texts_too(pictures: Path) -> None:
    loaded = Loaded(BothModel(), family("clip"), "tiny-clip", Words(), Processor(), "0")
    batches = audit_batches(loaded, pictures)
    assert all(set(batch) == {"pixel_values", "input_ids", "attention_mask"} for batch in batches)
    assert audit(loaded.model, batches).rows[0].pcdr is not None


def test_images_come_from_parquet(tmp_path: Path) -> None:
    pil, parquet, arrow = (pytest.importorskip(name) for name in ("PIL.Image", "pyarrow.parquet", "pyarrow"))
    cells = []
    for index in range(1, 4):
        file = io.BytesIO()
        pil.new("RGB", (index, 4)).save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
    parquet.write_table(arrow.table({"label": [0, 1, 2], "img": cells}), tmp_path / "images.parquet")
    (batch,) = audit_batches(image_model(ImageModel(), Processor()), tmp_path / "images.parquet")
    assert isinstance(batch, dict) and len(batch["pixel_values"]) == 3
    (tmp_path / "folder").mkdir()
    for name, rows in (("test", cells[:1]), ("train", cells)):
        parquet.write_table(arrow.table({"img": rows}), tmp_path / "folder" / f"{name}-00000-of-00001.parquet")
    (batch,) = audit_batches(image_model(ImageModel(), Processor()), tmp_path / "folder")
    assert len(batch["pixel_values"]) == 3, "of train, as there is no validation"
    parquet.write_table(arrow.table({"label": [0, 1]}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="no column of encoded images"):
        audit_batches(image_model(ImageModel(), Processor()), tmp_path / "none.parquet")


def test_folders_without_images_and_broken_images_are_named(pictures: Path, tmp_path: Path) -> None:
    loaded = image_model(ImageModel(), Processor())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        audit_batches(loaded, tmp_path / "empty")
    with pytest.raises(InputError, match="no folder or file"):
        audit_batches(loaded, tmp_path / "none")
    (pictures / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png is not an image"):
        audit_batches(loaded, pictures)
    # A kind that PIL would start a program for.
    (pictures / "broken.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EndProlog\n"
    )
    with pytest.raises(InputError, match=r"broken\.png is not an image that can be read: cannot identify"):
        audit_batches(loaded, pictures)


def test_texts_fit_the_positions_of_a_model_of_both(pictures: Path) -> None:
    """Its configuration holds the text part's positions, as SigLIP's does; the tokenizer alone allows more."""
    model = BothModel()
    model.config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=5))  # type: ignore[assignment]
    batches = audit_batches(Loaded(model, family("clip"), "tiny-clip", Words(), Processor(), "0"), pictures)
    assert all(batch["input_ids"].shape[1] <= 5 for batch in batches if isinstance(batch, dict))
