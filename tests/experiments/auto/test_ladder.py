"""What is proposed: legal candidates only, and the front of what was tried."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from s2d import quant
from s2d.experiments.auto.candidates import Candidate, Scored, file_bytes, front, tables_of
from s2d.experiments.auto.ladder import RUNGS, View, first, forms
from s2d.experiments.auto.simulation import Simulation
from s2d.export.runtime import find_runtime, runtimes
from s2d.quant import QuantSpec
from s2d.quant.allocate import Sensitivity, sensitivity


class Net(nn.Module):
    """A table and two Linears."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        self.layers = nn.ModuleList([nn.Linear(width, 2 * width), nn.Linear(2 * width, width)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](self.table(ids)).relu())


def scored(error: float, size: int, time: float | None, bits: int = 8, rung: str = "ranges") -> Scored:
    spec = QuantSpec.parse({"base": f"w{bits}a8", "attention": False})
    return Scored(Candidate(spec, "rtn", 8, rung, trained=error), error, 0.0, size, time, 1.0)


@pytest.mark.parametrize("name", [name for name, each in runtimes().items() if not each.quantizes_itself])
def test_no_rung_proposes_what_is_not_legal(name: str) -> None:
    runtime = find_runtime(name)
    if not forms(runtime):
        pytest.skip(f"{name} takes no integers")
    torch.manual_seed(0)
    model, ids = Net(128), torch.randint(64, (8, 5))  # groups of 128 divide it

    def measured(spec: QuantSpec, choices: Sequence[int]) -> Sensitivity:
        return sensitivity(model, calibration=[{"ids": ids}], choices=choices, base=spec, activations="base")

    def error(candidate: Candidate) -> float:
        return float(int(candidate.key[-6:], 16))

    def legal(spec: QuantSpec) -> bool:
        return runtime.complaint(quant.plan(model, spec)) is None

    view = View(runtime, max(runtime.embedding_bits), legal, error, measured, lambda spec: ["layers.0", "layers.1"])
    found = {each.key: each for rung in RUNGS for each in rung.propose(view)}
    for candidate in found.values():
        assert runtime.complaint(quant.plan(model, candidate.spec)) is None, candidate.label
        assert candidate.embeddings in runtime.embedding_bits
    assert runtime.complaint(quant.plan(model, first(runtime, 0).spec)) is None and len(found) >= 2
    assert len({rung.name for rung in RUNGS} & {each.rung for each in found.values()}) >= 2
    if name in ("onnxruntime", "openvino"):
        inputs = {each.spec.activation for each in found.values()}
        assert {each.format.bits for each in inputs if each is not None} == {8}, "4-bit inputs buy nothing there"
        assert {each.rung for each in found.values()} == {rung.name for rung in RUNGS}


def test_the_front_is_the_safest_first_and_never_worse_in_both() -> None:
    tried = [
        scored(0.001, 24_000_000, 1.0),
        scored(0.01, 24_100_000, 0.6),
        scored(0.02, 24_000_000, 0.6),
        scored(0.05, 19_000_000, 0.6, 4),
        scored(0.03, 19_100_000, 1.2, 4),
        scored(0.9, 19_000_000, 1.0, 4),
        scored(float("inf"), 1, 0.1, 4),
    ]
    found = front(tried, "smallest")
    assert [each.error for each in found] == [0.001, 0.01, 0.03, 0.05]
    thinned = [each.error for each in front(tried, "smallest", most=3)]
    assert len(thinned) == 3 and thinned[0] == 0.001 and thinned[-1] == 0.05
    assert [each.error for each in front(tried, "fastest")] == [0.001, 0.01, 0.05]


def test_predicted_bytes_are_those_of_packed_codes_and_scales() -> None:
    runtime, model = find_runtime("onnxruntime"), Net()
    sites = quant.plan(model, QuantSpec.parse("w4a8"))
    biases, table, weights = 4 * (64 + 32), 64 * 32, 32 * 64
    assert file_bytes(model, sites, runtime, 0) == biases + 4 * table + 2 * (weights // 2) + 4 * (64 + 32)
    assert file_bytes(model, sites, runtime, 8) == biases + table + 4 * 64 + 2 * (weights // 2) + 4 * (64 + 32)


def test_only_large_tables_of_their_own_are_rounded() -> None:
    model = Net()
    assert tables_of(model) == [model.table]
    model.head = nn.Linear(32, 64)
    model.head.weight = model.table.weight
    assert tables_of(model) == []


def test_candidates_survive_json() -> None:
    spec = QuantSpec.parse({"base": "w4a8", "attention": False, "overrides": {"layers.0": "w8a16"}})
    one = Scored(Candidate(spec, "gptq", 4, "mixed widths"), 0.5, 0.1, 10, None, 2.0)
    again = Scored.from_dict(one.to_dict())
    assert again == one and again.candidate.key == one.candidate.key
    assert one.candidate.key != Candidate(spec, "gptq", 8, "mixed widths").key


def test_calibration_and_search_share_no_example() -> None:
    class Rows:
        """A task of numbered rows."""

        tokens = 0

        def sizes(self) -> dict[str, int]:
            return {"train": 400}

        def batches(self, split: str, *, batch_size: int, seed: int, shuffle: bool) -> list[dict[str, torch.Tensor]]:
            order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
            return [{"row": rows} for rows in order.split(batch_size)]

        def inputs(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            return [batch]

    simulation = Simulation(Net(), Rows(), 3)  # type: ignore[arg-type]
    ranges = {int(row) for batch in simulation.calibration() for row in batch["row"]}
    searched = {int(row) for batch in simulation.searched() for row in batch["row"]}
    assert len(ranges) == 128 and len(searched) == 256 and not ranges & searched
