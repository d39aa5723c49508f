"""Conditioning block by block: what is trained, on which tokens, and where an interrupted call goes on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.tiny_text import make_model
from torch import nn

from s2d.cli import main
from s2d.errors import InputError
from s2d.models import Loaded, load
from s2d.quant import quantize
from s2d.tasks import Task, create
from s2d.training import blockwise
from s2d.training.blockwise import condition_blocks, relative_error
from s2d.training.train_settings import TrainSettings

LINES = [
    f"the {a} hammer and {b} robin {c}" for a in ("old", "new", "good") for b in "abcdefghij" for c in "abcdefghij"
]
SETTINGS = TrainSettings(steps=12, batch_size=8, lr=1e-3, weight_decay=0.0)


@pytest.fixture()
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(LINES))
    return tmp_path / "texts.txt"


@pytest.fixture()
def encoder(tmp_path: Path) -> Loaded:
    return load(make_model(tmp_path / "tiny"))


@pytest.fixture()
def task(texts: Path, encoder: Loaded) -> Task:
    made = create("unlabelled-text", data=texts, max_length=12)
    made.prepare(encoder)
    return made


def with_outlier(model: nn.Module) -> str:
    """Let one channel of a norm that fc1 reads be 30 times as large as the others, and give its name."""
    name = "encoder.layer.0.attention.output.LayerNorm.weight"
    with torch.no_grad():
        model.get_parameter(name)[3] = 30.0
    return name


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_error_is_a_share_of_each_token_s_own_length() -> None:
    wanted = torch.tensor([[3.0, 4.0], [3000.0, 4000.0]])
    found = wanted + torch.tensor([[0.0, 1.0], [1000.0, 0.0]])
    assert relative_error(found, wanted).item() == pytest.approx((1 / 25 + 1e6 / 25e6) / 2)
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0.0


def test_without_decay_nothing_has_to_be_learned(encoder: Loaded, task: Task) -> None:
    before = copy.deepcopy(encoder.model)
    done = condition_blocks(encoder.model, task, SETTINGS, batches=3)
    assert done.steps == 2 * SETTINGS.steps == len(done.losses)
    assert max(done.losses) < 1e-10, "each block is its own teacher"
    worst = max((a - b).abs().max() for a, b in zip(before.parameters(), encoder.model.parameters(), strict=True))
    assert worst < 1e-6


def test_the_outlier_goes_and_the_function_stays(encoder: Loaded, task: Task) -> None:
    model = encoder.model
    name = with_outlier(model)
    original = copy.deepcopy(model).eval()
    settings = SETTINGS.model_copy(update={"steps": 150})
    done = condition_blocks(model, task, settings, batches=3, decay={"strength": 0.1, "refresh_every": 1})
    gain, others = model.get_parameter(name).abs(), original.get_parameter(name).abs()
    assert gain[3] < others[3] / 2
    assert name in {record["weight"] for record in done.history if record["selected"]}, "names are those of the model"
    before = {n: p for n, p in original.named_parameters() if ".layer." not in n}
    assert before and all(torch.equal(p, model.get_parameter(n)) for n, p in before.items()), "blocks alone are trained"
    assert all(parameter.grad is None for parameter in model.parameters())

    shrunk = copy.deepcopy(original)
    with torch.no_grad():
        shrunk.get_parameter(name)[3] = gain[3]
    batch = next(task.batches("test", batch_size=100))
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted, found, untrained = (m(**batch).last_hidden_state[mask] for m in (original, model, shrunk))
    assert relative_error(found, wanted) < 0.5 * relative_error(untrained, wanted), "it has learned to do without"


def test_the_decay_sees_no_padding(encoder: Loaded, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    forward = blockwise._Alone.forward

    def watch(self: nn.Module, call: object, attention_mask: torch.Tensor | None) -> torch.Tensor:
        output = forward(self, call, attention_mask)  # pyright: ignore[reportArgumentType]
        assert attention_mask is not None and attention_mask.shape == output.shape[:2]
        if torch.is_grad_enabled():  # the decay traces a block once, without gradients
            seen.append((int(attention_mask.sum()), attention_mask.numel()))
        return output

    monkeypatch.setattr(blockwise._Alone, "forward", watch)
    texts = ["one", "the old hammer and the robin"] * 4
    assert encoder.tokenizer is not None
    ids = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    monkeypatch.setattr(task, "batches", lambda *_, **__: iter([{k: ids[k] for k in ("input_ids", "attention_mask")}]))
    condition_blocks(encoder.model, task, SETTINGS.model_copy(update={"steps": 1}), batches=1, decay={})
    real = int(ids["attention_mask"].sum())
    assert seen == [(real, ids["attention_mask"].numel())] * 2 and real < ids["attention_mask"].numel()


def test_an_interrupted_call_goes_on_behind_its_last_block(encoder: Loaded, task: Task, tmp_path: Path) -> None:
    with_outlier(encoder.model)
    whole, parts = copy.deepcopy(encoder.model), copy.deepcopy(encoder.model)
    options = {"batches": 2, "decay": {}, "seed": 3}
    condition_blocks(whole, task, SETTINGS, **options)

    def stop(step: int, loss: float) -> None:
        if step == SETTINGS.steps + 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        condition_blocks(parts, task, SETTINGS, **options, resume=tmp_path / "kept", on_step=stop)
    again = copy.deepcopy(encoder.model)
    done = condition_blocks(again, task, SETTINGS, **options, resume=tmp_path / "kept")
    assert len(done.losses) == SETTINGS.steps and done.steps == 2 * SETTINGS.steps, "the first block was there"
    assert same(again, whole) and not same(again, encoder.model)
    with pytest.raises(InputError, match="another training"):
        condition_blocks(copy.deepcopy(encoder.model), task, SETTINGS, batches=3, resume=tmp_path / "kept")


class Table(nn.Module):
    """A model of one part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50_000, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


def test_what_has_no_meaning_block_by_block(encoder: Loaded, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(match: str, model: nn.Module | None = None, decay: object = None, **settings: object) -> None:
        with pytest.raises(InputError, match=match):
            condition_blocks(model or encoder.model, task, TrainSettings(**settings), decay=decay)  # type: ignore[arg-type]

    refuse("train.minutes", minutes=1.0)
    refuse("train.distill", distill=1.0)
    refuse("train.check_every", check_every=3)
    refuse("decay.include", decay={"include": "*.query"})
    refuse("no blocks that repeat", Table())
    batches = [next(task.batches("train", batch_size=8))]
    refuse("quantized", quantize(copy.deepcopy(encoder.model), "w8a8", calibration=batches))
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse("without torchrun")


def test_the_command(encoder: Loaded, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    common = ["condition", encoder.source, "--data", str(texts), "--steps", "3", "-o", "train.batch_size=8"]
    common += ["-o", "task.max_length=24"]
    assert main([*common, "--objective", "distill", "--blockwise", "2", "--out", str(out)]) == 0
    assert "conditioned in 6 steps" in capsys.readouterr().out
    assert not (tmp_path / "out.training").exists(), "what was kept is gone when the model is there"
    assert type(load(out).model) is type(encoder.model)
    judge = ["evaluate", str(out), "--task", "unlabelled-text", "--data", str(texts), "-o", "task.max_length=24", "-o"]
    assert main([*judge, f"task.original={encoder.source}", "-q"]) == 0
    assert main([*common, "--blockwise", "2", "--out", str(tmp_path / "other")]) == 2
    assert "add --objective distill" in capsys.readouterr().err
