"""Repair: a conditioned model stays near its teacher without a label, and both kinds end quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_text import make_model, make_task

from s2d.experiments.auto.candidates import Candidate
from s2d.experiments.auto.repair import repaired, without_labels
from s2d.experiments.auto.simulation import Simulation
from s2d.models import load
from s2d.quant import QuantSpec, is_quantized
from s2d.tasks import Task
from s2d.tasks.base import Batch

pytest.importorskip("accelerate")
SPEC = QuantSpec.parse({"base": "w4a8", "attention": False})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Task]:
    folder = tmp_path_factory.mktemp("repair")
    loaded = load(make_model(folder / "bert"))
    task = make_task(folder / "words", loaded)
    model = task.build(loaded).eval()
    gain = model.get_parameter("encoder.embeddings.LayerNorm.weight")
    gain.data[5] = 40.0  # an outlier for the decay
    return model, task


def test_a_task_without_labels_has_no_loss_and_the_task_itself_keeps_its_own(
    parts: tuple[torch.nn.Module, Task],
) -> None:
    model, task = parts
    batch: Batch = next(iter(task.batches("train", batch_size=8)))
    blind = without_labels(task)
    loss = blind.loss(model, batch)
    assert loss.item() == 0 and loss.requires_grad and task.loss(model, batch).item() > 0.1
    assert blind.fingerprint == task.fingerprint and not blind.adds_head and task.adds_head


@pytest.mark.parametrize("kind", ["conditioned", "trained"])
def test_weights_are_trained_and_quantized_and_the_model_itself_is_left_alone(
    parts: tuple[torch.nn.Module, Task], kind: str, tmp_path: Path
) -> None:
    model, task = parts
    before = {name: value.clone() for name, value in model.state_dict().items()}
    candidate = Candidate(SPEC, "rtn", 0, kind, **{kind: 0.01})
    steps: list[int] = []
    made = repaired(candidate, Simulation(model, task, 0), 0, tmp_path / "state", lambda step, loss: steps.append(step))
    assert is_quantized(made) and steps
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = made.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items()), "weights were trained"
    with torch.no_grad():
        batch = task.inputs(next(iter(task.batches("validation", batch_size=8))))[0]
        assert (made(**batch) - model(**batch)).norm() < 0.7 * model(**batch).norm()
