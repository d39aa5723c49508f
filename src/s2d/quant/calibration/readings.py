"""The weights of a block to round, and their inputs, in the order in which the layers run.

Layers that read the same input (q, k and v projections) form a group, so that statistics of an input are computed once.
A fused projection of ``nn.MultiheadAttention`` is a layer; called with query, key and value that differ, it reads three
inputs, one for each third of its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.models.masks import Padding, Where, token_mask
from s2d.models.running import real_tokens, run
from s2d.quant.calibration.observe import Job
from s2d.quant.calibration.walk import Block, Call, invoke
from s2d.quant.modules.attention import QuantizedAttention
from s2d.quant.modules.linear import QuantizedConv, QuantizedLayer, QuantizedLinear
from s2d.quant.modules.online import LINEAR_BUFFERS, OnlineLinear
from s2d.quant.modules.sites import Site, weight_name
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer

_OPERANDS: tuple[Where, ...] = ("q", "k", "v")


@dataclass(eq=False)
class Layer:
    """A module with a quantized weight.

    Attributes:
        site: The weight's site.
        module: A quantized Linear or convolution, or an ``nn.MultiheadAttention`` with a fused projection.
        quantizer: The weight's.
        weight: ``[out, in]``, ``[out, in, k, k]`` for a convolution.
        shared_with: Another name of the same parameter; empty when it has none.
    """

    site: Site
    module: nn.Module
    quantizer: WeightQuantizer
    weight: nn.Parameter
    shared_with: str

    @property
    def input_quantizer(self) -> Quantizer | None:
        """The quantizer of the input, None when it is kept."""
        if isinstance(self.module, QuantizedAttention):
            return self.module.attention_quantizer.input
        assert isinstance(self.module, QuantizedLayer)
        return self.module.input_quantizer

    @property
    def unfolds(self) -> bool:
        """Whether the layer is a matrix product, of unfolded patches if it is a convolution."""
        conv = self.module
        if not isinstance(conv, nn.Conv2d):
            return not isinstance(conv, QuantizedConv)
        return conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    @property
    def _unfolding(self) -> tuple[Any, ...]:
        """How a convolution cuts its input into patches; empty for a product of vectors."""
        conv = self.module
        return (conv.kernel_size, conv.dilation, conv.padding, conv.stride) if isinstance(conv, nn.Conv2d) else ()

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that a call of the module multiplies the weight with: one, or query, key and value."""
        if isinstance(self.module, nn.MultiheadAttention):
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            three = [given[name] for name in ("query", "key", "value")]
            return three[:1] if three[0] is three[1] is three[2] else three
        return [args[0] if args else kwargs["input"]]

    def transformed(self, x: Tensor) -> Tensor:
        """One of the `inputs` as the input quantizer sees it, after any online rotation or scaling."""
        return self.module.transform_input(x) if isinstance(self.module, QuantizedLinear) else x

    def rows(self, x: Tensor, masks: Padding, part: int | None = None) -> Tensor:
        """One of the `inputs` as vectors ``[N, in]`` (flattened patches for a convolution), padding left out.

        Args:
            x: The input.
            masks: Those of the forward.
            part: Which it is of query, key and value; None for the only one.
        """
        if isinstance(self.module, nn.Conv2d):
            patches = F.unfold(x, *self._unfolding)
            return patches.transpose(1, 2).flatten(0, 1)
        where: Where = "input" if part is None else _OPERANDS[part]
        return real_tokens(x, masks(self.site.module, where), "input").flatten(0, -2)

    def reads_as(self, other: Layer) -> bool:
        """Whether the same input reaches both weights as the same vectors, after their input quantizers."""
        if self._unfolding != other._unfolding or not _same_tensors(_online(self.module), _online(other.module)):
            return False
        mine, theirs = self.input_quantizer, other.input_quantizer
        if mine is None or theirs is None:
            return mine is theirs
        if type(mine) is not type(theirs) or (mine.format, mine.granularity) != (theirs.format, theirs.granularity):
            return False
        return _same_tensors(mine.state_dict(), theirs.state_dict())


def _online(module: nn.Module) -> dict[str, Tensor]:
    if not isinstance(module, OnlineLinear):
        return {}
    return {name: value for name in LINEAR_BUFFERS if (value := getattr(module, name)) is not None}


def _same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@dataclass(eq=False)
class Group:
    """Layers that read the same input.

    Attributes:
        layers: In the order in which they run.
        parts: How many tensors one call reads: one, or three.
        calls: How often they run in one forward.
    """

    layers: list[Layer]
    parts: int
    calls: int = 1


class BlockRuns:
    """Forwards of one block; each ends as soon as the wanted inputs have been seen."""

    cut = True

    def __init__(self, block: Block, teacher: nn.Module | None = None) -> None:
        """Run ``block``, and before it its full-precision copy ``teacher`` on the block's reference inputs."""
        self.block = block
        self.model = block.module
        self.teacher = teacher
        self.prefix = block.name

    def first(self) -> None:
        """One whole forward, of the first call."""
        with torch.no_grad():
            invoke(self.model, self.block.inputs[0])

    def all(self) -> Iterator[Padding]:
        """Every call: the teacher's forward, then the block's; gives the padding masks after each pair."""
        for index, call in enumerate(self.block.inputs):
            if self.teacher is not None:
                assert self.block.reference is not None
                self._run(self.teacher, self.block.reference[index])
            self._run(self.model, call)
            yield self.block.masks[index]

    def _run(self, module: nn.Module, call: Call) -> None:
        try:
            with torch.no_grad():
                invoke(module, call)
        except _Seen:
            pass


class ModelRuns:
    """Forwards of the whole model, for layers outside its blocks. They always run to the end: some models need it."""

    cut = False
    teacher = None
    prefix = ""

    def __init__(self, job: Job) -> None:
        """Run the model of ``job`` on its data."""
        self.job = job
        self.model = job.model

    def first(self) -> None:
        """One forward, of the first batch."""
        run(self.model, self.job.batches.first)

    def all(self) -> Iterator[Padding]:
        """Every batch; gives the padding masks after each."""
        with token_mask(self.model, self.job.graph) as mask:
            for index, batch in enumerate(self.job.batches):
                run(self.model, batch, index)
                yield mask


class _Seen(Exception):
    """Ends a forward whose remainder is not needed."""


def layers_of(job: Job, sites: Iterable[Site]) -> list[Layer]:
    """The layers behind the weights among some quantized sites; stacks are no layers, and are rounded to nearest."""
    names: dict[int, list[str]] = {}
    for name, parameter in job.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    layers = []
    for site in sites:
        quantizer = job.quantizers[site]
        if site.what == "weight" and not site.summed:
            assert isinstance(quantizer, WeightQuantizer)
            key = weight_name(job.model, site)
            weight = job.model.get_parameter(key)
            others = [name for name in names[id(weight)] if name != key]
            layers.append(
                Layer(site, job.model.get_submodule(site.module), quantizer, weight, others[0] if others else "")
            )
    return layers


def groups(layers: list[Layer], runs: BlockRuns | ModelRuns) -> list[Group]:
    """The layers in the order in which the first forward runs them, those that read the same input together.

    Layers that it does not reach are missing. A layer that runs several times stays alone: its later inputs may differ.
    """
    read: list[tuple[list[Layer], list[Tensor]]] = []
    calls: dict[Layer, int] = {}

    def hook(layer: Layer) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[layer] = calls.get(layer, 0) + 1
            if calls[layer] > 1:
                return
            inputs = layer.inputs(args, kwargs)
            for members, others in read:
                same = len(others) == len(inputs) and all(a is b for a, b in zip(others, inputs, strict=True))
                if same and layer.reads_as(members[0]):
                    members.append(layer)
                    return
            read.append(([layer], inputs))

        return before

    handles = [layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        runs.first()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for members, inputs in read:
        if all(calls[layer] == 1 for layer in members):
            found.append(Group(members, len(inputs)))
        else:
            found += [Group([layer], len(inputs), calls[layer]) for layer in members]
    return found


def readings(group: Group, runs: BlockRuns | ModelRuns) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """What the layers of a group read in every forward.

    Yields:
        Which part it is; the vectors ``[N, in]`` behind the input quantizer, if that is on; and what the teacher reads
        in their place, ``[N, in]``, or None without a teacher.
    """
    lead = group.layers[0]
    quantizer = lead.input_quantizer
    with _watching(group, runs.model, runs) as seen, _watching(group, runs.teacher, runs) as wanted:
        for masks in runs.all():
            for position, inputs in enumerate(seen):
                for part, x in enumerate(inputs):
                    with torch.no_grad():
                        x = lead.transformed(x)
                        quantized = x if quantizer is None else quantizer(x)
                        other = lead.transformed(wanted[position][part]) if wanted else None
                    which = part if group.parts > 1 else None
                    read = lead.rows(quantized, masks, which)
                    yield part, read, None if other is None else lead.rows(other, masks, which)
            seen.clear()
            wanted.clear()


@contextmanager
def _watching(group: Group, model: nn.Module | None, runs: BlockRuns | ModelRuns) -> Iterator[list[list[Tensor]]]:
    """While active, record the inputs of a group in ``model``, and end each forward once they are known."""
    lead = group.layers[0]
    seen: list[list[Tensor]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append([x.detach() for x in lead.inputs(args, kwargs)])
        if runs.cut and len(seen) == group.calls:
            raise _Seen

    if model is None:
        yield seen
        return
    name = lead.site.module.removeprefix(runs.prefix).lstrip(".")
    handle = model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
