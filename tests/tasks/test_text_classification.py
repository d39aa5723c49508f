"""Tables of every kind are read, columns found, splits carved; each kind of bad data has its line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from s2d.errors import InputError
from s2d.models import Loaded, load, save_model
from s2d.tasks import create
from s2d.tasks.evaluation import model_for
from s2d.tasks.text_classification import TextClassification

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [(f"w{i % 9} w{i % 7} w{i % 4} w{i}", "up" if i % 3 else "down") for i in range(60)]


def task(data: Path, **options: object) -> TextClassification:
    made = create("text-classification", data=data, **options)
    assert isinstance(made, TextClassification)
    return made


def write_csv(path: Path, rows: list[tuple[str, str]] = ROWS, header: str | None = "text,label") -> Path:
    path.write_text("\n".join(([header] if header else []) + [f"{text},{label}" for text, label in rows]) + "\n")
    return path


def write_tsv(path: Path) -> Path:
    path.write_text("".join(f"{text}\t{label}\n" for text, label in ROWS))
    return path


def write_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t, "label": name}) + "\n" for i, (t, name) in enumerate(ROWS)))
    return path


def write_parquet(path: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [t for t, _ in ROWS], "label": [name for _, name in ROWS]}), path)
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_csv, "a.csv"), (write_tsv, "a.tsv"), (write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")],
)
def test_every_format_gives_the_same_data(write: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    made = task(write(tmp_path / name))
    assert made.labels == ("down", "up")
    assert made.sizes() == {"train": 43, "validation": 5, "test": 12}
    assert made.fingerprint == task(write_csv(tmp_path / "same.csv")).fingerprint


def test_carved_splits_are_stratified_disjoint_and_independent_of_order(tmp_path: Path) -> None:
    first = task(write_csv(tmp_path / "a.csv"))._examples
    second = task(write_csv(tmp_path / "b.csv", ROWS[::-1]))._examples
    texts = {split: {example.text for example in examples} for split, examples in first.items()}
    assert texts == {split: {example.text for example in examples} for split, examples in second.items()}
    assert sum(len(part) for part in texts.values()) == len(ROWS) == len(set().union(*texts.values()))
    assert Counter(example.label for example in first["test"]) == {"up": 8, "down": 4}


def test_folder_with_files_for_splits(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS[:40])
    write_csv(tmp_path / "dev.csv", ROWS[40:48])
    write_csv(tmp_path / "test.csv", ROWS[48:])
    assert task(tmp_path).sizes() == {"train": 40, "validation": 8, "test": 12}
    (tmp_path / "dev.csv").unlink()
    assert task(tmp_path).sizes() == {"train": 36, "validation": 4, "test": 12}


def test_columns_by_name_or_by_look(tmp_path: Path) -> None:
    odd = write_csv(tmp_path / "a.csv", header="phrase,mood")
    assert task(odd).sizes() == task(write_csv(tmp_path / "b.csv", header=None)).sizes()
    assert task(odd, text="phrase", label="mood").labels == ("down", "up")
    three = tmp_path / "c.csv"
    three.write_text("a,b,c\n" + "".join(f"{t},{i},{name}\n" for i, (t, name) in enumerate(ROWS)))
    assert task(three, text="a", label="c").labels == ("down", "up")
    with pytest.raises(InputError, match="which column is the text\\? name it; the columns are a, b, c"):
        task(three)


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [(text, str(i % 12)) for i, (text, _) in enumerate(ROWS)]
    assert task(write_csv(tmp_path / "a.csv", rows)).labels == tuple(str(i) for i in range(12))


def test_loss_and_accuracy(tmp_path: Path, encoder: Loaded) -> None:
    made = task(write_csv(tmp_path / "a.csv"))
    model = made.build(encoder, seed=4).eval()
    batch = next(made.batches("test", batch_size=12))
    scores = model(**made.inputs(batch)[0])
    expected = -scores.log_softmax(1)[torch.arange(12), batch["labels"]].mean()
    torch.testing.assert_close(made.loss(model, batch), expected)
    hits = (scores.argmax(1) == batch["labels"]).double().mean().item()
    assert made.evaluate(model, "test", batch_size=5) == {"accuracy": pytest.approx(100 * hits)}
    assert not torch.equal(made.build(encoder, seed=5).head.weight, model.head.weight)


def test_a_saved_classifier_keeps_its_head_for_the_same_classes_only(tmp_path: Path, encoder: Loaded) -> None:
    made = task(write_csv(tmp_path / "a.csv"))
    model = made.build(encoder, seed=4)
    saved = load(save_model(model, tmp_path / "m", tokenizer=encoder.tokenizer))
    assert torch.equal(made.build(saved, seed=9).head.weight, model.head.weight)
    other = task(write_csv(tmp_path / "b.csv", [(text, name + "ward") for text, name in ROWS]))
    rebuilt = other.build(saved, seed=9)
    assert rebuilt.labels == ("downward", "upward") and not torch.equal(rebuilt.head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("a.csv", b"", {}, "a.csv is empty"),
        ("a.csv", b"text,label\n", {}, "a.csv holds no rows"),
        ("a.csv", b"text,label\nhello,up\n", {"label": "mood"}, "has no column 'mood'; its columns are text, label"),
        ("a.csv", b"text,label\n\xff\xfe,up\n", {}, r"is not UTF-8 text \(byte 11\)"),
        ("a.csv", b"text,label\nw1,up\nw2,down,x\n", {}, "line 3: 3 columns where the first line has 2"),
        ("a.csv", b"text,label\nw1,up\n  ,down\n", {}, r"row 3: the text \(column 'text'\) is empty"),
        ("a.csv", b"text,label\nw1,up\nw2,\n", {}, r"row 3: the label \(column 'label'\) is empty"),
        ("a.csv", b"text,label\nw1,up\nw2,up\nw3,up\n", {}, "have label 'up'; two classes are needed"),
        ("a.csv", b"text,label\nw1,up\nw2,down\n", {}, "too few rows to take a test split"),
        ("a.csv", b'text,label\n"w1,up\n', {}, "cannot read"),
        ("a.jsonl", b'{"text": "a"\n', {}, "cannot read .* as JSON lines"),
        ("a.jsonl", b"[1, 2]", {}, "one JSON object per line"),
        ("a.jsonl", b'{"text": "w1", "label": "up"}\n{"text": "w2"}\n', {}, "the label .* is empty"),
        ("a.parquet", b"PAR1 nonsense", {}, "cannot read .* as Parquet"),
        ("a.xlsx", b"PK", {}, "is not a table that can be read; use .csv, .tsv"),
        ("a.csv", b"text,label\nw1,up\n", {"text": "text", "label": "text"}, "cannot both be column"),
    ],
)
def test_bad_files(name: str, content: bytes, options: dict[str, str], expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        task(tmp_path / name, **options)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder or file"):
        task(tmp_path / "nowhere")
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(InputError, match="has no files named train, validation or test .*it holds readme.md"):
        task(tmp_path)
    write_csv(tmp_path / "test.csv")
    with pytest.raises(InputError, match=r"has no train file \(train.csv or train.tsv"):
        task(tmp_path)
    write_csv(tmp_path / "train.csv", ROWS[:30])
    write_tsv(tmp_path / "train.tsv")
    with pytest.raises(InputError, match="has several train files: train.csv, train.tsv; keep one"):
        task(tmp_path)
    (tmp_path / "train.tsv").unlink()
    write_csv(tmp_path / "test.csv", [("w1 w2", "upp"), *ROWS[30:]])
    with pytest.raises(InputError, match=r"test.csv, row 2: label 'upp' does not occur in train \(close: up\)"):
        task(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("banking77", {"train": 9000, "validation": 1003, "test": 3080}, 77),
        ("sst2", {"train": 6920, "validation": 872, "test": 1821}, 2),
    ],
)
def test_published_data_sets(name: str, sizes: dict[str, int], classes: int) -> None:
    made = task(SHARED / name)
    assert made.sizes() == sizes and len(made.labels) == classes


def test_the_head_of_a_sequence_classifier_is_kept_by_names_or_numbers(tmp_path: Path, encoder: Loaded) -> None:
    import transformers

    def classifier(names: list[str]) -> Loaded:
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)},
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
        folder = tmp_path / "-".join(names)
        model.save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
        return load(folder)

    named = task(write_csv(tmp_path / "a.csv"))
    loaded = classifier(["up", "other", "down"])
    model = model_for(loaded, named)
    batch = next(named.batches("test", batch_size=12))
    scores = loaded.model(**named.inputs(batch)[0]).logits
    right = {0: "up", 2: "down"}
    truth = dict(ROWS)
    texts = named.texts("test")[:12]
    hits = [right.get(int(row.argmax())) == truth[text] for row, text in zip(scores, texts, strict=True)]
    assert float(named.outcomes(model, batch).score()) == pytest.approx(100 * sum(hits) / 12)
    assert float(named.loss(model, batch)) > 0 and not named.new_head
    numbered = task(write_csv(tmp_path / "b.csv", [(text, str(int(name == "up"))) for text, name in ROWS]))
    model_for(classifier(["LABEL_0", "LABEL_1"]), numbered)
    for names, made in ((["LABEL_0", "LABEL_1"], named), (["up", "left"], named), (["LABEL_0"] * 1, numbered)):
        with pytest.raises(InputError, match="has no trained head"):
            model_for(classifier(names), made)
