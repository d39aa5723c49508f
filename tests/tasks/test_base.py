"""The register of tasks, and what every task has to keep to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tasks.test_retrieval import make_folder as captioned_images
from tests.tasks.test_visual_question_answering import make_folder as questioned_images
from tests.tiny_images import make_folders

from s2d.errors import InputError
from s2d.models import Loaded
from s2d.tasks import SPLITS, Task, create, tasks


def text_classification(folder: Path) -> Task:
    folder.mkdir()
    lines = [f"w{i % 7} w{i % 5} w{i % 3} {'w1 ' * (i % 4)},{'even' if i % 2 == 0 else 'odd'}" for i in range(60)]
    (folder / "all.csv").write_text("\n".join(["text,label", *lines]))
    return create("text-classification", data=folder / "all.csv", max_length=8)


def docstrings(folder: Path) -> Task:
    return create("docstrings", train=40, validation=12, test=12, packages=["stdlib"], document_length=24)


def language_modeling(folder: Path) -> Task:
    folder.mkdir()
    (folder / "all.txt").write_text("\n".join(f"w{i % 7} w{i % 11} w{i % 5}" for i in range(200)))
    return create("language-modeling", data=folder / "all.txt", window=16)


def image_classification(folder: Path) -> Task:
    return create("image-classification", data=make_folders(folder / "images", {"": 10}))


def zero_shot(folder: Path) -> Task:
    return create("zero-shot", data=make_folders(folder / "images", {"": 10}))


def unlabelled_text(folder: Path) -> Task:
    folder.mkdir()
    lines = [f"w{i % 60} w{i % 7} w{i % 5} {'w1 ' * (i % 4)}" for i in range(400)]
    (folder / "all.txt").write_text("\n".join(lines))
    return create("unlabelled-text", data=folder, max_length=8)


def unlabelled_images(folder: Path) -> Task:
    return create("unlabelled-images", data=make_folders(folder / "images", {"": 40}))


def retrieval(folder: Path) -> Task:
    words = ("a red thing", "something green", "blue all over")
    texts = {split: [words[n % 3] for n in range(size)] for split, size in SIZES.items()}
    return create("retrieval", data=captioned_images(folder, texts))


def visual_question_answering(folder: Path) -> Task:
    answers = {split: [("yes", "no")[n // 3 % 2] for n in range(size)] for split, size in SIZES.items()}
    data = questioned_images(folder, answers)
    return create("visual-question-answering", data=data, prompt="<image>{question}", max_answer=4)


def detection(folder: Path) -> Task:
    pytest.importorskip("pycocotools", reason="needs the extra s2d[detection]")
    from tests.tasks.test_detection import make_folder as boxed_images

    return create("detection", data=boxed_images(folder, 12))


SIZES = {"train": 32, "val": 9, "test": 9}
MAKERS = {
    "text-classification": text_classification,
    "docstrings": docstrings,
    "language-modeling": language_modeling,
    "image-classification": image_classification,
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "detection": detection,
    "visual-question-answering": visual_question_answering,
    "unlabelled-text": unlabelled_text,
    "unlabelled-images": unlabelled_images,
}
MODELS = {
    "language-modeling": "decoder",
    "image-classification": "vit",
    "zero-shot": "clip",
    "retrieval": "clip",
    "detection": "yolos",
    "visual-question-answering": "llava",
    "unlabelled-images": "vit",
}
WHOLE = tuple(MODELS)  # the model keeps its own outputs


def test_every_task_describes_itself_and_is_tested_here() -> None:
    assert set(tasks()) == set(MAKERS)
    assert all(line.endswith(".") and len(line) < 110 for line in tasks().values())


@pytest.mark.parametrize("name", MAKERS)
def test_contract(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    loaded: Loaded = request.getfixturevalue(MODELS.get(name, "encoder"))
    task = MAKERS[name](tmp_path / "a")
    assert task.name == name
    assert MAKERS[name](tmp_path / "b").fingerprint == task.fingerprint, "the data are the same each time"
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}

    model = task.build(loaded, seed=1)
    again = task.build(loaded, seed=1)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), "the same seed gives the same start"
    if name not in WHOLE:
        encoder = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
        assert all(torch.equal(encoder[key], value) for key, value in before.items())

    for split in SPLITS:
        batches = list(task.batches(split, batch_size=5))
        assert len(batches) == -(-task.sizes()[split] // 5)
        assert sum(len(next(iter(batch.values()))) for batch in batches) == task.sizes()[split]
        for batch in batches:
            for inputs in task.inputs(batch):
                mask = inputs.get("attention_mask")
                if mask is None:
                    continue
                assert mask.shape == inputs["input_ids"].shape
                assert name == "zero-shot" or mask.any(0).all(), "batches are cut to their longest row"
                assert mask.any(1).all(), "no row is empty"

    shuffled = [list(task.batches("train", batch_size=5, seed=seed, shuffle=True)) for seed in (1, 1, 2)]
    same = [all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(shuffled[0], shuffled[1], strict=True)]
    assert all(same)
    assert any(
        a[key].shape != b[key].shape or not torch.equal(a[key], b[key])
        for a, b in zip(shuffled[0], shuffled[2], strict=True)
        for key in a
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4 if name == "zero-shot" else 3e-3)
    losses = []
    for epoch in range(3):
        for batch in task.batches("train", batch_size=16, seed=epoch, shuffle=True):
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    epoch_losses = torch.tensor(losses).view(3, -1).mean(1)
    assert epoch_losses[-1] < epoch_losses[0], "it can be trained"
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())

    for mode in (True, False):
        model.train(mode)
        metrics = task.evaluate(model, "validation", batch_size=7)
        assert model.training is mode
        assert task.primary in metrics
    # A drift is 100 less 100 cosines near 1, whose rounding does not shrink with it.
    assert metrics == pytest.approx(task.evaluate(model, "validation", batch_size=3), rel=1e-4, abs=1e-7)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    broken = task.evaluate(model, "validation")[task.primary]
    assert broken == (0 if task.higher_is_better else float("inf")), "a broken model gets the worst mark"


@pytest.mark.parametrize("name", MAKERS)
def test_bad_use(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    task = MAKERS[name](tmp_path / "a")
    with pytest.raises(RuntimeError, match=r"call build\(loaded\)"):
        next(task.batches("train", batch_size=2))
    loaded: Loaded = request.getfixturevalue(MODELS.get(name, "encoder"))
    task.prepare(loaded)
    with pytest.raises(InputError, match="unknown split 'dev'; choose from train, validation, test"):
        next(task.batches("dev", batch_size=2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch size must be a positive whole number, not 0"):
        next(task.batches("train", batch_size=0))
    loaded.tokenizer = None
    if name not in ("image-classification", "detection", "unlabelled-images"):
        with pytest.raises(InputError, match=f"task {name} reads text, but .*tiny.* comes without a tokenizer"):
            MAKERS[name](tmp_path / "b").prepare(loaded)


def test_unknown_names_and_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown task 'docstring'; did you mean docstrings\?"):
        create("docstring")
    with pytest.raises(InputError, match="unknown task 'zzz'; choose from detection, docstrings, image-classification"):
        create("zzz")
    with pytest.raises(InputError, match="task docstrings has no option 'trian'; it has train, validation"):
        create("docstrings", trian=3)
    with pytest.raises(InputError, match="task text-classification needs the option 'data'"):
        create("text-classification")
