"""Quantization-aware training: what it learns, its schedule, and that it works in anybody's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.quant.tiny_models import Case, PlainTransformer
from torch import Tensor, nn

from s2d import quant
from s2d.decay.spectral_decay import SelectiveSpectralDecay
from s2d.errors import InputError
from s2d.quant.distillation import Distiller, principal_directions
from s2d.quant.numerics.lsq import LearnedQuantizer
from s2d.quant.numerics.oscillation import FIRST_THRESHOLD, LAST_THRESHOLD, Oscillations, threshold_at
from s2d.quant.qat import (
    QATSchedule,
    finish_qat,
    learned_parameters,
    learned_weights,
    prepare_qat,
    qat_parameters,
)

DIM = 16


def data(seed: int = 0, rows: int = 96) -> tuple[Tensor, Tensor]:
    """Sequences and a class that depends on them through a random network, with outliers in one channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, DIM, generator=generator)
    x[..., 3] *= 4
    readout = torch.randn(DIM, 5, generator=torch.Generator().manual_seed(9))
    return x, (x.tanh().mean(1) @ readout).argmax(1)


@pytest.fixture(scope="module")
def trained() -> PlainTransformer:
    """A tiny transformer that has learned its task."""
    torch.manual_seed(0)
    model, (x, y) = PlainTransformer(dim=DIM), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def calibration() -> list[dict[str, Tensor]]:
    return [{"x": data()[0][:32]}]


def loop(
    model: nn.Module,
    steps: int = 60,
    teacher: nn.Module | None = None,
    decay: dict[str, Any] | None = None,
    **schedule: Any,
) -> QATSchedule:
    """A plain training loop."""
    x, y = data()
    optimizer = torch.optim.AdamW(qat_parameters(model, lr=1e-3, step_lr=3e-3))
    course = QATSchedule(model, optimizer, steps=steps, **schedule)
    spectral = None if decay is None else SelectiveSpectralDecay(model, optimizer, **decay)
    distiller = None if teacher is None else Distiller(model, teacher, calibration())
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if distiller is not None:
            loss = loss + distiller.loss()
        loss.backward()
        optimizer.step()
    for part in (spectral, distiller):
        if part is not None:
            part.remove()
    model.eval()
    return course


@torch.no_grad()
def task_loss(model: nn.Module) -> float:
    x, y = data()
    return F.cross_entropy(model(x), y).item()


def test_preparing_changes_nothing_yet(case: Case) -> None:
    before = copy.deepcopy(case.model.state_dict())
    ptq = quant.quantize(case.model, "w4a4", calibration=case.batches, observer="mse")
    student = prepare_qat(case.model, "w4a4", calibration=case.batches)
    assert torch.equal(case.output(student), case.output(ptq))
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    assert set(ptq.state_dict()) <= set(student.state_dict())
    learned = [any(isinstance(module, LearnedQuantizer) for module in model.modules()) for model in (student, ptq)]
    assert learned == [True, False]
    finished = finish_qat(student)
    assert torch.equal(case.output(finished), case.output(ptq))
    assert set(finished.state_dict()) == set(ptq.state_dict())
    quant.remove(finished)
    assert torch.equal(case.output(finished), case.output())


def test_every_range_and_every_weight_gets_a_gradient(case: Case) -> None:
    student = prepare_qat(case.model, "w4a4", calibration=case.batches).train()
    case.output(student).square().mean().backward()
    for name, module in student.named_modules():
        if isinstance(module, LearnedQuantizer):
            assert module.log_step.grad is not None and bool(module.log_step.grad.isfinite().all()), name
            assert isinstance(module, LearnedQuantizer) and module.log_step.grad.abs().sum() > 0, name
    for site, _, weight in learned_weights(student):
        assert weight.grad is not None and weight.grad.abs().sum() > 0, site.name


def test_training_beats_rounding_at_three_bits(trained: PlainTransformer) -> None:
    rounded = quant.quantize(trained, "w3a3", calibration=calibration())
    best = quant.quantize(trained, "w3a3", calibration=calibration(), observer="mse")
    student = prepare_qat(trained, "w3a3", calibration=calibration())
    loop(student)
    finish_qat(student)
    full, after = task_loss(trained), task_loss(student)
    assert full < after < 0.6 * min(task_loss(rounded), task_loss(best))


def test_a_finished_model_is_stored_and_read_to_the_bit(trained: PlainTransformer, tmp_path: Path) -> None:
    student = prepare_qat(trained, "w4a4", calibration=calibration())
    loop(student, steps=5)
    with pytest.raises(InputError, match="still trained; call finish_qat first"):
        quant.save(student, tmp_path)
    finish_qat(student)
    quant.save(student, tmp_path)
    restored = quant.load(tmp_path, PlainTransformer(dim=DIM))
    assert quant.record(restored).method == "qat"
    x, _ = data()
    assert torch.equal(restored.eval()(x), student(x))


def test_ranges_move_until_they_are_held_and_have_their_own_rate(trained: PlainTransformer) -> None:
    student = prepare_qat(trained, "w4a4", calibration=calibration())
    groups = qat_parameters(student, lr=1e-3, step_lr=5e-3, weight_decay=0.1)
    ranges = {id(p) for p in learned_parameters(student)}
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0), (5e-3, 0.0)]
    assert {id(p) for p in groups[2]["params"]} == ranges and all(p.ndim >= 2 for p in groups[0]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(student.parameters()))
    x, y = data()
    optimizer = torch.optim.AdamW(groups)
    course = QATSchedule(student, optimizer, steps=10, freeze=0.4)
    seen = []
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
        weights = [weight.detach().clone() for _, _, weight in learned_weights(student)]
        seen.append(([p.detach().clone() for p in learned_parameters(student)], weights))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(old[0], new[0], strict=True))
        for old, new in zip(seen, seen[1:], strict=False)
    ]
    assert moved == [True] * 5 + [False] * 4
    assert course.ranges_held and not torch.equal(seen[-1][1][0], seen[-2][1][0])


def test_weights_are_whole_during_the_warm_up(trained: PlainTransformer) -> None:
    student = prepare_qat(trained, "w3a3", calibration=calibration())
    activations = prepare_qat(trained, "w16a3", calibration=calibration())
    x, y = data()
    optimizer = torch.optim.AdamW(qat_parameters(student))
    QATSchedule(student, optimizer, steps=4, warmup=0.5)
    assert torch.equal(student(x), activations(x))
    flags = []
    for _ in range(4):
        flags.append({q.enabled for _, q, _ in learned_weights(student)})
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
    assert flags == [{False}, {False}, {True}, {True}]


def test_weights_kept_whole_to_the_end_are_fitted_when_finishing(trained: PlainTransformer) -> None:
    student = prepare_qat(trained, "w3a3", calibration=calibration())
    loop(student, steps=10, warmup=1.0)
    plain = {name: p.detach().clone() for name, p in student.named_parameters() if name.endswith("fc1.weight")}
    finish_qat(student)
    for name, weight in plain.items():
        module = student.get_submodule(name.removesuffix(".weight"))
        error = (module.weight_quantizer(module.weight) - weight).square().mean()
        assert 0 < error < 0.2 * weight.square().mean()
        assert torch.equal(module.weight, weight)


def test_distillation_is_the_distance_it_says(trained: PlainTransformer) -> None:
    student = prepare_qat(trained, "w3a3", calibration=calibration()).train()
    distiller = Distiller(student, trained, calibration(), variance=1.0)
    x, _ = data()
    x = x[:32]
    output = student(x)
    found = distiller.loss()
    features: dict[str, Tensor] = {}
    for name, model in (("s", student), ("t", trained)):
        hook = model.blocks[1].register_forward_hook(lambda _, __, out, name=name: features.update({name: out}))
        model(x)
        hook.remove()

    def share(a: Tensor, b: Tensor) -> Tensor:
        rows = b.flatten(0, -2)
        return (a - b).square().sum(-1).mean() / (rows - rows.mean(0)).square().sum(-1).mean()

    expected = share(output, trained(x)) + share(features["s"], features["t"])
    assert torch.allclose(found, expected, rtol=1e-4)
    assert found > 0.05
    student.eval()
    student(x)
    with pytest.raises(InputError, match="has not run in training mode"):
        Distiller(student, trained, calibration()).loss()


def test_distillation_keeps_the_student_near(trained: PlainTransformer) -> None:
    x, _ = data()
    distances = []
    for teacher in (None, trained):
        student = prepare_qat(trained, "w3a3", calibration=calibration())
        loop(student, steps=30, teacher=teacher)
        distances.append((student(x) - trained(x)).square().mean().item())
    assert distances[1] < 0.8 * distances[0], distances


def test_principal_directions_hold_their_share() -> None:
    torch.manual_seed(0)
    h = torch.randn(500, 100, dtype=torch.float64) * torch.logspace(0, -3, 100) + 3.0
    mean, moment = h.mean(0), h.mT @ h / len(h)
    for variance in (0.3, 0.9, 1.0):
        P = principal_directions(moment, mean, variance)
        kept = ((h - mean) @ P).square().sum() / (h - mean).square().sum()
        assert kept >= variance - 1e-9 and (P.shape[1] % 32 == 0 or P.shape[1] == 100)
        assert torch.allclose(P.mT @ P, torch.eye(P.shape[1], dtype=torch.float64), atol=1e-9)


def test_padded_tokens_do_not_count_in_distillation(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    student = prepare_qat(case.model, "w4a4", calibration=case.batches).train()
    distiller = Distiller(student, case.model, case.batches)
    batch = dict(case.batches[0])
    student(**batch)
    args, kwargs, output, features = distiller._calls[0]
    losses = []
    for shift in (0.0, 100.0):
        padded = batch["attention_mask"][..., None] == 0
        changed = {name: feature + shift * padded for name, feature in features.items()}
        distiller._calls = [(args, kwargs, output.last_hidden_state + shift * padded, changed)]
        losses.append(distiller.loss().item())
    assert losses[0] == pytest.approx(losses[1]) and losses[0] > 0


# -- oscillation -------------------------------------------------------------------------------------------------------


def test_a_weight_that_flips_is_frozen_at_its_mean_and_others_are_not() -> None:
    flips, steady, rising = [], [], []
    watched = Oscillations(torch.tensor([0.0, 2.0, 0.0]))
    for step in range(40):
        codes = torch.tensor([1.0 if step % 3 else 0.0, 2.0, float(step // 8)])
        held = watched.update(codes, threshold=0.1)
        flips.append(bool(watched.frozen[0]))
        steady.append(bool(watched.frozen[1]))
        rising.append(bool(watched.frozen[2]))
    assert flips[-1] and not any(steady) and not any(rising)
    assert held[0] in (0.0, 1.0) and watched.codes[1] == 2.0
    assert flips == sorted(flips), "what is frozen stays so"


def test_the_threshold_falls_along_a_cosine() -> None:
    assert threshold_at(0.0) == FIRST_THRESHOLD and threshold_at(1.0) == pytest.approx(LAST_THRESHOLD)
    assert threshold_at(0.5) == pytest.approx((FIRST_THRESHOLD + LAST_THRESHOLD) / 2)


def test_frozen_weights_stay_on_their_code_in_training(trained: PlainTransformer) -> None:
    student = prepare_qat(trained, "w3a3", calibration=calibration())
    optimizer = torch.optim.AdamW(qat_parameters(student, lr=1e-3))
    course = QATSchedule(student, optimizer, steps=30, oscillation=True)
    x, y = data()
    for step in range(30):
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
        if step == 10:
            for watched in course._watched.values():
                watched.frozen[0, :3] = True
    assert course.frozen > 0
    for site, quantizer, weight in learned_weights(student):
        frozen = course._watched[site.name].frozen
        assert bool(frozen[0, :3].all())
        assert torch.allclose(quantizer(weight)[frozen], weight[frozen], atol=1e-6)


# -- other people's loops ----------------------------------------------------------------------------------------------


def test_with_decay_on_the_same_weights(trained: PlainTransformer) -> None:
    student = prepare_qat(trained, "w4a4", calibration=calibration())
    optimizer = torch.optim.AdamW(qat_parameters(student))
    decay = SelectiveSpectralDecay(student, optimizer, refresh_every=2, outlier_ratio=1.5)
    plain = SelectiveSpectralDecay(trained, torch.optim.AdamW(trained.parameters()))
    assert [t.name for t in decay.targets] == [t.name for t in plain.targets]
    decay.remove()
    plain.remove()
    assert all(isinstance(student.get_submodule(t.module_name), (nn.Linear, nn.LayerNorm)) for t in decay.targets)
    quiet, decayed = copy.deepcopy(student), student
    loop(quiet, steps=12)
    loop(decayed, steps=12, decay={"refresh_every": 2, "outlier_ratio": 1.2, "strength": 0.1})
    assert not torch.equal(quiet.blocks[0].norm1.weight, decayed.blocks[0].norm1.weight)
    assert task_loss(finish_qat(decayed)) < float("inf")


def test_in_the_trainer_of_transformers(make: Callable[[str], Case], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    plain = transformers.BertForSequenceClassification(config)
    ids = torch.randint(50, (24, 9))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[1] % 3} for row in ids]
    batches = [{"input_ids": ids[:12], "attention_mask": torch.ones_like(ids[:12])}]
    student = prepare_qat(plain, "w3a3", calibration=batches)
    optimizer = torch.optim.AdamW(qat_parameters(student, lr=1e-3))
    course = QATSchedule(student, optimizer, steps=6, warmup=0.34)
    distiller = Distiller(student, plain, batches)
    losses: list[float] = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = F.cross_entropy(outputs.logits, labels) + distiller.loss()
        losses.append(total.item())
        return total

    before = [p.detach().clone() for p in learned_parameters(student)]
    settings = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(
        student, settings, train_dataset=rows, optimizers=(optimizer, None), compute_loss_func=loss
    ).train()
    assert course.step_count == 6 and len(losses) == 6 and all(q.enabled for _, q, _ in learned_weights(student))
    assert any(not torch.equal(a, b) for a, b in zip(before, learned_parameters(student), strict=True))
    quant.save(finish_qat(student), tmp_path / "saved")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: prepare_qat(m, "nvfp4", calibration=calibration()), "no range to learn"),
        (lambda m: prepare_qat(m, "w4a4", calibration=calibration(), start="max"), "choose observer or lsq"),
        (lambda m: qat_parameters(m), "call s2d.prepare_qat first"),
        (lambda m: finish_qat(m), "call s2d.prepare_qat first"),
        (lambda m: finish_qat(quant.quantize(m, "w4a4", calibration=calibration())), "call s2d.prepare_qat first"),
        (lambda m: prepare_qat(_prepared(m), "w4a4", calibration=calibration()), "quantized already"),
        (lambda m: _schedule(m, steps=0), "steps=0 must be a whole number"),
        (lambda m: _schedule(m, freeze=1.5), "freeze=1.5 is a share"),
        (lambda m: _schedule(m, whole=False), "make it with s2d.qat_parameters"),
        (lambda m: Distiller(m, m, calibration()), "keep a copy of it"),
        (lambda m: Distiller(m, nn.Linear(2, 2), calibration()), "must be the student's model"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    trained: PlainTransformer, call: Callable[[nn.Module], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(copy.deepcopy(trained))
    assert "\n" not in str(caught.value)


def _prepared(model: nn.Module) -> nn.Module:
    return prepare_qat(model, "w4a4", calibration=calibration())


def _schedule(model: nn.Module, *, whole: bool = True, **settings: Any) -> None:
    student = _prepared(model)
    parameters = qat_parameters(student) if whole else [student.head.weight]
    QATSchedule(student, torch.optim.AdamW(parameters), **{"steps": 10, **settings})


def test_the_start_of_lsq_sets_the_weights(trained: PlainTransformer) -> None:
    student = prepare_qat(trained, "w4a4", calibration=calibration(), start="lsq")
    for _, quantizer, weight in learned_weights(student):
        assert torch.allclose(quantizer.step, 2 * weight.abs().mean(1) / 7**0.5)
