"""Walking through the blocks: what each is called with, in which state, for models that chain them or do not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.quant.tiny_models import Block as PlainBlock
from tests.quant.tiny_models import Case, PlainTransformer, plain
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.blocks import blocks_of
from s2d.models.tracing import trace
from s2d.quant import QuantSpec
from s2d.quant.calibration import walk as walking
from s2d.quant.calibration.observe import Batches, Job, observe, set_weight_ranges
from s2d.quant.calibration.walk import Block, Call, each_tensor, observe_block, observe_outside, outside, walk
from s2d.quant.modules.sites import insert, plan


def job_of(case: Case, spec: Any = "w4a4", stage: str = "rounding") -> Job:
    parsed, batches = QuantSpec.parse(spec), Batches(case.batches)
    sites = plan(case.model, parsed, trace(case.model, batches.first))
    quantizers = insert(case.model, sites)
    return Job(case.model, parsed, sites, quantizers, batches, 0, False, stage=stage)  # type: ignore[arg-type]


def with_ranges(job: Job) -> Job:
    observe(job)
    set_weight_ranges(job)
    return job


def hidden(block: Block) -> list[Tensor]:
    """What the block reads in every call, whatever the argument is called."""
    return [call.args[0] if call.args else call.kwargs["hidden_states"] for call in block.inputs]


@torch.no_grad()
def seen_by(model: nn.Module, names: list[str], batches: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """The first input of modules in whole forwards."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name].append((args[0] if args else kwargs["hidden_states"]).clone())

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    for batch in batches:
        model(**batch)
    for handle in hooks:
        handle.remove()
    return seen


def enable(job: Job, on: bool, prefix: str = "") -> None:
    for site, quantizer in job.quantizers.items():
        if site.module.startswith(prefix):
            quantizer.enabled = on


def test_inputs_are_those_behind_quantized_blocks(case: Case) -> None:
    """Against whole forwards of the model, with the quantizers of the blocks before switched on by hand."""
    job = with_ranges(job_of(case))
    names = list(blocks_of(case.model, trace(case.model, case.batches[0])))
    assert len(names) == 2
    full = seen_by(case.model, names, case.batches)
    enable(job, True, names[0])
    half = seen_by(case.model, names, case.batches)
    enable(job, False)
    visited = []
    for block in walk(job, reference=True):
        assert not any(quantizer.enabled for quantizer in block.quantizers.values())
        assert block.quantizers and block.linears()
        assert block.reference is not None and block.outputs is not None
        expected = full if block.name == names[0] else half
        for ours, whole in zip(hidden(block), expected[block.name], strict=True):
            assert torch.allclose(ours, whole, atol=1e-6)
        reference = [call.args[0] if call.args else call.kwargs["hidden_states"] for call in block.reference]
        for ours, whole in zip(reference, full[block.name], strict=True):
            assert torch.allclose(ours, whole, atol=1e-6)
        for ours, output in zip(block.outputs, block.run(block.reference), strict=True):
            assert torch.equal(ours, output)
        visited.append(block.name)
    assert visited == names
    assert not any(quantizer.enabled for quantizer in job.quantizers.values())


@pytest.mark.parametrize("name", ["bert-sdpa", "llama-sdpa", "vit-sdpa", "torch-encoder", "plain-sdpa"])
def test_one_pass_over_the_data_where_blocks_follow_each_other(
    make: Callable[[str], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(name)
    job = with_ranges(job_of(case))
    passes = []
    monkeypatch.setattr(walking, "run", lambda *args: (passes.append(1), run(*args)))
    run = __import__("s2d.quant.calibration.observe", fromlist=["run"]).run
    for _ in walk(job, reference=True):
        pass
    assert len(passes) == 1 + len(case.batches)  # one forward to see how the blocks follow each other


def test_during_transforms_the_inputs_are_those_of_the_plain_model(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    job = job_of(case, stage="transform")
    names = list(blocks_of(case.model, trace(case.model, case.batches[0])))
    full = seen_by(case.model, names, case.batches)
    for block in walk(job):
        for ours, whole in zip(hidden(block), full[block.name], strict=True):
            assert torch.allclose(ours, whole, atol=1e-6)
        assert block.reference is None and block.outputs is None


def test_the_padding_mask_comes_with_each_call(make: Callable[[str], Case]) -> None:
    case = make("bert-sdpa")
    mask = case.batches[0]["attention_mask"].bool()
    rows: list[int] = []
    for block in walk(with_ranges(job_of(case))):
        assert all(torch.equal(block.mask_of(index), mask) for index in range(len(block.masks)))
        hooks = block.watch_inputs(block.linears(), lambda name, x: rows.append(len(x)))
        block.run(block.inputs)
        for handle in hooks:
            handle.remove()
    assert set(rows) == {int(mask.sum())} and len(rows) == 2 * 6 * 3


class Stages(nn.Module):
    """Two stages with a merging of tokens between them: the second stage does not follow from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList(PlainBlock(16, "sdpa") for _ in range(2))
        self.merge = nn.Linear(32, 16)
        self.late = nn.ModuleList(PlainBlock(16, "sdpa") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.early:
            x = block(x)
        x = self.merge(torch.cat([x[:, 0::2], x[:, 1::2]], dim=-1))
        for block in self.late:
            x = block(x)
        return x


class Between(Stages):
    """Something is added to a block's output in place: the same tensor, other values."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.early[0](x)
        x += 0.5
        return self.late[1](self.late[0](self.early[1](x)))


class Shared(nn.Module):
    """One block that runs three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(16, "sdpa") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
        return self.blocks[1](x)


@pytest.mark.parametrize("kind", [Stages, Between, Shared])
def test_blocks_that_do_not_follow_each_other(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    case = Case(kind().eval(), [{"x": torch.randn(2, 8, 16)} for _ in range(2)])
    job = with_ranges(job_of(case))
    names = list(blocks_of(case.model, trace(case.model, case.batches[0])))
    full = seen_by(case.model, names, case.batches)
    done: list[str] = []
    for block in walk(job, reference=True):
        for name in done:
            enable(job, True, name)
        expected = seen_by(case.model, names, case.batches)[block.name]
        enable(job, False, block.name)
        assert len(block.inputs) == len(block.masks) == len(expected)
        for ours, whole in zip(hidden(block), expected, strict=True):
            assert torch.allclose(ours, whole, atol=1e-6)
        assert block.reference is not None
        for call, whole in zip(block.reference, full[block.name], strict=True):
            assert torch.allclose(call.args[0], whole, atol=1e-6)
        done.append(block.name)
    assert done == names


class InPlace(PlainBlock):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.norm1(x))
        return x.add_(self.fc2(torch.relu(self.fc1(self.norm2(x)))))


def test_blocks_that_write_into_their_input_can_be_run_again() -> None:
    torch.manual_seed(0)
    model = PlainTransformer().eval()
    model.blocks = nn.ModuleList(InPlace(16, "sdpa") for _ in range(2))
    case = Case(model, [{"x": torch.randn(2, 7, 16)}])
    for block in walk(with_ranges(job_of(case))):
        assert torch.equal(block.run(block.inputs)[0], block.run(block.inputs)[0])


def test_ranges_of_a_block_and_of_what_is_outside(make: Callable[[str], Case]) -> None:
    """With upstream at full precision (transform stage) they are those of the whole model's observation."""
    case = make("bert-sdpa")
    job = job_of(case, {"base": "w8a8", "overrides": {"pooler.dense": "w8a8"}}, stage="transform")
    assert [site.module for site in outside(job)] == ["pooler.dense"] * 2
    observe(job)
    wanted = {site: q.scale.clone() for site, q in job.quantizers.items()}
    for quantizer in job.quantizers.values():
        quantizer.scale.fill_(1.0)
    observe_outside(job)
    for block in walk(job):
        observe_block(job, block)
    for site, quantizer in job.quantizers.items():
        if site.what != "weight":
            assert torch.allclose(quantizer.scale, wanted[site], rtol=1e-5), site.name


def test_a_generator_will_do_where_blocks_follow_each_other() -> None:
    case = plain("sdpa")
    case.batches = (batch for batch in list(case.batches))  # type: ignore[assignment]
    job = job_of(case, "w4a16")
    set_weight_ranges(job)
    assert [len(block.inputs) for block in walk(job)] == [3, 3]


def test_batches_of_other_shapes_and_one_that_does_not_fit() -> None:
    case = plain("sdpa")
    case.batches = [{"x": torch.randn(3, 7, 16)}, {"x": torch.randn(1, 4, 16)}]
    shapes = [[tuple(x.shape) for x in hidden(block)] for block in walk(with_ranges(job_of(case)))]
    assert shapes == [[(3, 7, 16), (1, 4, 16)]] * 2
    case = plain("sdpa")
    job = with_ranges(job_of(case))
    job.batches = Batches([*case.batches, {"x": torch.randn(3, 7, 15)}])
    with pytest.raises(InputError, match="calibration batch 3 does not fit PlainTransformer"):
        list(walk(job))


def test_values_that_are_not_numbers_are_named() -> None:
    case = plain("sdpa")
    job = with_ranges(job_of(case))
    case.batches[1]["x"][0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="blocks.0 received NaN"):
        list(walk(job))
    case = plain("sdpa")
    job = with_ranges(job_of(case))
    with torch.no_grad():
        case.model.blocks[0].fc2.bias[0] = torch.inf
    with pytest.raises(InputError, match="blocks.0 gives NaN or infinite"):
        list(walk(job))


def test_a_block_that_no_data_reaches(make: Callable[[str], Case]) -> None:
    case = plain("sdpa")
    case.model.blocks.append(PlainBlock(16, "sdpa"))
    case.model.forward = lambda x: case.model.blocks[1](case.model.blocks[0](x))  # type: ignore[method-assign]
    job = job_of(case, {"base": "w4a16"})
    set_weight_ranges(job)
    with pytest.raises(InputError, match=r"never reached blocks.2\.\S+; feed data that does"):
        list(walk(job))


def test_leaving_the_walk_early_switches_everything_off(make: Callable[[str], Case]) -> None:
    job = with_ranges(job_of(make("bert-sdpa")))
    job.model.train()
    steps = walk(job)
    next(steps)
    next(steps)
    assert any(quantizer.enabled for quantizer in job.quantizers.values())
    steps.close()
    assert not any(quantizer.enabled for quantizer in job.quantizers.values())
    assert all(module.training for module in job.model.modules())


def test_blocks_of_models_that_no_family_names() -> None:
    model, x = PlainTransformer().eval(), torch.randn(2, 5, 16)
    model.blocks = nn.ModuleList(PlainBlock(16, "sdpa") for _ in range(3))
    assert list(blocks_of(model, trace(model, x))) == ["blocks.0", "blocks.1", "blocks.2"]
    mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    assert blocks_of(mlp, trace(mlp, x)) == {}


@pytest.mark.parametrize("reference", [False, True])
def test_memory_is_that_of_one_block(reference: bool) -> None:
    """Live activations while a block is worked on: as many at the last of eight blocks as at the second."""
    torch.manual_seed(0)
    model = PlainTransformer().eval()
    model.blocks = nn.ModuleList(PlainBlock(16, "sdpa") for _ in range(8))
    case = Case(model, [{"x": torch.randn(5, 50, 16)} for _ in range(4)])
    job = with_ranges(job_of(case))
    one = sum(batch["x"].nbytes for batch in case.batches)
    live = []
    for _ in walk(job, reference=reference):
        gc.collect()
        tensors = [found for found in gc.get_objects() if isinstance(found, Tensor) and found.shape == (5, 50, 16)]
        live.append(sum(found.nbytes for found in {id(found): found for found in tensors}.values()))
        del tensors
    assert max(live[1:]) == live[1]
    # The data itself, what the block reads, and with a reference what the full-precision block reads and returns.
    assert live[-1] <= (4 if reference else 2) * one


def test_what_a_block_was_called_with_is_let_go_at_once_not_by_the_collector() -> None:
    made: list[weakref.ref[Tensor]] = []

    def change(value: Tensor) -> Tensor:
        made.append(weakref.ref(new := value + 1))
        return new

    gc.collect()
    gc.disable()
    try:
        call = each_tensor(Call((torch.zeros(3),), {"pair": [torch.ones(2), torch.ones(1)]}), change)
        assert len(made) == 3 and all(ref() is not None for ref in made)
        del call
        assert all(ref() is None for ref in made)
    finally:
        gc.enable()
