"""Staying the original: what is read, the distances against plain formulas, and who may be the original."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from s2d.data.splits import split_by_content
from s2d.data.texts import read_texts
from s2d.decay.budget import WITHOUT_LABELS
from s2d.errors import InputError
from s2d.models import Loaded, save_model
from s2d.tasks import SPLITS, Split, Task, create
from s2d.tasks.evaluation import evaluate
from s2d.tasks.teacher import divergence, variance_share
from s2d.training.loop import decay_for, train
from s2d.training.train_settings import TrainSettings

LINES = [f"w{i % 60} w{i % 7} w{i * i % 11} " + "w1 " * (i % 4) for i in range(400)]


@pytest.fixture()
def data(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "all.txt").write_text("\n".join([*LINES, "", LINES[0]]))
    return tmp_path / "texts"


@pytest.fixture()
def task(data: Path) -> Task:
    return create("unlabelled-text", data=data, max_length=12)


def disturbed(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter += 0.05 * noise
    return model


def test_texts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" one \n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"id": 1, "text": "three"}\n{"id": 2, "text": null}\n')
    (tmp_path / "c.md").write_text("not read")
    assert read_texts(tmp_path) == ["one", "two", "three"]
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"n": [1, 2], "body": ["four", " "]}), tmp_path / "d.parquet")
    assert read_texts(tmp_path / "d.parquet", "body") == ["four"]


def test_a_text_has_one_split_whatever_stands_beside_it() -> None:
    def split(texts: list[str]) -> dict[Split, list[str]]:
        return split_by_content(((text, text.encode()) for text in texts), 10_000, 10_000, what="text", shown="here")

    texts = [f"text {i}" for i in range(4000)]
    whole = split([*texts, *texts])
    assert sorted(sum(whole.values(), [])) == sorted(texts), "each once"
    assert 140 < len(whole["validation"]) < 260 and 140 < len(whole["test"]) < 260
    half = split(texts[::-2])
    assert all(set(half[name]) <= set(whole[name]) for name in SPLITS)


def test_an_encoder_s_measures_are_those_of_the_formulas(encoder: Loaded, task: Task) -> None:
    model = task.build(encoder)
    assert task.evaluate(model)["drift"] == pytest.approx(0.0, abs=1e-6)
    original = task.build(encoder).eval()
    disturbed(model)
    batch = next(task.batches("test", batch_size=1000))
    model.eval()
    with torch.no_grad():
        found, wanted = model(**batch), original(**batch)
        mask = batch["attention_mask"].bool()
        h_s, h_t = (m.encoder(**batch).last_hidden_state[mask] for m in (model, original))  # type: ignore[operator]
    cosine = (found * wanted).sum(1).mean()  # unit vectors
    assert evaluate(model, task, batch_size=3) == pytest.approx(
        {"cosine": 100 * cosine.item(), "drift": 100 - 100 * cosine.item()}, abs=1e-4
    )
    share = ((h_s - h_t) ** 2).sum() / ((h_t - h_t.mean(0)) ** 2).sum()
    assert task.loss(model, batch).item() == pytest.approx((10 * (1 - cosine) + share).item(), rel=1e-4)
    assert variance_share(h_t.mean(0).expand_as(h_t), h_t).item() == pytest.approx(1.0, rel=1e-5)


def test_a_language_model_s_measures_are_those_of_the_formulas(decoder: Loaded, task: Task) -> None:
    model = task.build(decoder)
    assert task.evaluate(model) == pytest.approx({"drift": 0.0, "agreement": 100.0}, abs=1e-5)
    disturbed(model)
    batch = next(task.batches("test", batch_size=1000))
    with torch.no_grad():
        mask = batch["attention_mask"].bool()
        found, wanted = (m(**batch).logits[mask].log_softmax(-1) for m in (model, decoder.model))
    kl = F.kl_div(found, wanted, log_target=True, reduction="batchmean").item()
    same = 100 * (found.argmax(1) == wanted.argmax(1)).double().mean().item()
    assert kl > 1e-3
    assert task.evaluate(model, batch_size=3) == pytest.approx({"drift": kl, "agreement": same}, rel=1e-4)
    assert task.loss(model, batch).item() == pytest.approx(kl, rel=1e-4)


def test_the_decay_has_a_budget_unless_one_sets_its_strength(encoder: Loaded, task: Task) -> None:
    """Without labels training cannot pay for a decay: its share is limited, and an outlier falls more slowly."""
    published = replace(encoder, model=copy.deepcopy(encoder.model))
    outlier = next(name for name, _ in published.model.named_parameters() if name.endswith("output.LayerNorm.weight"))
    with torch.no_grad():
        published.model.get_parameter(outlier)[3] = 40.0
    ends: dict[str, tuple[float, float, float]] = {}
    for name, given in {
        "default": {},
        "none": {"budget": 0.0},
        "by hand": {"strength": 0.03},
        "no decay": None,
    }.items():
        model = task.build(published)
        gain = model.get_parameter(f"encoder.{outlier}")
        settings = TrainSettings(steps=30, batch_size=16, lr=1e-4)
        done = train(model, task, settings, decay=given if given is None else {"outlier_ratio": 3.0, **given})
        paces = [each.get("pace", 1.0) for each in done.history if each.get("selected")]
        ends[name] = gain[3].item(), min(paces, default=1.0), done.losses[-1]
    assert ends["none"] == ends["by hand"] and ends["none"][1] == 1.0
    assert ends["none"][0] < ends["default"][0] < ends["no decay"][0], ends
    assert ends["default"][1] < 0.9 and ends["default"][2] < ends["none"][2], ends


def test_whose_decay_has_a_budget(task: Task, tmp_path: Path) -> None:
    assert decay_for(task, {"refresh_every": 3}) == {"budget": WITHOUT_LABELS, "refresh_every": 3}
    assert decay_for(task, {"preset": "default"}) == {"budget": WITHOUT_LABELS, "preset": "default"}
    for given in ({"budget": 0.0}, {"strength": 0.1}, {"preset": "paper"}, {"baseline": "muon"}, None):
        assert decay_for(task, given) == given
    (tmp_path / "train.txt").write_text("\n".join(LINES))
    for loss, expected in (("text", {}), ("original", {"budget": WITHOUT_LABELS})):
        assert decay_for(create("language-modeling", data=tmp_path, loss=loss), {}) == expected


def test_the_gradient_in_chunks_is_the_gradient() -> None:
    torch.manual_seed(0)
    head, other = torch.nn.Linear(8, 30), torch.nn.Linear(8, 30)
    hidden, wanted = torch.randn(50, 8, requires_grad=True), torch.randn(50, 8)
    sizes: list[int] = []
    head.register_forward_hook(lambda _, args, output: sizes.append(output.shape[1]))
    divergence(hidden, wanted, head, other, chunk=16)[0].mean().backward()
    assert hidden.grad is not None and head.weight.grad is not None
    found = hidden.grad.clone(), head.weight.grad.clone()
    assert max(sizes) == 16 and len(sizes) == 8, "never more than a chunk, and again for the gradient"
    hidden.grad, head.weight.grad = None, None
    target = other(wanted).log_softmax(-1).detach()
    F.kl_div(head(hidden).log_softmax(-1), target, log_target=True, reduction="batchmean").backward()
    assert torch.allclose(found[0], hidden.grad, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(found[1], head.weight.grad, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_loss_trains_the_model_and_not_the_original(kind: str, request: pytest.FixtureRequest, task: Task) -> None:
    loaded: Loaded = request.getfixturevalue(kind)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    model = disturbed(task.build(loaded))
    start = task.evaluate(model, "validation")["drift"]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in task.batches("train", batch_size=16):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert task.evaluate(model, "validation")["drift"] < start / 2
    assert all(torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_loss_of_a_model_that_several_processes_train(
    kind: str, request: pytest.FixtureRequest, task: Task, tmp_path: Path
) -> None:
    model = disturbed(task.build(request.getfixturevalue(kind))).eval()  # no dropout
    batch = next(task.batches("train", batch_size=8))
    expected = task.loss(model, batch)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    distributed, store = torch.distributed, torch.distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        found = task.loss(wrapped, batch)
        found.backward()
    finally:
        distributed.destroy_process_group()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6) and found.item() > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_conditioned_model_is_not_its_own_original(encoder: Loaded, task: Task, tmp_path: Path) -> None:
    save_model(encoder.model, tmp_path / "m", tokenizer=encoder.tokenizer, notes={"conditioned": {"model": "x"}})
    source = Loaded(encoder.model, encoder.family, str(tmp_path / "m"), encoder.tokenizer, None, "0")
    for unknown in ({}, {"model": source.source}):
        source.notes = {"conditioned": unknown}
        with pytest.raises(InputError, match=r"m is conditioned, .*-o task.original=MODEL"):
            task.build(source)
    source.notes = {"conditioned": {"model": "no/such-model"}}
    with pytest.raises(InputError, match=r"m was made from no/such-model, which cannot be read now .*task.original="):
        task.build(source)
    base = save_model(encoder.model, tmp_path / "base", tokenizer=encoder.tokenizer)
    source.notes = {"conditioned": {"model": str(base)}}
    task.build(source)
    assert task.notes() == [f"the original is {base}, which {source.source} was made from"]
    named = create("unlabelled-text", data=tmp_path / "texts", max_length=12, original=str(tmp_path / "m"))
    assert named.evaluate(named.build(source))["cosine"] == pytest.approx(100.0)


def test_an_original_of_another_kind_is_refused(encoder: Loaded, decoder: Loaded, task: Task) -> None:
    task.build(encoder)
    with pytest.raises(InputError, match="cannot be compared with the original"):
        task.build(decoder)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "has no texts .*; it holds no files"),
        ({"a.csv": "text\nx"}, {}, "it holds a.csv"),
        ({"a.txt": " \n \n"}, {}, "only blanks"),
        ({"a.txt": "one\ntwo"}, {}, "too few different texts for a"),
        ({"a.jsonl": '{"a": "x", "b": "y"}'}, {}, "which column is the text\\? .*the columns are a, b"),
        ({"a.jsonl": '{"a": 3}'}, {}, "column 'a' holds int, not text"),
        ({"a.jsonl": '{"a": "x"}'}, {"column": "c"}, "has no column 'c'"),
        ({"a.txt": "one"}, {"max_length": 1}, "at least 2 tokens"),
        ({"a.txt": "one"}, {"heldout": 0}, "at least 1 text"),
        ({"a.txt": "one"}, {"embedding": -1.0}, "are weights, one of them at least above 0"),
        ({"a.txt": "one"}, {"embedding": 0, "features": 0}, "are weights, one of them at least above 0"),
    ],
)
def test_bad_input(tmp_path: Path, files: dict[str, str], options: dict[str, object], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        create("unlabelled-text", data=tmp_path, **options)


def test_text_that_is_no_utf8_and_a_place_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_texts(tmp_path)
    with pytest.raises(InputError, match="no folder or file"):
        read_texts(tmp_path / "none")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x"}) + "\n{")
    with pytest.raises(InputError, match="cannot read .* as JSON lines"):
        read_texts(tmp_path / "b.jsonl")
