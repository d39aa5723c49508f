"""The audit's row of a parameter that holds several experts, against a loop over them."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.quant.modules.test_experts import MODELS, TOKENS, Loop, language_model, output, owners
from torch import Tensor, nn

import s2d


class Noting(Loop):
    """Notes every product with every expert."""

    def product(self, name: str, x: Tensor, expert: int) -> Tensor:
        weight = getattr(self.plain, name)[expert]
        self.noted.setdefault((name, expert), []).append((x, weight.T @ x if self.transposed else weight @ x))
        return super().product(name, x, expert)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_row_shows_the_worst_of_the_experts(name: str, experts: str) -> None:
    model = language_model(name, experts)
    expected = copy.deepcopy(model)
    loops = {path: Noting(module, MODELS[name][1]) for path, module in owners(expected)}
    for path, loop in loops.items():
        expected.set_submodule(path, loop)
    output(expected)
    found = s2d.audit(model, [TOKENS], k=1)
    assert not found.missed and found.model == type(model).__name__
    for path, loop in loops.items():
        for each in ("gate_up_proj", "down_proj"):
            ratios = {}
            for (called, expert), pairs in loop.noted.items():
                if called == each:
                    made = torch.stack([y for _, y in pairs])
                    ratios[expert] = float(made.abs().max() / made.square().mean().sqrt())
            row = found.row(f"{path}.{each}")
            worst = max(ratios, key=lambda expert: ratios[expert])
            read = torch.stack([x for x, _ in loop.noted[each, worst]])
            weight = getattr(loop.plain, each)[worst]
            weight = weight.T if MODELS[name][1] else weight
            assert (row.expert, row.experts, row.shape) == (worst, len(getattr(loop.plain, each)), list(weight.shape))
            assert row.output_ratio == pytest.approx(ratios[worst], rel=1e-4)
            assert row.input_max == pytest.approx(float(read.abs().max()), rel=1e-4)
            assert row.sigma[0] == pytest.approx(float(torch.linalg.svdvals(weight)[0]), rel=1e-3)
            assert row.pcdr and 0 < row.pcdr[0] <= 1 and row.error and row.error > 0


class Functions(nn.Module):
    """Experts whose matrices are functions of their parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.bmm(x.expand(3, -1, -1), self.experts.tanh()).sum(0))


def test_experts_that_cannot_be_followed_are_listed() -> None:
    found = s2d.audit(Functions(), [torch.randn(5, 8)])
    assert found.missed.keys() == {"experts"} and [row.weight for row in found.rows] == ["head.weight"]


def test_experts_without_tokens_are_listed_and_patterns_name_experts() -> None:
    model = language_model("Mixtral")
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data[2:] = 0.0
            parameter.data[:2] = 1e-3 * parameter.data[:2].abs() + 1.0
    found = s2d.audit(model, [TOKENS], include="*.experts.down_proj")
    assert [row.weight for row in found.rows] == [f"model.layers.{n}.mlp.experts.down_proj" for n in range(2)]
    assert all("no token reached these experts" in reason for reason in found.missed.values()) and found.missed
