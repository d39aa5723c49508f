"""Rotations keep every family's function, spread outliers, and can be saved and taken out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.quant.tiny_families import FAMILIES, POST_NORM, PRE_NORM, apart, build, job, outlying

from s2d.errors import InputError
from s2d.quant import load, quantize, remove, save
from s2d.quant.modules.folding import matrix, streams
from s2d.quant.modules.online import OnlineBlock, OnlineLinear
from s2d.quant.ptq.rotation import rotation

pytestmark = pytest.mark.filterwarnings("ignore:.*is post-norm")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "plain"])
def test_the_function_is_kept_on_every_family(name: str) -> None:
    case = build(name)
    plain = case.output()
    work = job(case)
    rotation(work)
    assert apart(case.output(work.model), plain) < 1e-5
    # Something was turned in every block, and it comes out again.
    assert sum(isinstance(module, OnlineLinear) for module in work.model.modules()) >= 2
    assert any(isinstance(module, OnlineBlock) for module in work.model.modules()) == (name in PRE_NORM)
    remove(work.model)
    assert apart(case.output(work.model), plain) < 1e-5
    assert work.model.state_dict().keys() == case.model.state_dict().keys()


@pytest.mark.parametrize("name", POST_NORM)
def test_what_is_left_out_of_post_norm_models_is_said(name: str) -> None:
    case = build(name)
    with pytest.warns(UserWarning, match=rf"{type(case.model).__name__} is post-norm: .*\(R1\)"):
        rotation(job(case))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "llama", "dinov2"])
def test_the_stream_is_spread(name: str) -> None:
    case = build(name)
    (first, _), branch = streams(case.model, "test")[0].blocks, streams(case.model, "test")[0].branches[2]
    assert first not in branch.norm
    # A writer with one large output channel: the norm of the second block sees an outlier.
    matrix(case.model, streams(case.model, "test")[0].branches[1].writer)[0][9] *= 60.0
    # Gains of one, which rotation merges as well.
    case.model.get_submodule(branch.norm).get_parameter("weight").fill_(1.0)
    work = job(case)
    reader = branch.readers[0]
    seen: dict[str, torch.Tensor] = {}

    def ratio(model: torch.nn.Module) -> float:
        hook = model.get_submodule(reader).register_forward_pre_hook(lambda m, args: seen.__setitem__("x", args[0]))
        case.output(model)
        hook.remove()
        return float((seen["x"].abs().amax(-1) / seen["x"].square().mean(-1).sqrt()).max())

    before = ratio(case.model)
    rotation(work)
    assert before > 4.5 and ratio(work.model) < 0.75 * before


def test_the_seed_decides() -> None:
    case = build("vit")
    results = []
    for seed in (0, 0, 1):
        work = job(case, seed=seed)
        rotation(work)
        results.append(work.model.layers[0].attention.q_proj.weight)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@torch.no_grad()
def test_better_than_rounding_alone_where_channels_are_large() -> None:
    case = outlying()
    plain = case.output()
    errors = [
        apart(case.output(quantize(case.model, "w4a4", calibration=case.batches, method=method)), plain)
        for method in ("rotation", "rtn")
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_saved_and_loaded_bit_identical(name: str, tmp_path: Path) -> None:
    case = build(name)
    quantized = quantize(case.model, "w4a4", calibration=case.batches, method="rotation")
    save(quantized, tmp_path)
    loaded = load(tmp_path, build(name).model)
    assert torch.equal(case.output(loaded), case.output(quantized))
    again = remove(loaded)
    assert again.state_dict().keys() == case.model.state_dict().keys()


def test_tied_embeddings_stay_tied() -> None:
    case = build("llama-tied")
    work = job(case)
    rotation(work)
    model = work.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, case.model.lm_head.weight)


def test_blocks_of_an_unknown_build_are_refused_and_left_alone() -> None:
    case = build("plain")
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    with pytest.raises(InputError, match=r"rotation does not know what blocks\.0\.fc1\.weight does"):
        quantize(case.model, "w4a4", calibration=case.batches, method="rotation", inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())


def test_a_family_that_is_wrong_about_its_model_is_found_out() -> None:
    case = build("vit")
    forward = type(case.model.layers[0]).forward

    class PostNormed(type(case.model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
            return forward(self, *args, **kwargs).cos()

    case.model.layers[0].__class__ = PostNormed
    with pytest.raises(InputError, match=r"cos in layers\.0 reads it as well"):
        quantize(case.model, "w4a4", calibration=case.batches, method="rotation")


def test_it_comes_first() -> None:
    case = build("bert")
    with pytest.raises(InputError, match="write rotation first"):
        quantize(case.model, "w4a4", calibration=case.batches, method="smoothquant+rotation")
