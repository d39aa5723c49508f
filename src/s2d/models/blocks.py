"""Blocks: modules that repeat in a model, and in which the model keeps a stream of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from s2d.models.graph import Graph
from s2d.models.graph_parts import Blocks
from s2d.models.tensors import Run
from s2d.models.walks import activations

if TYPE_CHECKING:
    from s2d.models.recording import Tracer

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def outermost(graph: Graph) -> list[Blocks]:
    """The sequences of blocks that are in no other and that hooks see: SqueezeBERT calls its blocks' ``forward``."""
    return [blocks for blocks in graph.blocks if not blocks.inside and all(run >= 0 for _, run in blocks.members)]


def blocks_of(model: nn.Module, graph: Graph) -> dict[str, nn.Module]:
    """The outermost blocks that repeat in a traced forward (`s2d.trace`), by name, in the order in which they run."""
    members = [path for blocks in outermost(graph) for path, _ in blocks.members]
    return {path: model.get_submodule(path) for path in dict.fromkeys(members)}


def find_blocks(tracer: Tracer, graph: Graph) -> list[Blocks]:
    """All sequences of blocks of a recorded forward, in the order in which they run."""
    _add_direct_calls(tracer)
    attended = {one.context for one in graph.attentions}
    work = {call.operation for call in tracer.calls if call.kind in ("product", "convolution")}
    spans = [range(run.first, run.last) for run in tracer.runs]
    layers = [sum(op in work for op in span) for span in spans]
    adding = {i for i, span in enumerate(spans) if layers[i] and _adds_to_stream(graph, span)}
    children: dict[str, list[int]] = {}
    for index, run in enumerate(tracer.runs):
        parts = any(True for _ in tracer.by_path[run.path].children())
        if run.path and (layers[index] > 1 or (layers[index] and parts) or index in adding):
            children.setdefault(run.path.rpartition(".")[0], []).append(index)
    # Some blocks of a list hold more than one layer (the convolutions between Twins' stages hold one); in the simplest
    # models, a row of Linears with their activations, none does.
    by_owner = {owner: [i for i in runs if layers[i] > 1 or i in adding] for owner, runs in children.items()
                if max(layers[i] for i in runs) > 1}  # fmt: skip
    single = {owner: runs for owner, runs in children.items() if owner not in by_owner}
    if not by_owner:
        by_owner, single = single, {}
    _drop_stages(tracer, by_owner, spans, work)
    for runs in by_owner.values():
        runs.sort(key=lambda i: spans[i].start)
    working = {c: runs for c, runs in by_owner.items() if isinstance(tracer.by_path.get(c), LISTS)}
    found: dict[str, list[int]] = {}
    for container, runs in working.items():
        kinds = [_signature(tracer, tracer.runs[i]) for i in runs]
        if any(_alike(a, b) for i, a in enumerate(kinds) for b in kinds[:i]):
            found[container] = runs

    def apart(runs: list[int]) -> bool:
        """Whether runs hold no block found so far, and are in none."""
        others = [spans[i] for members in found.values() for i in members]
        return not any(o.start < spans[i].stop and spans[i].start < o.stop for o in others for i in runs)

    # Blocks of one class with several sizes (the first of a stage widens), or of several classes that take turns
    # (attention and a state space): each adds to a stream. Inner lists come first.
    # Where no list holds blocks, modules of one class that stand beside each other (RegNet's b1, b2) are some.
    inner_first = sorted(by_owner, key=lambda path: -len(path.split(".")) if path else 0)
    for listed in (True, False):
        for container in () if found and not listed else inner_first:
            classes = [type(tracer.by_path[tracer.runs[i].path]) for i in by_owner[container]]
            alike = [i for i, c in zip(by_owner[container], classes, strict=True) if classes.count(c) > 1]
            runs = by_owner[container] if listed else alike
            enough = adding.issuperset(runs) or (listed and not adding.isdisjoint(alike))
            if listed == (container in working) and len(runs) > 1 and enough and apart(runs):
                found[container] = runs
    # A stage of one block is a sequence too, where other stages hold more of its kind.
    known = {_kind(tracer, i) for runs in found.values() for i in runs}
    beside = working if found.keys() <= working.keys() else by_owner
    found |= {c: runs for c, runs in beside.items() if all(_kind(tracer, i) in known for i in runs)}
    # Stages stand in a list: where two of them hold blocks, so do the others, if not a single layer (a last 1x1).
    stages: dict[str, list[str]] = {}
    for container in found:
        stages.setdefault(container.rpartition(".")[0], []).append(container)
    for container, runs in working.items():
        others = stages.get(container.rpartition(".")[0], [])
        kinds_of = {type(tracer.by_path[other]) for other in others} if len(others) > 1 else set()
        if type(tracer.by_path[container]) in kinds_of and min(layers[i] for i in runs) > 1 and apart(runs):
            found[container] = runs
    # So is a list of one block with attention in it, in a model of one layer.
    for container, runs in working.items():
        lone = len(runs) == 1 and isinstance(tracer.by_path[container], nn.ModuleList)
        if lone and any(op in attended for op in spans[runs[0]]) and apart(runs):
            found[container] = runs
    # Lists of single layers hold blocks where they take turns with such a list.
    lists = {c: runs for c, runs in single.items() if isinstance(tracer.by_path[c], LISTS)}
    found |= {c: runs for c, runs in lists.items() if any(_take_turns(tracer, (c, runs), it) for it in found.items())}
    ordered = sorted((((container,), runs) for container, runs in found.items()), key=lambda pair: pair[1][0])
    sequences: list[tuple[tuple[str, ...], list[int]]] = _interleaved(tracer, ordered)
    members = {i for _, runs in sequences for i in runs}
    out: list[Blocks] = []
    for containers, runs in sequences:
        rows = [tracer.runs[i] for i in runs]
        inside = tracer.runs[runs[0]].parent
        while inside >= 0 and inside not in members:
            inside = tracer.runs[inside].parent
        out.append(
            Blocks(
                containers,
                tuple((row.path, row.run) for row in rows),
                tracer.runs[inside].path if inside >= 0 else "",
                len({row.path for row in rows}) < len(rows),
            )
        )
    return out


def _add_direct_calls(tracer: Tracer) -> None:
    """An execution, numbered -1, for each module whose ``forward`` is called past its hooks: the span of its parts."""
    spans: dict[tuple[int, str], list[int]] = {}
    for index, run in enumerate(tracer.runs):
        owner = run.path.rpartition(".")[0]
        if owner and run.parent >= 0 and owner not in tracer.entered and not isinstance(tracer.by_path[owner], LISTS):
            spans.setdefault((run.parent, owner), []).append(index)
    for (parent, owner), parts in spans.items():
        first, last = tracer.runs[parts[0]].first, tracer.runs[parts[-1]].last
        for index in parts:
            tracer.runs[index].parent = len(tracer.runs)
        tracer.runs.append(Run(owner, -1, first, last, parent))


def _adds_to_stream(graph: Graph, span: range) -> bool:
    """Whether a block adds two activations of one shape, or joins what was made before it to another one."""
    for operation in graph.operations[span.start : span.stop]:
        if operation.kind not in ("add", "join"):
            continue
        live = activations(graph, operation)
        if operation.kind == "add" and len(live) == 2 and live[0].shape == live[1].shape:
            return True
        if operation.name == "cat" and len(live) > 1 and any(0 <= node.operation < span.start for node in live):
            return True
    return False


def _drop_stages(tracer: Tracer, by_owner: dict[str, list[int]], spans: list[range], work: set[int]) -> None:
    """Leave out stages: lists with two members of one class, modules that hold one such list and at most one more
    layer, and what stands beside them and is of their class (a stage may hold one block).
    """
    kind = [type(tracer.by_path[run.path]) for run in tracer.runs]
    path = [run.path for run in tracer.runs]
    lists = [
        c for c, runs in by_owner.items()
        if isinstance(tracer.by_path[c], LISTS) and len({kind[i] for i in runs}) < len({path[i] for i in runs})
    ]  # fmt: skip

    def is_stage(index: int) -> bool:
        held = [c for c in lists if path[index] in (c, c.rpartition(".")[0])]
        inner = {op for c in held for i in by_owner[c] for op in spans[i]}
        return len(held) == 1 and len((work & set(spans[index])) - inner) < 2

    stages = {owner: {kind[i] for i in runs if is_stage(i)} for owner, runs in by_owner.items()}
    for owner, classes in stages.items():
        by_owner[owner] = [i for i in by_owner[owner] if kind[i] not in classes]
        if not by_owner[owner]:
            del by_owner[owner]


def _signature(tracer: Tracer, run: Run) -> tuple[str, dict[str, tuple[int, ...]]]:
    module = tracer.by_path[run.path]
    return type(module).__name__, {name: tuple(p.shape) for name, p in module.named_parameters()}


def _kind(tracer: Tracer, run: int) -> tuple[str, frozenset[str]]:
    """Class and parameters by name, whatever their sizes."""
    name, shapes = _signature(tracer, tracer.runs[run])
    return name, frozenset(shapes)


def _alike(a: tuple[str, dict[str, tuple[int, ...]]], b: tuple[str, dict[str, tuple[int, ...]]]) -> bool:
    """Whether both have one class and equal common parts: the first block may have an extra table or lack a norm."""
    common = a[1].keys() & b[1].keys()
    return a[0] == b[0] and bool(common) and all(a[1][name] == b[1][name] for name in common)


def _take_turns(tracer: Tracer, one: tuple[str, list[int]], other: tuple[str, list[int]]) -> bool:
    """Whether two lists, each with its runs, stand beside each other and run alternately."""
    (name, runs), (another, theirs) = one, other
    beside = name.rpartition(".")[0] == another.rpartition(".")[0]
    turns = min(runs) < max(theirs) and min(theirs) < max(runs)
    return beside and turns and tracer.runs[runs[0]].parent == tracer.runs[theirs[0]].parent


def _interleaved(
    tracer: Tracer, sequences: list[tuple[tuple[str, ...], list[int]]]
) -> list[tuple[tuple[str, ...], list[int]]]:
    """Merge sibling lists whose members run alternately into one sequence."""
    out: list[tuple[tuple[str, ...], list[int]]] = []
    for names, runs in sequences:
        for place, (others, theirs) in enumerate(out):
            if _take_turns(tracer, (names[0], runs), (others[0], theirs)):
                out[place] = ((*others, *names), sorted([*theirs, *runs]))
                break
        else:
            out.append((names, runs))
    return out
