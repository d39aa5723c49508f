"""The gate's control, and copies that share their weights."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from s2d.errors import InputError
from s2d.export import example_of, gate
from s2d.export.copies import shared_copy
from s2d.export.gate import Check, ExportReport, judge_task, perturbed
from s2d.tasks import Task


class Net(nn.Module):
    """Two Linears with one weight, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.norm(x)))


def test_a_shared_copy_holds_no_second_weights_and_leaves_the_model_alone() -> None:
    model = Net().train()
    copied = shared_copy(model)
    assert copied.first.weight.data_ptr() == model.first.weight.data_ptr()  # type: ignore[union-attr,operator]
    assert copied.first.weight is copied.second.weight and not copied.training and model.training  # type: ignore[union-attr]
    assert not any(each.requires_grad for each in copied.parameters())
    assert all(each.requires_grad for each in model.parameters())
    before = model.norm.weight.detach().clone()
    moved = perturbed(model, 1e-2)
    torch.testing.assert_close(moved.norm.weight, before * 1.01)  # type: ignore[union-attr,arg-type]
    assert torch.equal(model.norm.weight, before)


class Scored:
    """A task whose scores are given: the simulated model's, the file's, then those of the perturbed ones."""

    primary = "accuracy"

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def evaluate(self, model: nn.Module, **_: Any) -> dict[str, float]:
        return {"accuracy": self.scores.pop(0)}


@pytest.mark.parametrize(
    ("scores", "left", "passes"),
    [
        ((70.0, 70.2, 70.0, 0.0, 0.0), 2, True),  # one perturbation settles it
        ((70.0, 70.6, 70.1, 69.8, 0.0), 1, True),  # 0.3 + 2 * 0.2
        ((70.0, 71.0, 70.1, 69.9, 70.1), 0, False),
    ],
)
def test_the_model_is_perturbed_until_it_is_settled(scores: tuple[float, ...], left: int, passes: bool) -> None:
    task, report = Scored(*scores), ExportReport("m.onnx", "w4a8", "rtn", 0)
    judge_task(report, Net(), Net(), cast(Task, task), Check(batch_size=4))
    assert len(task.scores) == left and report.passed == passes
    assert report.parity["simulated"] == 70.0 and abs(report.parity["perturbed"] - 70.0) == pytest.approx(
        max(abs(each - 70.0) for each in scores[2 : 5 - left])
    )


def test_what_is_told_about_files_that_onnxruntime_does_not_run() -> None:
    report = ExportReport("m.pte", "w4a8", "rtn", 8, file_mb=10.0, fp32_mb=60.0, about=["the multiply: somebody's"])
    report.latency_ms = {"executorch": {"torch": 30.0, "file": 10.0}}
    disk, multiply, speed = report.label
    assert "6.0 times smaller" in disk and multiply == "the multiply: somebody's"
    assert speed.endswith("executorch 10.0 ms, 3.00 times as fast as torch") and gate.POINTS == 0.3


def test_windows_of_one_row_become_an_example_of_two() -> None:
    window = {"input_ids": torch.tensor([[3, 1, 2, 4]])}
    assert torch.equal(example_of([window, window])["input_ids"], torch.tensor([[3, 1], [2, 4]]))
    odd = {"input_ids": torch.tensor([[3, 1, 2]])}
    assert torch.equal(example_of([odd])["input_ids"], torch.tensor([[3, 1, 2], [3, 1, 2]]))
    pair = {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    assert example_of([window, pair])["input_ids"] is pair["input_ids"]
    with pytest.raises(InputError, match="no example"):
        example_of([])
