"""Sites inside experts: what one stack of matrices reads, where another stack of the same module writes it.

The activation between the two products of an expert is a site of `s2d.decay.written_sites`; its channels are rows of
one expert's matrix. All experts of a stack share a range when they are quantized, so a channel is measured against the
RMS of all of them.

Shapes: E experts, O outputs of a matrix, D channels of the site, N vectors (a token for each of its experts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from s2d.distributed.sharding import Groups, Part
from s2d.models.graph import Graph
from s2d.models.graph_parts import Call, Exactness
from s2d.models.stack_products import Stack, show_products, stacks_of
from s2d.models.walks import picked_from, writers_of
from s2d.spectral.statistics import Sums
from s2d.targets.stacked import StackTarget
from s2d.targets.weights import clean_name


@dataclass(frozen=True)
class StackSite:
    """What a stack reads.

    Attributes:
        owner: Path of the module that holds both stacks, in the model that was traced.
        reader: Name of the stack that reads it, in that module.
        writer: The stack that writes it.
        bias: Name of the parameter ``[E, O]`` that is added to the writer's products; empty if there is none.
        rows: The row of an expert's matrix that makes each channel, ``[D]``.
        mask: The model input that masks the tokens of the module's input; empty if none does.
    """

    owner: str
    reader: str
    writer: Stack
    bias: str
    rows: tuple[int, ...]
    mask: str


def stack_sites(graph: Graph) -> list[StackSite]:
    """The sites between stacks in a graph whose writer is known, one for each reader."""
    stacks = {(stack.owner, stack.name): stack for stack in stacks_of(graph)}
    found: dict[tuple[str, str], set[StackSite | None]] = {}
    for call in graph.products:
        for name in call.parameters if call.experts else ():
            owner, _, last = name.rpartition(".")
            if (owner, last) in stacks and owner == call.module:
                found.setdefault((owner, last), set()).add(_site(graph, call, last, stacks))
    return [site for sites in found.values() if len(sites) == 1 and (site := sites.pop()) is not None]


def _site(graph: Graph, call: Call, reader: str, stacks: dict[tuple[str, str], Stack]) -> StackSite | None:
    assert call.input is not None
    wanted: tuple[Exactness, ...] = ("exact", "near")
    writers = [w for w in writers_of(graph, call.input) if w.call.kind in ("product", "gain") and w.rows is not None]
    writer = next((w for exactness in wanted for w in writers if w.exactness == exactness), None)
    if writer is None or writer.rows is None or writer.call.experts != call.experts:
        return None
    owner, made = call.module, writer.call
    names = [name.rpartition(".")[2] for name in made.parameters if name.rpartition(".")[0] == owner == made.module]
    stack = next((stacks[owner, name] for name in names if (owner, name) in stacks), None)
    rows, shape = tuple(writer.rows.indices()), list(graph.nodes[call.input].shape)
    width = shape[-2] if call.side == "left" and len(shape) > 1 else shape[-1]
    if stack is None or len(rows) != width or len(set(rows)) < len(rows):
        return None
    first = next(each for each in graph.products if each.module == owner and each.input is not None)
    assert first.input is not None
    mask = graph.mask_at(picked_from(graph, first.input))
    return StackSite(owner, reader, stack, _bias(graph, made, owner), rows, "" if mask is None else mask.key)


def _bias(graph: Graph, made: Call, owner: str) -> str:
    """The parameter ``[E, O]`` that is added to a product, its rows picked as the matrices are."""
    todo = [made.output]
    while todo:
        for operation in graph.consumers.get(todo.pop(), []):
            todo += operation.outputs if operation.kind == "view" else ()
            for number in operation.inputs if operation.kind == "add" else ():
                node = graph.nodes[number]
                while not node.parameters and node.operation >= 0 and graph.operations[node.operation].kind == "lookup":
                    node = graph.nodes[graph.operations[node.operation].inputs[0]]
                for parameter in node.parameters:
                    for name in graph.names[parameter]:
                        if name.rpartition(".")[0] == owner and len(graph.shapes[parameter]) == 2:
                            return name.rpartition(".")[2]
    return ""


def stack_target(path: str, module: nn.Module, name: str, summed: int, bias: str) -> StackTarget:
    """The stack that a module at this path of the model holds under this name."""
    full = f"{path}.{name}".lstrip(".")
    return StackTarget(full, path, module, name, None, "linear", summed=summed, bias_name=bias)


class StackSites:
    """The sites of a decay inside experts: which modules are looked into, and what they show.

    Attributes:
        modules: The modules that hold stacks, by path; only their run tells whether they do.
        found: The writers found so far, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look for modules with parameters of three dimensions."""
        self.modules = {
            clean_name(path): module
            for path, module in model.named_modules()
            if sum(p is not None and p.ndim == 3 and p.is_floating_point() for p in module._parameters.values()) > 1
        }
        self.found: dict[str, StackTarget] = {}
        self.busy = False  # a module runs once more

    def show(
        self,
        path: str,
        sites: Sequence[StackSite],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        real: Tensor | None,
        groups: Groups,
        see: Callable[[str, tuple[int, ...], str, Sums], None],
    ) -> None:
        """Run a module once more; ``see`` gets the writer's name, its rows, the reader and the sums of each site."""
        module = self.modules[path]
        by_reader = {site.reader: site for site in sites}
        targets = {s.reader: stack_target(path, module, s.writer.name, s.writer.summed, s.bias) for s in sites}
        self.found |= {target.name: target for target in targets.values()}

        def show(name: str, experts: Tensor, x: Tensor, y: Tensor, kept: Tensor | None) -> None:
            site, target = by_reader.get(name), targets.get(name)
            if site is None or target is None:
                return
            if kept is not None:
                experts, x = experts[kept], x[kept]
            order = sorted(range(len(site.rows)), key=site.rows.__getitem__)
            if order != list(range(len(order))):
                x = x[:, torch.tensor(order, device=x.device)]
            count, outputs = len(target.parameter), target.parameter.shape[3 - target.summed]
            sums = stack_sums(experts, x, count, Part(count * x.shape[1], row_groups=groups))
            if sums is not None:
                see(target.name, _rows_of_all(count, outputs, tuple(sorted(site.rows))), name, sums)

        names = tuple(dict.fromkeys((*by_reader, *(site.writer.name for site in sites))))
        self.busy = True
        try:
            show_products(module, names, args, kwargs, show, real)
        finally:
            self.busy = False


@cache
def _rows_of_all(count: int, outputs: int, rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(expert * outputs + row for expert in range(count) for row in rows)


def stack_sums(experts: Tensor, x: Tensor, count: int, part: Part) -> Sums | None:
    """The statistics of a site, its channels those of the first expert, then of the second, and so on.

    Args:
        experts: By which expert each vector goes, ``[N]``.
        x: The site, ``[N, D]``.
        count: E.
        part: Which part of the vectors this rank has; of ``E * D`` channels.

    Returns:
        Sums whose RMS is that of all entries of ``x``; None without any, or where one is NaN or Inf (zeros, where other
        ranks may have some).
    """
    x = x.float()
    if len(x) == 0 or not bool(torch.isfinite(x).all()):
        nothing = x.new_zeros(count * x.shape[1])
        return Sums(nothing, nothing.clone(), 0, part) if part.groups else None
    at = experts[:, None].expand_as(x)
    largest = x.new_zeros(count, x.shape[1]).scatter_reduce_(0, at, x.abs(), "amax")
    squares = x.new_zeros(count, x.shape[1]).index_add_(0, experts, x.square())
    # A vector fills the channels of one expert of E.
    return Sums(largest.flatten(), squares.flatten() * count, len(x), part)
