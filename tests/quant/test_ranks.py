"""Calibration data divided among ranks: the quantized model is the one that a process with all data makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.blocks import tokens
from tests.ranks import model, spawn
from torch import Tensor

from s2d import quant
from s2d.errors import InputError

BATCHES = 6
# What is counted or compared sums exactly. Hessians are sums in float64 in another order: 1e-16, which decides nothing
# but ties.
WAYS = {
    "rtn-minmax": ("rtn", "minmax"),
    "rtn-mse": ("rtn", "mse"),
    "rtn-percentile": ("rtn", "percentile:99"),
    "gptq": ("gptq", None),
    "gptaq": ("gptaq", None),
    "rotation+gptq": ("rotation+gptq", None),
}


def batches() -> list[tuple[Tensor]]:
    return [(tokens(number, batch=4),) for number in range(BATCHES)]


def quantized(method: str, observer: str | None, mine: list[tuple[Tensor]], shared: bool) -> dict[str, Tensor]:
    whole = model()
    return quant.quantize(whole, "w4a4", calibration=mine, method=method, observer=observer, shared=shared).state_dict()


def on_ranks(folder: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = batches()[rank::ranks]
    found = {name: quantized(method, observer, mine, True) for name, (method, observer) in WAYS.items()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    with pytest.raises(
        InputError, match="repq cannot divide the calibration data among processes.*choose from gptaq, gptq"
    ):
        quantized("repq", None, mine, True)
    with pytest.raises(InputError, match="resume keeps the blocks of one process"):
        quant.quantize(model(), "w4a4", calibration=mine, method="gptq", shared=True, resume=folder)
    other = model()
    with torch.no_grad():
        other.head.weight.add_(rank)
    with pytest.raises(InputError, match="the ranks hold different models"):
        quant.quantize(other, "w4a4", calibration=mine, shared=True)


def test_ranks_that_share_the_data_quantize_as_one_process_with_all_of_it(tmp_path: Path) -> None:
    spawn(2, tmp_path, on_ranks, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (method, observer) in WAYS.items():
        expected = quantized(method, observer, batches(), False)
        assert first[name].keys() == second[name].keys() == expected.keys()
        half = quantized(method, observer, batches()[::2], False)
        assert any(not torch.equal(half[key], expected[key]) for key in expected), "half of the data is not enough"
        for key, tensor in expected.items():
            assert torch.equal(first[name][key], second[name][key]), f"{name}: {key} differs between ranks"
            if name.startswith("rtn"):
                assert torch.equal(first[name][key], tensor), f"{name}: {key}"
            else:
                torch.testing.assert_close(
                    first[name][key], tensor, msg=lambda text, k=key, n=name: f"{n}: {k}: {text}"
                )
