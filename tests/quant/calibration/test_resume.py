"""Interrupted calibrations: what is kept, and that continuing ends where an uninterrupted call does, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quant.tiny_models import Case
from torch import nn

from s2d.errors import InputError
from s2d.models import fingerprint
from s2d.quant import quantize
from s2d.quant.calibration.resume import Snapshot, fingerprint_batches
from s2d.quant.ptq import gptq


def call(case: Case, folder: Path | None = None, **changed: Any) -> nn.Module:
    arguments: dict[str, Any] = {"calibration": case.batches, "method": "gptaq", "resume": folder, **changed}
    return quantize(arguments.pop("model", case.model), arguments.pop("spec", "w4a4"), **arguments)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Let the process be stopped at the ``after``-th rounding; returns the names of the layers that were rounded."""
    done: list[str] = []
    original = gptq._round_layer

    def stopping(layer: Any, *args: Any) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(layer.site.module)
        original(layer, *args)

    monkeypatch.setattr(gptq, "_round_layer", stopping)
    return done


def test_continued_is_the_same_to_the_bit(
    make: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("bert-sdpa")
    whole = call(case).state_dict()
    with monkeypatch.context() as patch:
        interrupt(patch, after=8)  # six layers a block: in the middle of the second
        with pytest.raises(KeyboardInterrupt):
            call(case, tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["0-encoder.layer.0.safetensors", "resume.json"]
    with monkeypatch.context() as patch:
        done = interrupt(patch, after=100)
        continued = call(case, tmp_path).state_dict()
    assert done and all(name.startswith("encoder.layer.1.") for name in done)
    assert whole.keys() == continued.keys()
    assert all(torch.equal(value, continued[key]) for key, value in whole.items())
    # A third call finds everything done.
    with monkeypatch.context() as patch:
        done = interrupt(patch, after=0)
        again = call(case, tmp_path).state_dict()
    assert not done and all(torch.equal(value, again[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spec": "w4a8"}, "another spec"),
        ({"observer": "mse"}, "another spec"),
        ({"method": "gptq"}, r"another method \(gptaq there, gptq now\)"),
        ({"seed": 1}, r"another seed \(0 there, 1 now\)"),
        ({"protocol": "unified"}, "another protocol"),
        ({"calibration": [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]}, "another calibration data"),
    ],
)
def test_other_work_is_refused(
    make: Callable[[str], Case], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    case = make("bert-sdpa")
    call(case, tmp_path)
    with pytest.raises(InputError, match=message):
        call(case, tmp_path, **changed)


def test_other_weights_are_refused(make: Callable[[str], Case], tmp_path: Path) -> None:
    case = make("bert-sdpa")
    call(case, tmp_path)
    with torch.no_grad():
        case.model.encoder.layer[1].output.dense.weight[3, 5] += 1e-3
    with pytest.raises(InputError, match="another model"):
        call(case, tmp_path)


def test_damaged_files(make: Callable[[str], Case], tmp_path: Path) -> None:
    case = make("bert-sdpa")
    call(case, tmp_path)
    block = tmp_path / "0-encoder.layer.1.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(InputError, match=r"layer.1.safetensors is damaged .* delete it to redo this block"):
        call(case, tmp_path)
    (tmp_path / "resume.json").write_text("{")
    with pytest.raises(InputError, match="damaged or of another version"):
        call(case, tmp_path)
    (tmp_path / "resume.json").write_text(json.dumps({"version": 99, "belongs": {}}))
    with pytest.raises(InputError, match="damaged or of another version"):
        call(case, tmp_path)


def test_folders_of_others_are_left_alone(make: Callable[[str], Case], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match="is not empty and holds no resume.json"):
        call(make("plain-sdpa"), tmp_path)
    with pytest.raises(InputError, match="cannot keep the calibration"):
        call(make("plain-sdpa"), tmp_path / "thesis.tex" / "folder")


def test_fingerprints_see_every_value() -> None:
    model = nn.Linear(4, 3)
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        model.bias[2] += 1e-6
    assert fingerprint(model) != before
    batches = [{"x": torch.zeros(2, 3), "mask": None}]
    assert fingerprint_batches(batches) == fingerprint_batches([{"mask": None, "x": torch.zeros(2, 3)}])
    for other in (
        [{"x": torch.zeros(3, 2), "mask": None}],
        [{"x": torch.zeros(2, 3)}],
        batches * 2,
        [torch.zeros(2, 3)],
    ):
        assert fingerprint_batches(batches) != fingerprint_batches(other)


def test_a_snapshot_puts_everything_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    tied = model[0].weight
    before = {key: value.clone() for key, value in model.state_dict().items()}
    snapshot = Snapshot(model)
    model[0].bias = nn.Parameter(torch.ones(4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4))
    model[1].running_mean.fill_(3.0)
    snapshot.restore()
    assert model[0].weight is tied and model[0].bias is None
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
