"""Block-by-block calibration: the blocks before are already quantized; memory is bounded by one block.

The inputs of the first block are caught in one pass over the data. After that a block's outputs are the next block's
inputs, wherever the model passes them on unchanged; the first batch shows where it does. Where it does not (the first
block of another tower, a stage that follows a merging of tokens), the inputs are caught in another pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.blocks import blocks_of
from s2d.models.masks import Padding, token_mask
from s2d.models.running import evaluating, run
from s2d.quant.calibration.observe import Job, observe, observing, refusing_unplanned, watch_inputs
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.modules.sites import Site
from s2d.quant.numerics.quantizer import Quantizer

_CONSTANTS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """How a block is called: its arguments as the model gives them, tensors detached and on CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def slots(self) -> dict[int | str, Any]:
        """The arguments by position or name."""
        return {**dict(enumerate(self.args)), **self.kwargs}


@dataclass(eq=False)
class Block:
    """One transformer block and the arguments of its calls.

    Attributes:
        name: Dotted name in the model.
        module: The block, with its quantizers.
        inputs: One call a batch; the hidden states are those behind quantized blocks.
        reference: The same calls in the full-precision model, or None when the walk has no reference.
        outputs: What the full-precision block returns for ``reference``, ``[B, T, D]`` each; None likewise.
        masks: The padding masks of the forward that every call is a part of.
        running: Those of the call that is running.
    """

    name: str
    module: nn.Module
    inputs: list[Call]
    reference: list[Call] | None
    outputs: list[Tensor] | None
    masks: list[Padding]
    job: Job = field(repr=False)
    running: Padding | None = None

    @property
    def quantizers(self) -> dict[Site, Quantizer]:
        """The block's quantizers by site."""
        inside = (self.name, f"{self.name}.")
        return {s: q for s, q in self.job.quantizers.items() if s.module == inside[0] or s.module.startswith(inside[1])}

    def linears(self) -> dict[str, QuantizedLinear]:
        """The block's quantized Linears by their full dotted name."""
        return {
            f"{self.name}.{name}" if name else self.name: module
            for name, module in self.module.named_modules()
            if isinstance(module, QuantizedLinear)
        }

    def stream(self, calls: Sequence[Call], module: nn.Module | None = None) -> Iterator[Tensor]:
        """The first output of each call, one after the other, on CPU, without gradients.

        Args:
            calls: As many as there are masks.
            module: Run this one (a copy of the block) in its place.
        """
        module = module or self.module
        for call, mask in zip(calls, self.masks, strict=True):
            self.running = mask
            try:
                with torch.no_grad():
                    yield _first(invoke(module, call)).cpu()
            finally:
                self.running = None

    def run(self, calls: Sequence[Call], module: nn.Module | None = None) -> list[Tensor]:
        """The first output of each call: the block as it is now (or another), on CPU, without gradients."""
        return list(self.stream(calls, module))

    def watch_inputs(
        self, modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
    ) -> list[torch.utils.hooks.RemovableHandle]:
        """`calibration.watch_inputs` with the padding masks of the call that is running."""
        return watch_inputs(modules, see, self.padding)

    def padding(self) -> Padding:
        """The padding masks of the call that is running."""
        assert self.running is not None
        return self.running

    def mask_of(self, index: int) -> Tensor | None:
        """The mask ``[B, T]`` (True: a real token) of what a call returns; None where nothing is padded."""
        return self.masks[index](self.name, "output")


def walk(job: Job, *, reference: bool = False, kept: bool | None = None) -> Iterator[Block]:
    """Every transformer block in the order in which the model runs them.

    A block is yielded with its quantizers off. After the consumer's work they are switched on, to compute the inputs of
    the next blocks. At the end all are off again. During transforms (which come before any range is set) all stay off,
    so inputs are those of the full-precision model. With ``job.store``, finished blocks of an earlier, interrupted call
    are put back without being yielded.

    Args:
        job: The call's job.
        reference: Also carry the full-precision stream: `Block.reference` and `Block.outputs`. For a correction it is
            that of ``job.original``.
        kept: Whether ``job.store`` keeps finished blocks; None: those of roundings.

    Raises:
        InputError: A batch that does not fit, a block with quantizers that no data reached, an attention that the plan
            does not know, or NaN in the hidden states.
    """
    blocks = blocks_of(job.model, job.graph)
    rounding, teacher = job.stage != "transform", job.original if job.stage == "correction" else None
    kept = job.stage == "rounding" if kept is None else kept
    store, number = (job.store, job.store.walks) if job.store is not None and kept else (None, 0)
    if store is not None:
        store.walks += 1
    with evaluating(job.model), nullcontext() if teacher is None else evaluating(teacher):
        try:
            steps, caught = _first_pass(job, blocks, reference)
            inputs: list[Call] = []
            masks: list[Padding] = []
            fp: list[Call] | None = None
            for index in track(range(len(steps)), "quantizing blocks", disable=not job.progress, transient=True):
                step = steps[index]
                if step.link is None:
                    early = caught.pop(step.name, None)
                    fp = early.calls if reference and early is not None else None
                    if reference and teacher is not None:
                        fp = _catch(job, teacher, step.name).calls
                    if early is None or (rounding and index > 0):
                        early = _catch(job, job.model, step.name)
                    # A separate list: calls are replaced in it one by one, so that the memory of each is freed after
                    # its use.
                    inputs, masks = list(early.calls), early.masks
                    del early
                block = Block(step.name, blocks[step.name], inputs, fp, None, masks, job)
                if fp is not None:
                    block.outputs = block.run(fp, None if teacher is None else teacher.get_submodule(step.name))
                if store is None or not store.load(number, step.name, block.module):
                    yield block
                    if store is not None:
                        store.save(number, step.name, block.module)
                for quantizer in block.quantizers.values():
                    quantizer.enabled = rounding
                link = steps[index + 1].link if index + 1 < len(steps) else None
                if link is None:
                    continue
                if fp is not None and block.outputs is not None:
                    fp = [link(call, output) for call, output in zip(fp, block.outputs, strict=True)]
                for position, output in enumerate(block.stream(inputs)):
                    if not bool(torch.isfinite(output).all()):
                        raise InputError(f"{step.name} gives NaN or infinite values; check the weights and the data")
                    inputs[position] = link(inputs[position], output)
        finally:
            for quantizer in job.quantizers.values():
                quantizer.enabled = False


def observe_block(job: Job, block: Block) -> None:
    """Set the ranges of the block's static activation quantizers, by the spec's observers, from ``block.inputs``.

    The block's quantizers should be off, except those whose rounding the ranges should include.

    Raises:
        InputError: NaN or infinite activations, or a site that no data reached.
    """
    with observing(job, block.quantizers, block.padding) as observers, evaluating(block.module):
        if observers:
            for _ in block.stream(block.inputs):
                pass


def observe_outside(job: Job) -> None:
    """Set the ranges of the static activation quantizers outside the blocks, as the model is now.

    Called before a walk, the ranges are those of the full-precision model.
    """
    sites = {*outside(job)}
    if any(site.what != "weight" and not job.quantizers[site].dynamic for site in sites):
        observe(job, sites)


def outside(job: Job) -> list[Site]:
    """The quantized sites that are in no block."""
    inside = tuple(f"{name}." for name in blocks_of(job.model, job.graph))
    return [site for site in job.quantizers if not f"{site.module}.".startswith(inside)]


def invoke(module: nn.Module, call: Call) -> Any:
    """Run a module on a call, on the device of its parameters; the call's tensors are never changed.

    Floating-point tensors are copied, because some blocks add to their input in place.
    """
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    placed = each_tensor(call, lambda value: value.to(device, copy=value.is_floating_point()))
    return module(*placed.args, **placed.kwargs)


def each_tensor(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """A call with its tensors changed, each once: attention asks whether query, key and value are the same object."""
    changed: dict[int, Tensor] = {}

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _rebuilt(value, take)
        if id(value) not in changed:
            changed[id(value)] = change(value)
        return changed[id(value)]

    made = Call(take(call.args), take(call.kwargs))
    changed.clear()  # `take` refers to itself: what it holds would live until Python looks for cycles
    return made


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """Tuples, lists and dicts with their members changed; anything else as it is."""
    if isinstance(value, tuple):
        members = [change(item) for item in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    if isinstance(value, list):
        return [change(item) for item in value]
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    return value


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


@dataclass
class _Caught:
    calls: list[Call] = field(default_factory=list)
    masks: list[Padding] = field(default_factory=list)


@dataclass
class _Step:
    """One block in execution order, and how its call follows from the block before (None: it has to be caught)."""

    name: str
    link: Callable[[Call, Tensor], Call] | None


def _raw(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call without the caches of generation: a block that is run several times would fill them each time."""

    def plain(value: Any) -> Any:
        return None if type(value).__name__.endswith("Cache") else value

    named = {key: plain(value) for key, value in kwargs.items()}
    if "use_cache" in named:
        named["use_cache"] = False
    return Call(tuple(plain(value) for value in args), named)


def _detached(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (type(a) is type(b) and isinstance(a, _CONSTANTS) and a == b)


def _link(before: Call, output: Tensor, after: Call) -> Callable[[Call, Tensor], Call] | None:
    """A function from this block's call and output to the next block's call; None when that needs other inputs."""
    sources: dict[int | str, tuple[str, Any]] = {}
    given = before.slots()
    for slot, value in after.slots().items():
        if value is output:
            sources[slot] = ("output", None)
        elif slot in given and _same(value, given[slot]):
            sources[slot] = ("slot", slot)
        elif (
            other := next((key for key, held in given.items() if isinstance(held, Tensor) and held is value), None)
        ) is not None:
            sources[slot] = ("slot", other)
        elif isinstance(value, _CONSTANTS):
            sources[slot] = ("constant", value)
        else:
            return None
    if not any(kind == "output" for kind, _ in sources.values()):
        return None

    # Do not hold the calls themselves: their tensors would live as long as the link.
    count = len(after.args)

    def follow(call: Call, new: Tensor) -> Call:
        held = call.slots()
        slots = {
            slot: new if kind == "output" else held[source] if kind == "slot" else source
            for slot, (kind, source) in sources.items()
        }
        args = tuple(slots[position] for position in range(count))
        return Call(args, {key: value for key, value in slots.items() if isinstance(key, str)})

    return follow


@contextmanager
def _catching(
    job: Job, model: nn.Module, blocks: Mapping[str, nn.Module], caught: dict[str, _Caught]
) -> Iterator[None]:
    """While active, every call of the blocks of ``model`` is copied into ``caught``."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into = caught.setdefault(name, _Caught())
            call = each_tensor(_raw(args, kwargs), _detached)
            for value in call.slots().values():
                if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                    raise InputError(f"{name} received NaN values; check the weights and the calibration data")
            into.calls.append(call)
            into.masks.append(mask.kept())

        return before

    with token_mask(model, job.graph) as mask:
        handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in blocks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _catch(job: Job, model: nn.Module, name: str) -> _Caught:
    """The calls of a block in one pass over the data, with the model as it is now."""
    caught: dict[str, _Caught] = {}
    with _catching(job, model, {name: model.get_submodule(name)}, caught):
        for index, batch in enumerate(job.batches):
            run(model, batch, index)
    return caught[name]


def _first_pass(job: Job, blocks: Mapping[str, nn.Module], all_heads: bool) -> tuple[list[_Step], dict[str, _Caught]]:
    """The order of the blocks; and the calls of those that follow from no other, or of the first of these only."""
    steps: list[_Step] = []
    with refusing_unplanned(job) as check:
        with _following(blocks, steps):
            run(job.model, job.batches.first)
        _refuse_unreached(job, blocks)
        heads = [step.name for step in steps if step.link is None]
        if not all_heads and job.stage != "transform":
            heads = heads[:1]
        caught: dict[str, _Caught] = {}
        with _catching(job, job.model, {name: blocks[name] for name in heads}, caught):
            for index, batch in enumerate(job.batches):
                run(job.model, batch, index)
                check(batch)
    return steps, caught


@contextmanager
def _following(blocks: Mapping[str, nn.Module], steps: list[_Step]) -> Iterator[None]:
    """While active, record the order of the blocks, and which blocks take the output of the one before unchanged."""
    # The block that ran last: its call and output are held, so that identity checks are valid. The version shows
    # whether the model has written into the output since.
    last: list[tuple[Call, Tensor, int] | None] = [None]
    running: dict[nn.Module, Call] = {}
    times: dict[str, int] = {}

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _raw(args, kwargs)
            running[module] = call
            times[name] = times.get(name, 0) + 1
            if times[name] == 1:
                follows = last[0] is not None and last[0][1]._version == last[0][2]
                steps.append(_Step(name, _link(*last[0][:2], call) if last[0] is not None and follows else None))

        return before

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = _first(output)
        last[0] = (running.pop(module), first, first._version)

    handles = [
        handle
        for name, module in blocks.items()
        for handle in (
            module.register_forward_pre_hook(enter(name), with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    # A block that runs several times in one forward (shared layers) cannot be followed, nor can what comes after it.
    for before, step in zip([None, *steps], steps, strict=False):
        if times[step.name] > 1 or (before is not None and times[before.name] > 1):
            step.link = None


def _refuse_unreached(job: Job, blocks: Mapping[str, nn.Module]) -> None:
    # A part of a block that ran (an expert) may run in another batch.
    unseen = [name for name in job.graph.unseen if not name.startswith(tuple(f"{block}." for block in blocks))]
    for name in unseen:
        mine = [site.name for site in job.quantizers if f"{site.module}.".startswith(f"{name}.")]
        if mine:
            raise InputError(
                f"the calibration data never reached {mine[0]}; feed data that does, or override its sites with keep"
            )


def original(block: Block) -> nn.Module:
    """A copy of the block as it is before a method changes its weights."""
    return copy.deepcopy(block.module)
