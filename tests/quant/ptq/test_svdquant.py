"""SVDQuant: the branch, every family's function kept, better where channels are large, saved and taken out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.quant.tiny_families import FAMILIES, apart, build, job, outlying
from torch import nn

from s2d.errors import InputError
from s2d.quant import load, quantize, remove, save
from s2d.quant.modules.online import OnlineLinear
from s2d.quant.ptq import svdquant as module
from s2d.quant.ptq.svdquant import TokenSample, low_rank, low_rank_quickly, svdquant


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_the_branch_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    down, up = low_rank(weight, 5)
    assert (down.shape, up.shape) == ((5, shape[1]), (shape[0], 5))
    U, S, V = np.linalg.svd(weight.numpy(), full_matrices=False)
    best = np.linalg.norm(weight.numpy() - (U[:, :5] * S[:5]) @ V[:5])
    assert np.linalg.norm(weight.numpy() - (up @ down).numpy()) < 1.001 * best
    assert torch.equal(down, down.bfloat16().double()) and torch.equal(up, up.bfloat16().double())
    down, up = low_rank(torch.zeros(shape), 3)
    assert not bool(down.any()) and not bool(up.any())


def test_the_quick_branch_is_nearly_as_good() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 80, generator=generator) * torch.linspace(3, 0.1, 80)
    start = torch.randn(80, 5, generator=generator)
    (down, up), (exact_down, exact_up) = low_rank_quickly(weight, start), low_rank(weight, 5)
    assert (weight - up @ down).norm() < 1.05 * (weight.double() - exact_up @ exact_down).norm()


def test_a_sample_is_uniform_and_knows_the_largest_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", 50)
    sample = TokenSample(torch.Generator().manual_seed(0))
    for start in range(0, 1000, 100):
        sample.add(torch.arange(start, start + 100.0)[:, None])
    assert sample.rows is not None and sample.largest is not None
    assert len(sample.rows) == 50 == len(sample.rows.unique()) and sample.largest.item() == 999
    assert 400 < sample.rows.mean().item() < 600


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_kept_on_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRENGTHS", (0.0, 0.5))
    case = build(name)
    plain = case.output()
    work = job(case)
    svdquant(work)
    layers = [m for m in work.model.modules() if isinstance(m, OnlineLinear) and m.down is not None]
    assert len(layers) >= 4
    assert apart(case.output(work.model), plain) < 1e-5
    remove(work.model)
    assert apart(case.output(work.model), plain) < 1e-5
    assert work.model.state_dict().keys() == case.model.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("method", ["svdquant", "svdquant+gptq", "rotation+svdquant"])
def test_better_than_rounding_alone_where_channels_are_large(method: str) -> None:
    case = outlying()
    plain = case.output()
    error, rtn = (
        float((case.output(quantize(case.model, "w4a4", calibration=case.batches, method=name)) - plain).norm())
        for name in (method, "rtn")
    )
    assert error < 0.85 * rtn


def test_saved_and_loaded_bit_identical(tmp_path: Path) -> None:
    case = build("bert")
    quantized = quantize(case.model, "w4a4", calibration=case.batches, method="svdquant")
    save(quantized, tmp_path)
    loaded = load(tmp_path, build("bert").model)
    assert torch.equal(case.output(loaded), case.output(quantized))
    remove(loaded)
    assert all(type(module) is nn.Linear for module in loaded.modules() if isinstance(module, nn.Linear))


def test_it_comes_last() -> None:
    case = build("vit")
    for method in ("svdquant+smoothquant", "svdquant+awq"):
        with pytest.raises(InputError, match=rf"write {method.split('+')[1]}\+svdquant"):
            quantize(case.model, "w4a4", calibration=case.batches, method=method)


@pytest.mark.parametrize(("sides", "rank"), [((384, 384), 32), ((128, 512), 32), ((48, 96), 12), ((6, 4), 1)])
def test_the_rank_is_32_or_a_quarter_of_the_narrower_side(sides: tuple[int, int], rank: int) -> None:
    model, x = nn.Sequential(nn.Linear(*sides)).eval(), torch.randn(16, sides[0])
    made = quantize(model, "w4a8", calibration=[x], method="svdquant")[0]
    assert isinstance(made, OnlineLinear) and made.down is not None and made.down.shape == (rank, sides[0])


def test_layers_without_room_for_a_branch_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 8)).eval()
    with pytest.raises(InputError, match="no quantized Linear of at least 4 inputs and outputs in Sequential"):
        quantize(model, "w4a4", calibration=[torch.randn(4, 3)], method="svdquant")


def test_a_failed_call_in_place_leaves_the_model_as_it_was() -> None:
    case = build("vit")
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    with torch.no_grad():
        case.model.layers[1].attention.o_proj.bias[0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        quantize(case.model, "w4a4", calibration=case.batches, method="svdquant", inplace=True)
    after = case.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if "layers.1.attention.o_proj.bias" not in key)


@torch.no_grad()
@pytest.mark.parametrize("ends", ["w8a8", "w4a8"])
def test_a_head_that_shares_the_embeddings_weight_is_rounded_alone(ends: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(64, (2, 9)), "use_cache": False}
    made = quantize(model, {"base": "w8a8", "ends": ends}, calibration=[batch], method="svdquant")
    assert made.lm_head.weight is made.model.embed_tokens.weight and not isinstance(made.lm_head, OnlineLinear)
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert isinstance(made.model.layers[0].mlp.down_proj, OnlineLinear)
    found, wanted = made(**batch).logits, model(**batch).logits
    assert float((found - wanted).norm() / wanted.norm()) < (0.02 if ends == "w8a8" else 0.2)
