"""Staying the original on images: what is read, the distances against plain formulas, and every kind of image model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_images import make_folders, make_parquet, picture
from torch.nn import functional as F

from s2d.cli import main
from s2d.data import image_table
from s2d.data.images import holds_images, read_images
from s2d.errors import InputError
from s2d.models import Loaded, load, save_model
from s2d.models.dual_encoder import DualEncoder
from s2d.models.image_heads import ImageClassifier, image_encoder
from s2d.quant import quantize
from s2d.tasks import SPLITS, create
from s2d.tasks.evaluation import evaluate
from s2d.tasks.teacher import variance_share
from s2d.tasks.unlabelled_images import UnlabelledImages

pytest.importorskip("PIL")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("photos"), {"": 40})


def task(data: Path | str, **options: Any) -> UnlabelledImages:
    made = create("unlabelled-images", data=data, **options)
    assert isinstance(made, UnlabelledImages)
    return made


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return model


# -- what is read ------------------------------------------------------------------------------------------------------


def test_images_of_a_folder_at_any_depth_and_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for place in ("1.png", "a/b/2.JPEG", ".hidden/3.png", "a/._4.png", "notes.txt"):
        (tmp_path / place).write_bytes(picture(1))
    assert {row.place for row in read_images(tmp_path)} == {str(tmp_path / p) for p in ("1.png", "a/b/2.JPEG")}
    pytest.importorskip("pyarrow")
    table = make_parquet(tmp_path / "a" / "any-name.parquet", 2)
    assert {row.source for row in read_images(table)} == {picture(number) for number in range(6)}
    assert len(read_images(tmp_path)) == 8
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"file_name": ["1.png"], "photo": [picture(9)]}), tmp_path / "metadata.parquet")
    assert len(read_images(tmp_path)) == 8, "a table without images is left out"
    with pytest.raises(InputError, match="which column is the image\\? name it; the columns are file_name, photo"):
        read_images(tmp_path / "metadata.parquet")
    assert [row.source for row in read_images(tmp_path / "metadata.parquet", "photo")] == [picture(9)]


def test_a_data_set_of_the_datasets_library_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = str(make_parquet(tmp_path / "train.parquet", 2))
    loaded = datasets.load_dataset("parquet", data_files={"train": file, "odd": file}, cache_dir=str(tmp_path / "c"))
    loaded.save_to_disk(tmp_path / "saved")
    rows = read_images(f"datasets:{tmp_path / 'saved'}")
    assert {row.source for row in rows} == {picture(number) for number in range(6)} and len(rows) == 12


def test_an_image_has_one_split_whatever_it_is_called_and_wherever_it_lies(photos: Path, tmp_path: Path) -> None:
    def splits(data: Path) -> dict[str, set[bytes]]:
        rows = task(data).rows
        return {split: {Path(str(row.source)).read_bytes() for row in rows[split]} for split in SPLITS}

    whole = splits(photos)
    assert sum(map(len, whole.values())) == 120 and all(whole.values())
    shutil.copytree(photos, tmp_path / "deep" / "moved")
    for number, file in enumerate(sorted((tmp_path / "deep").rglob("*.png"))):
        shutil.copy(file, tmp_path / f"copy-{number}.png")
        if number % 2:
            file.unlink()
    assert splits(tmp_path) == whole, "duplicates count once"


def test_of_many_images_every_folder_gives_some(photos: Path) -> None:
    few = task(photos, train=12, heldout=2)
    assert few.sizes() == {"train": 12, "validation": 2, "test": 2}
    assert {Path(str(row.source)).parent.name for row in few.rows["train"]} == {"cat", "dog", "eel"}


def test_unreadable_images_are_left_out_and_listed(
    vit: Loaded, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(photos, tmp_path / "photos")
    (data / "cat" / "bad.jpg").write_bytes(b"<html>not found</html>")
    made = task(data)
    made.prepare(vit)
    found = [batch["pixels"] for batch in made.batches("train", batch_size=1000)]
    for split in ("validation", "test"):
        list(made.batches(split, batch_size=1000))
    assert sum(made.sizes().values()) == 120
    (line,) = made.notes()
    assert "1 of " in line and "cat/bad.jpg: not an image" in line
    monkeypatch.setattr(image_table, "MEMORY", 0)
    made = task(data)
    made.prepare(vit)
    later = [batch["pixels"] for batch in made.batches("train", batch_size=1000)]
    assert torch.equal(found[0], later[0])


# -- distances ---------------------------------------------------------------------------------------------------------


def test_a_classifier_s_measures_are_those_of_the_formulas(vit: Loaded, photos: Path) -> None:
    made = task(photos)
    model = made.build(vit)
    assert type(model) is type(vit.model), "what comes out is the model that went in"
    assert made.evaluate(model) == pytest.approx({"cosine": 100.0, "drift": 0.0, "agreement": 100.0}, abs=1e-4)
    disturbed(model).eval()
    batch = next(made.batches("test", batch_size=1000))
    pixels = made.inputs(batch)[0]["pixel_values"]
    with torch.no_grad():
        (h_s, y_s), (h_t, y_t) = (
            (m.get_submodule("vit")(pixels).last_hidden_state, m(pixels).logits.log_softmax(-1))
            for m in (model, vit.model)
        )
    cosine = F.cosine_similarity(h_s[:, 0], h_t[:, 0]).mean().item()
    divergence = F.kl_div(y_s, y_t, log_target=True, reduction="batchmean").item()
    same = 100 * (y_s.argmax(1) == y_t.argmax(1)).double().mean().item()
    assert cosine < 0.99 and divergence > 1e-4
    expected = {"cosine": 100 * cosine, "drift": divergence, "agreement": same}
    assert evaluate(model, made, batch_size=4) == pytest.approx(expected, rel=1e-4)
    share = variance_share(h_s.flatten(0, 1), h_t.flatten(0, 1)).item()
    loss = 10 * (1 - cosine) + share + divergence
    assert made.loss(model, batch).item() == pytest.approx(loss, rel=1e-4)
    weighed = task(photos, embedding=0, features=3, scores=0)
    weighed.build(vit)
    assert weighed.loss(model, batch).item() == pytest.approx(3 * share, rel=1e-4)


@pytest.mark.parametrize("name", ["clip-tiny", "siglip-tiny"])
def test_of_two_towers_the_image_tower_is_trained_and_the_text_tower_stays(name: str, photos: Path) -> None:
    loaded = load(f"new:{name}")
    made = task(photos)
    model = made.build(loaded)
    assert isinstance(model, DualEncoder) and type(made.result(model)) is type(loaded.model)
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    torch.manual_seed(0)
    with torch.no_grad():
        weight = model.encoder.get_parameter("vision_model.encoder.layers.0.mlp.fc1.weight")
        weight += 0.1 * torch.randn_like(weight)
    batch = next(made.batches("train", batch_size=16))
    with torch.no_grad():
        pixels = made.inputs(batch)[0]["pixel_values"]
        found, wanted = (model.image(pixels), DualEncoder(loaded.model).image(pixels))
    start = made.loss(model, batch)
    share = start.item() - 10 * (1 - (found * wanted).sum(1).mean().item())
    assert start.item() > share > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        made.loss(model, batch).backward()
        optimizer.step()
    assert made.loss(model, batch).item() < start.item() / 2
    changed = {key for key, value in model.encoder.state_dict().items() if not torch.equal(before[key], value)}
    assert changed and not any(key.startswith(("text_", "logit_")) for key in changed)
    assert name != "clip-tiny" or "visual_projection.weight" in changed


@pytest.mark.parametrize(
    "name",
    [
        "timm:vit_tiny_patch16_224",
        "timm:deit_tiny_distilled_patch16_224",
        "timm:swin_tiny_patch4_window7_224",
        "open_clip:ViT-S-32",
        "yolos-tiny",
    ],
)
def test_other_libraries_and_models_show_their_features_too(name: str, photos: Path) -> None:
    if ":" in name:
        pytest.importorskip(name.partition(":")[0])
    loaded = load(f"new:{name}")
    made = task(photos, heldout=4)
    model = made.build(loaded)
    scores = {"agreement": 100.0} if name.startswith("timm:") else {}
    assert made.evaluate(model) == pytest.approx({"cosine": 100.0, "drift": 0.0, **scores}, abs=1e-3)
    batch = next(made.batches("test", batch_size=2))
    disturbed(model).eval()
    with torch.no_grad():
        assert made.loss(model, batch) > 0.01
        model(**made.inputs(batch)[0])
    assert made.evaluate(model)["drift"] > 0
    if name == "timm:vit_tiny_patch16_224":
        pixels = made.inputs(batch)[0]["x"]
        with torch.no_grad():
            wanted = [m.forward_features(pixels) for m in (model, loaded.model)]  # type: ignore[operator]
            tokens = variance_share(*(each.flatten(0, 1) for each in wanted)).item()
        alone = task(photos, heldout=4, embedding=0, scores=0)
        alone.build(loaded)
        assert alone.loss(model, batch).item() == pytest.approx(tokens, rel=1e-4)
        assert "forward_features" not in vars(model), "nothing is left in the model"


def test_a_new_head_is_not_compared_with_the_published_one(vit: Loaded, photos: Path, tmp_path: Path) -> None:
    made = ImageClassifier(image_encoder(vit.model), ["a", "b"])
    save_model(made, tmp_path / "m", processor=vit.processor, notes={"conditioned": {"model": "new:vit-tiny"}})
    judge = task(photos, original="new:vit-tiny")
    assert judge.evaluate(judge.build(load(tmp_path / "m"))) == pytest.approx({"drift": 0, "cosine": 100}, abs=1e-4)


# -- who may be the original, bad input --------------------------------------------------------------------------------


def test_who_may_be_the_original(vit: Loaded, photos: Path, tmp_path: Path) -> None:
    save_model(vit.model, tmp_path / "m", processor=vit.processor, notes={"conditioned": {"model": "new:vit-tiny"}})
    made = task(photos)
    made.build(load(tmp_path / "m"))
    assert made.notes() == [f"the original is new:vit-tiny, which {tmp_path / 'm'} was made from"]
    lost = save_model(vit.model, tmp_path / "l", processor=vit.processor, notes={"conditioned": {"model": "gone/away"}})
    with pytest.raises(InputError, match=r"l was made from gone/away, which cannot be read now .*task.original=MODEL"):
        task(photos).build(load(lost))
    quantized = quantize(vit.model, "w4a4", calibration=[{"pixel_values": torch.zeros(1, 3, 32, 32)}])
    with pytest.raises(InputError, match=r"is quantized, so it cannot be its own original; .*task.original=MODEL"):
        task(photos).build(replace(vit, model=quantized))
    other = load("new:vit-cifar-small")
    with pytest.raises(InputError, match="cannot be compared with new:vit-tiny: they are models of different kinds"):
        task(photos, original="new:vit-tiny").build(other)
    assert vit.processor is not None
    with pytest.raises(InputError, match="new:vit-tiny and new:vit-tiny have different preprocessing"):
        task(photos, original="new:vit-tiny").build(replace(vit, processor=replace(vit.processor, mean=(0.1,) * 3)))
    with pytest.raises(InputError, match="cannot be compared"):
        task(photos, original="new:vit-tiny").build(replace(load("new:clip-tiny"), processor=vit.processor))


def test_a_text_model_is_told_so(encoder: Loaded, photos: Path) -> None:
    with pytest.raises(InputError, match="BertModel does not read images; load a vision model"):
        task(photos).build(encoder)
    with pytest.raises(InputError, match="LlavaModel does not read images"):
        task(photos).build(load("new:llava-tiny"))


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "holds no images .*; it holds no files"),
        ({"a.txt": b"one\ntwo"}, {}, "holds no images .*; it holds a.txt"),
        ({"a.png": b"x", "b.png": b"y"}, {}, "too few different images for a"),
        ({"a.png": b"x"}, {"heldout": 0}, "at least 1 image"),
        ({"a.png": b"x"}, {"features": -1.0}, "are weights, one of them at least above 0"),
        ({"a.png": b"x"}, {"scores": -1.0}, "scores is a weight"),
        ({"a.parquet": b"x"}, {}, "cannot read .*a.parquet as Parquet"),
    ],
)
def test_bad_input(tmp_path: Path, files: dict[str, bytes], options: dict[str, Any], message: str) -> None:
    pytest.importorskip("pyarrow")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        task(tmp_path, **options)


def test_images_none_of_which_can_be_read(vit: Loaded, tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
    with pytest.raises(InputError, match=r"none of the \d+ images of train can be read"):
        task(tmp_path).build(vit)


# -- images or texts? --------------------------------------------------------------------------------------------------


def test_a_pile_is_of_images_or_of_texts(tmp_path: Path) -> None:
    def pile(*files: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        return folder

    assert holds_images("datasets:NAME") and holds_images(pile("a.PNG") / "a.PNG")
    assert holds_images(pile("x/y/a.jpg", "README.md")) and holds_images(pile("a.jpg", "metadata.jsonl"))
    assert holds_images(pile("x/a.jpg", "x/captions.txt")), "texts are not looked for below the folder"
    assert not holds_images(pile("a.txt")) and not holds_images(pile("metadata.jsonl"))
    with pytest.raises(InputError, match="images and texts; say which: --task unlabelled-images or"):
        holds_images(pile("a.txt", "b.jpg"))
    with pytest.raises(InputError, match="neither texts .* nor images .*; it holds a.md"):
        holds_images(pile("a.md"))
    with pytest.raises(InputError, match="no folder or file"):
        holds_images(tmp_path / "none")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert holds_images(make_parquet(tmp_path / "images" / "a.parquet", 1).parent)
    (tmp_path / "texts").mkdir()
    parquet.write_table(arrow.table({"text": ["a", "b"]}), tmp_path / "texts" / "a.parquet")
    assert not holds_images(tmp_path / "texts")


# -- the command line --------------------------------------------------------------------------------------------------


def values(path: Path) -> dict[str, float]:
    return {record["metric"]: record["value"] for record in json.loads(path.read_text())["records"]}


@pytest.mark.parametrize("name", ["vit-tiny", "clip-tiny"])
def test_from_condition_to_export(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "photos")
    Path("photos/bad.jpg").write_bytes(b"no image")
    model, notes = f"new:{name}", tmp_path / "out.json"
    steps = ("--steps", "3", "-o", "train.batch_size=8", "-o", "train.lr=1e-3")
    assert main(["condition", model, "--objective", "distill", "--data", "photos", *steps, "--out", "c"]) == 0
    assert "bad.jpg: not an image" in capsys.readouterr().out
    judge = ("--task", "unlabelled-images", "--data", "photos", "-q")
    assert main(["evaluate", "c", *judge, "--json", str(notes)]) == 0
    better = {r["metric"]: r["higher_is_better"] for r in json.loads(notes.read_text())["records"]}
    assert better["cosine"] and not better["drift"]
    conditioned = values(notes)
    assert conditioned["cosine"] > 90 and conditioned["drift"] > 0
    kind = type(load(model).model)
    assert type(load("c").model) is kind
    assert type(kind.from_pretrained("c")) is kind, "transformers reads it, too"  # type: ignore[attr-defined]
    Path("photos/bad.jpg").unlink()
    assert main(["audit", "c", "--data", "photos", "-q"]) == 0
    assert main(["quantize", "c", "--spec", "w8a8", "--data", "photos", "--out", "plain", "-q"]) == 0
    assert main(["quantize", "c", "--spec", "w8a8", *judge, "--out", "w8a8"]) == 0
    for folder in ("plain", "w8a8"):
        assert main(["evaluate", folder, *judge, "--json", str(notes)]) == 0
        assert values(notes)["cosine"] == pytest.approx(conditioned["cosine"], abs=1)
    if name == "clip-tiny":
        assert main(["evaluate", "plain", "--task", "zero-shot", "--data", "photos", "-q"]) == 0
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", "w8a8", *judge, "--out", "m.onnx", "--no-time"]) == 0
    files = {"m.onnx"} if name == "vit-tiny" else {"m.image.onnx", "m.text.onnx"}
    assert {file.name for file in tmp_path.glob("*.onnx")} == files


def test_the_command_names_what_is_wrong(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*arguments: str) -> str:
        assert main(["condition", *arguments, "--objective", "distill", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("s2d: ") and error.count("\n") == 1
        return error

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n".join(f"text {number}" for number in range(200)))
    texts, images = str(tmp_path / "texts"), str(photos)
    assert "new:vit-tiny comes without a tokenizer" in says("new:vit-tiny", "--data", texts)
    assert "does not read images" in says("new:llama-tiny", "--data", images)
    assert "is a model of images and texts" in says("new:clip-tiny", "--data", texts)
    assert "holds no images" in says("new:vit-tiny", "--data", texts, "--task", "unlabelled-images")
    assert "two towers" in says("new:clip-tiny", "--data", images, "--blockwise", "2", "--steps", "1")
    shutil.copy(photos / "cat" / "0.png", texts)
    assert "say which: --task" in says("new:vit-tiny", "--data", texts)


def test_block_by_block(photos: Path, tmp_path: Path) -> None:
    steps = ("--steps", "2", "--blockwise", "2", "-o", "train.batch_size=8", "-q", "--out", str(tmp_path / "out"))
    assert main(["condition", "new:vit-tiny", "--objective", "distill", "--data", str(photos), *steps]) == 0
    judge = task(photos, original="new:vit-tiny")
    assert judge.evaluate(judge.build(load(tmp_path / "out")))["cosine"] > 90
