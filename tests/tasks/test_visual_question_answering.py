"""Answers against the model's own greedy words; scores by hand; a tiny model learns; what is wrong with questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_images import picture

from s2d import quant
from s2d.errors import InputError
from s2d.models import load, save_model
from s2d.tasks import create
from s2d.tasks.visual_question_answering import VisualQuestionAnswering
from s2d.tasks.vqa_metrics import Answer, normalized, score_answers, similarity

pytest.importorskip("PIL")
pytest.importorskip("transformers")
PROMPT = "<image>{question}"


def make_folder(path: Path, answers: dict[str, list[Any]]) -> Path:
    number = 0
    for split, given in answers.items():
        folder = path / split
        folder.mkdir(parents=True)
        lines = []
        for answer in given:
            (folder / f"{number}.png").write_bytes(picture(number))
            question = ("is it red?", "what?")[number % 2]
            lines.append(json.dumps({"file_name": f"{number}.png", "question": question, "answer": answer}))
            number += 1
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def answers(numbers: range) -> list[str]:
        return [("yes", "no", "no")[n % 3] if n % 2 == 0 else ("r", "g", "b")[n % 3] for n in numbers]

    texts = {"train": answers(range(12)), "val": answers(range(12, 15)), "test": answers(range(15, 20))}
    return make_folder(tmp_path_factory.mktemp("questions"), texts)


def task(data: Path, **options: Any) -> VisualQuestionAnswering:
    made = create("visual-question-answering", data=data, **{"prompt": PROMPT, "max_answer": 4, **options})
    assert isinstance(made, VisualQuestionAnswering)
    return made


def test_scores_by_hand() -> None:
    said = ["Yes.", "a cat", "no way", "two", "tabel"]
    right = [
        Answer(("yes",)),
        Answer(("dog", "cat")),
        Answer(("yes",)),
        Answer(("2",) * 4 + ("3",)),
        Answer(("table",)),
    ]
    found = score_answers(said, right)
    assert found["exact_match"] == pytest.approx(100 * 2 / 5)  # yes, 2; "cat" is not the most common one
    assert found["vqa_accuracy"] == pytest.approx(100 * (1 + 1 + 0 + 1 + 0) / 5)
    assert found["yes_no"] == 50 and found["yes_no_f1"] == pytest.approx(200 * 1 / 3)
    # Of ten people two said it: leaving one of them out 1/3, else 2/3 (Antol et al.).
    ten = Answer(("x",) * 2 + ("y",) * 8)
    assert score_answers(["x"], [ten])["vqa_accuracy"] == pytest.approx(100 * (2 / 3 * 8 + 1 / 3 * 2) / 10)


def test_similarity_is_levenshteins() -> None:
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("table", "tabel") == pytest.approx(1 - 2 / 5)
    assert similarity("abc", "xyz") == 0 and similarity("", "") == 1
    assert normalized("The Two, dogs!") == "2 dogs" and normalized("3.5 km.") == "3.5 km"


def test_answers_are_the_models_own_greedy_words(folder: Path) -> None:
    loaded, made = load("new:llava-tiny"), task(folder)
    model = made.build(loaded).eval()
    batch = next(made.batches("test", batch_size=3))
    said = made.answer(model, batch["pixels"], [made.rows["test"][row].cells[0] for row in batch["row"].tolist()])
    for number in range(3):
        ids = torch.tensor([made._prompt(made.rows["test"][number].cells[0])])
        assert int((ids == 260).sum()) == 16, "one token for each patch"
        words: list[int] = []
        for _ in range(4):
            with torch.no_grad():
                pixels = made.normalize(batch["pixels"][number : number + 1])
                word = int(loaded.model(input_ids=ids, pixel_values=pixels).logits[0, -1].argmax())
            if word == 3:
                break
            words.append(word)
            ids = torch.cat([ids, torch.tensor([[word]])], 1)
        assert said[number] == loaded.tokenizer.decode(words, skip_special_tokens=True)


def test_only_the_answer_and_its_end_are_learnt(folder: Path) -> None:
    loaded, made = load("new:llava-tiny"), task(folder)
    made.prepare(loaded)
    batch = next(made.batches("train", batch_size=2))
    learnt = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert loaded.tokenizer.decode(learnt[:-1]).strip() == "yes" and learnt[-1] == 3
    assert batch["input_ids"][0, -len(learnt) :].tolist() == learnt


def test_the_loss_is_that_of_all_logits(folder: Path) -> None:
    loaded, made = load("new:llava-tiny"), task(folder)
    model = made.build(loaded).eval()
    batch = next(made.batches("train", batch_size=4))
    logits = model(**made.inputs(batch)[0]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(made.loss(model, batch), expected, atol=1e-6)
    plain = model.forward
    model.forward = lambda logits_to_keep=0, **inputs: plain(**inputs)  # BLIP-2 takes the argument and gives all logits
    assert torch.allclose(made.loss(model, batch), expected, atol=1e-6)


def test_it_learns_is_quantized_and_saved(folder: Path, tmp_path: Path) -> None:
    loaded, made = load("new:llava-tiny"), task(folder)
    model = made.build(loaded)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(40):
        for batch in made.batches("train", batch_size=12, seed=epoch, shuffle=True):
            optimizer.zero_grad()
            made.loss(model, batch).backward()
            optimizer.step()
    score = made.evaluate(model.eval(), "train")
    assert score["vqa_accuracy"] > 80
    save_model(model, tmp_path / "m", tokenizer=loaded.tokenizer, processor=loaded.processor)
    again = load(tmp_path / "m")
    other = task(folder)
    assert again.family.name == "llava" and other.evaluate(other.build(again).eval(), "train") == score
    inputs = made.inputs(next(made.batches("train", batch_size=12)))
    sites = quant.planned(model, quant.QuantSpec.parse("w8a8"), inputs)
    kept = {site.module for site in sites if site.format is None}
    assert {"model.multi_modal_projector.linear_1", "lm_head"} <= kept
    assert any("vision_tower" in s.module and s.format for s in sites)
    assert any("language_model" in s.module and s.what == "probs" and s.format for s in sites)
    quantized = quant.quantize(model, "w8a8", calibration=inputs)
    assert abs(made.evaluate(quantized, "train")["vqa_accuracy"] - score["vqa_accuracy"]) < 20


def test_an_image_tower_can_come_from_a_trained_encoder(folder: Path, tmp_path: Path) -> None:
    encoder = load("new:vit-tiny?seed=3")
    save_model(encoder.model, tmp_path / "vit", processor=encoder.processor)
    model = load(f"new:llava-tiny?tower={tmp_path / 'vit'}").model
    own = model.get_submodule("model.vision_tower").state_dict()
    given = encoder.model.vit.state_dict()
    with pytest.raises(InputError, match="no image tower of this shape"):
        load(f"new:llava-cifar?tower={tmp_path / 'vit'}")
    shared = [name for name in given if name in own]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(own[name], given[name])


def test_bad_input_has_its_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs one <image>"):
        task(folder, prompt="{question}")
    with pytest.raises(InputError, match="load a LLaVA-type model"):
        task(folder).build(load("new:clip-tiny"))
    with pytest.raises(InputError, match="expected an answer"):
        task(make_folder(tmp_path, {"train": ["yes", None], "val": ["no"], "test": ["no"]}))
    loaded = load("new:llava-tiny")
    loaded.tokenizer.add_tokens(["x"])
    task(folder).prepare(loaded)  # a token more than the model's rows is usual
    loaded.tokenizer = type("Large", (), {"vocab_size": 30522, "__call__": lambda self, text: text})()
    with pytest.raises(InputError, match="30522 tokens and the model 261"):
        task(folder).build(loaded)
