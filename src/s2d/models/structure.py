"""The structure of a recorded forward: attentions, norms, blocks, masks, and modules that did not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from s2d.models.graph import Graph
from s2d.models.graph_parts import Attention, Axis, Blocks, Call, Mask, Node, Norm, Operation
from s2d.models.operations import BATCH_NORMS, GROUP_NORMS, LAYER_NORMS
from s2d.models.walks import activations, readers_of, reads, source_of, writers_of

if TYPE_CHECKING:
    from s2d.models.recording import Tracer
    from s2d.models.tensors import Run

_BETWEEN_SCORES = frozenset(
    ("view", "multiply", "add", "join", "homogeneous", "activation", "routing", "reduction", "lookup")
)
_AFTER_SOFTMAX = frozenset(("view", "multiply", "join", "homogeneous", "reduction"))
_MOST_STEPS = 60


def finish(tracer: Tracer, given: dict[str, Tensor]) -> Graph:
    """The graph of a tracer's records."""
    called = {name for call in tracer.calls for name in call.parameters}
    unseen_modules = _unseen(tracer, called)
    below = tuple(f"{path}." for path in unseen_modules)
    axes = [Axis(*row, tracer.axes.find(i)) for i, row in enumerate(tracer.axes.table)]
    graph = Graph(
        model_class=type(tracer.model).__name__,
        names=tracer.names,
        shapes=tracer.shapes,
        axes=axes,
        nodes=tracer.nodes,
        operations=tracer.operations,
        calls=tracer.calls,
        outputs=tuple(dict.fromkeys(tracer.outputs)),
        unused=tuple(names[0] for names in tracer.names if names[0] not in called and not names[0].startswith(below)),
        unseen=(*unseen_modules, *_unseen_experts(tracer)),
        unknown=tuple(tracer.unknown),
        inputs={key: tuple(value.shape) for key, value in given.items()},
    )
    graph.attentions = _attentions(graph)
    graph.masks = _masks(graph, tracer.padding)
    graph.norms = _norms(graph)
    graph.blocks = _blocks(tracer, {one.context for one in graph.attentions}, _residual_sums(graph))
    return graph


# -- what did not run --------------------------------------------------------------------------------------------------


def _unseen(tracer: Tracer, called: set[str]) -> tuple[str, ...]:
    """The outermost modules with parameters of which nothing ran."""
    found: list[str] = []
    for path, module in tracer.model.named_modules():
        if not path or path.startswith(tuple(f"{p}." for p in found)):
            continue
        prefix = f"{path}."
        ran = path in tracer.entered or any(p.startswith(prefix) for p in tracer.entered)
        names = [f"{prefix}{name}" for name, _ in module.named_parameters()]
        if names and not ran and not any(name in called for name in names):
            found.append(path)
    return tuple(found)


def _unseen_experts(tracer: Tracer) -> list[str]:
    ran: dict[tuple[str, ...], set[int]] = {}
    for call in tracer.calls:
        if call.experts:
            ran.setdefault(call.parameters, set()).update(call.experts)
    out: list[str] = []
    for names, shape in zip(tracer.names, tracer.shapes, strict=True):
        if names in ran:
            out += [f"{names[0]}[{e}]" for e in range(shape[0]) if e not in ran[names]]
    return out


# -- attention ---------------------------------------------------------------------------------------------------------


def _attentions(graph: Graph) -> list[Attention]:
    found: list[tuple[int, Attention]] = []
    for operation in graph.operations:
        if operation.kind == "attention" and len(operation.inputs) > 2:
            q, k, v = operation.inputs[:3]
            mask = operation.inputs[3] if len(operation.inputs) > 3 else None
            found.append((operation.index, _attention(graph, "fused", q, k, v, None, operation, operation, mask)))
        elif operation.kind == "softmax":
            one = _math_attention(graph, operation)
            if one is not None:
                found.append((one.scores, one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _math_attention(graph: Graph, softmax: Operation) -> Attention | None:
    scores, path = _scores_of(graph, softmax)
    context, probabilities = _context_of(graph, softmax)
    if scores is None or context is None:
        return None
    mask: int | None = None
    for step in path:
        if step.kind not in ("add", "join", "homogeneous"):
            continue
        for i in step.inputs:
            node = graph.nodes[i]
            on_way = i in {out for other in (*path, scores) for out in other.outputs}
            if not on_way and node.state != "weight" and len(node.shape) > 1 and mask is None:
                mask = i
    factors = [i for i in scores.inputs if graph.nodes[i].state != "weight"][-2:]
    if scores.name == "baddbmm" and mask is None:
        mask = scores.inputs[0]
    values = [i for i in context.inputs[-2:] if i != probabilities]
    if len(factors) < 2 or not values:
        return None
    return _attention(graph, "math", factors[0], factors[1], values[0], probabilities, scores, context, mask)


def _attention(
    graph: Graph, form: str, q: int, k: int, v: int, probabilities: int | None, scores: Operation, context: Operation,
    mask: int | None,
) -> Attention:  # fmt: skip
    heads, width = _heads(graph, q, form)
    return Attention(
        module=context.module,
        form=form,
        q=q,
        k=k,
        v=v,
        probabilities=probabilities,
        scores=scores.index,
        context=context.index,
        heads=heads,
        head_dim=width,
        q_calls=tuple(w for w in writers_of(graph, q) if w.call.kind != "bias"),
        k_calls=tuple(w for w in writers_of(graph, k) if w.call.kind != "bias"),
        v_calls=tuple(w for w in writers_of(graph, v) if w.call.kind != "bias"),
        mask=mask,
        mask_inputs=() if mask is None else _inputs_of(graph, mask),
    )


def _heads(graph: Graph, q: int, form: str) -> tuple[int, int]:
    """Heads and their width; what no input names in the leading dimensions are heads."""
    node = graph.nodes[q]
    width = node.shape[-1]
    if form == "fused" and len(node.shape) == 4:
        return node.shape[1], width
    heads = 1
    for dim in node.dims[:-2]:
        for digit in dim:
            if graph.axes[digit.axis].kind not in ("input", "derived"):
                heads *= digit.size
    return heads, width


def _scores_of(graph: Graph, softmax: Operation) -> tuple[Operation | None, list[Operation]]:
    """The product of two activations whose result a softmax reads, and what lies between."""
    todo: list[tuple[int, list[Operation]]] = [(softmax.inputs[0], [])]
    seen: set[int] = set()
    while todo:
        number, path = todo.pop(0)
        node = graph.nodes[number]
        if number in seen or node.operation < 0 or len(path) > _MOST_STEPS or node.state != "activation":
            continue
        seen.add(number)
        operation = graph.operations[node.operation]
        if operation.kind == "product":
            if not any(call.kind == "product" for call in graph.at(operation.index)):
                return operation, path
            continue
        if operation.kind in _BETWEEN_SCORES:
            todo += [(i, [*path, operation]) for i in operation.inputs]
    return None, []


def _context_of(graph: Graph, softmax: Operation) -> tuple[Operation | None, int]:
    """The product that weights values by a softmax's result, and the node that it reads."""
    todo, seen = [softmax.outputs[0]], {softmax.outputs[0]}
    while todo:
        number = todo.pop(0)
        for operation in graph.consumers.get(number, []):
            if operation.kind == "product" and not any(c.kind == "product" for c in graph.at(operation.index)):
                return operation, number
            if operation.kind in _AFTER_SOFTMAX:
                for out in operation.outputs:
                    if out not in seen:
                        seen.add(out)
                        todo.append(out)
    return None, -1


def _inputs_of(graph: Graph, start: int) -> tuple[str, ...]:
    """Keys of the batch that a value is made from, not through products and embeddings."""
    found: dict[str, None] = {}
    todo, seen = [start], {start}
    while todo:
        node = graph.nodes[todo.pop()]
        if node.source.startswith("input:"):
            found[node.source[6:]] = None
        if node.operation < 0 or graph.operations[node.operation].kind in ("product", "embedding", "convolution"):
            continue
        for i in graph.operations[node.operation].inputs:
            if i not in seen:
                seen.add(i)
                todo.append(i)
    return tuple(sorted(found))


def _masks(graph: Graph, padding: dict[str, float]) -> tuple[Mask, ...]:
    """Inputs ``[B, T]`` that reach an attention's mask and are no tokens themselves."""
    keys = {key for one in graph.attentions for key in one.mask_inputs} | set(padding)
    found: list[Mask] = []
    for node in graph.nodes:
        key = node.source[6:] if node.source.startswith("input:") else None
        if key is None or (key not in keys and not key.endswith("mask")) or len(node.shape) != 2 or min(node.shape) < 2:
            continue
        if key not in padding and _is_content(graph, node.id):
            continue
        axes = tuple(dim[0].axis for dim in node.dims)
        if key in keys or any(graph.axes[a].same_as != a or _has_twin(graph, a) for a in axes[1:]):
            found.append(Mask(key, axes, padding.get(key)))
    return tuple(found)


def _has_twin(graph: Graph, axis: int) -> bool:
    return any(i != axis and each.same_as == graph.axes[axis].same_as for i, each in enumerate(graph.axes))


def _is_content(graph: Graph, node: int) -> bool:
    return any(r.kind in ("embedding", "product", "convolution") for r in readers_of(graph, node))


# -- norms -------------------------------------------------------------------------------------------------------------


def _norms(graph: Graph) -> list[Norm]:
    found: list[Norm] = []
    for operation in graph.operations:
        if operation.kind == "norm":
            calls = {call.kind: call for call in graph.at(operation.index)}
            kind = (
                "layer" if operation.name in LAYER_NORMS else "batch" if operation.name in BATCH_NORMS
                else "group" if operation.name in GROUP_NORMS else "rms"
            )  # fmt: skip
            found.append(_norm(graph, kind, operation.inputs[0], operation.outputs[0], calls, operation.module))
        elif operation.kind == "multiply":
            gain = next((c for c in graph.at(operation.index) if c.kind == "gain"), None)
            normed = None if gain is None or gain.input is None else _normalised(graph, gain.input)
            if gain is not None and normed is not None:
                found.append(_norm(graph, normed[0], normed[1], gain.output, {"gain": gain}, operation.module))
    return found


def _norm(graph: Graph, kind: str, source: int, output: int, calls: dict[str, Call], module: str) -> Norm:
    gain, bias = calls.get("gain"), calls.get("bias")
    if bias is None and gain is not None:
        readers = readers_of(graph, output)
        only = readers[0].call if len(readers) == 1 else None
        if readers and readers[0].kind == "bias" and only is not None and len(graph.nodes[only.output].shape) > 1:
            owner = gain.parameter.rpartition(".")[0]
            if only.parameter.rpartition(".")[0] == owner:
                bias, output = only, only.output
    return Norm(
        module=module,
        kind=kind,
        gain=gain.parameters if gain else (),
        bias=bias.parameters if bias else (),
        applied=gain.applied if gain else "",
        input=source,
        output=output,
        readers=tuple(readers_of(graph, output)),
    )


def _normalised(graph: Graph, number: int) -> tuple[str, int] | None:
    """Whether a value is another one over a statistic of it: the norm's kind, and what was normalised."""
    number = source_of(graph, number)
    node = graph.nodes[number]
    if node.operation < 0 or graph.operations[node.operation].kind != "multiply":
        return None
    live = activations(graph, graph.operations[node.operation])
    if len(live) < 2 or not node.shape:
        return None
    for one, other in ((live[0], live[1]), (live[1], live[0])):
        if one.shape != node.shape or other.shape[-1:] != (1,) or node.shape[-1] == 1:
            continue
        before = _before_mean(graph, one)
        if reads(graph, other, one.id) or reads(graph, other, before):
            return ("rms", one.id) if before == one.id else ("layer", before)
    return None


def _before_mean(graph: Graph, node: Node) -> int:
    """The node before the subtraction of its mean; the node itself without one."""
    made = source_of(graph, node.id)
    operation = graph.nodes[made].operation
    if (
        operation < 0
        or graph.operations[operation].name not in ("sub", "sub_")
        or (len(graph.operations[operation].inputs) < 2)
    ):
        return node.id
    first, second = graph.operations[operation].inputs[:2]
    return first if reads(graph, graph.nodes[second], first, 4) else node.id


# -- blocks ------------------------------------------------------------------------------------------------------------


def _residual_sums(graph: Graph) -> set[int]:
    """The operations that add two activations of one shape."""
    found = set()
    for operation in graph.operations:
        shapes = [node.shape for node in activations(graph, operation)] if operation.kind == "add" else []
        if len(shapes) == 2 and shapes[0] == shapes[1]:
            found.add(operation.index)
    return found


def _blocks(tracer: Tracer, attended: set[int], sums: set[int]) -> list[Blocks]:
    work = {op for op in (call.operation for call in tracer.calls if call.kind in ("product", "convolution"))}
    spans = [range(run.first, run.last) for run in tracer.runs]
    by_owner: dict[str, list[int]] = {}
    for index, run in enumerate(tracer.runs):
        parts = bool(run.path) and any(True for _ in tracer.by_path[run.path].children())
        if parts and any(op in work for op in spans[index]):
            by_owner.setdefault(run.path.rpartition(".")[0], []).append(index)
    lists = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    working = {c: runs for c, runs in by_owner.items() if isinstance(tracer.by_path.get(c), lists)}
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
            runs = [i for i, c in zip(by_owner[container], classes, strict=True) if listed or classes.count(c) > 1]
            adding = [any(op in sums for op in spans[i]) for i in runs]
            enough = any(adding) if listed and len(set(classes)) == 1 else all(adding)
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
        layers = [sum(op in work for op in spans[i]) for i in runs]
        if type(tracer.by_path[container]) in kinds_of and min(layers) > 1 and apart(runs):
            found[container] = runs
    # So is a list of one block with attention in it, in a model of one layer.
    for container, runs in working.items():
        lone = len(runs) == 1 and isinstance(tracer.by_path[container], nn.ModuleList)
        if lone and any(op in attended for op in spans[runs[0]]) and apart(runs):
            found[container] = runs
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


def _interleaved(
    tracer: Tracer, sequences: list[tuple[tuple[str, ...], list[int]]]
) -> list[tuple[tuple[str, ...], list[int]]]:
    """Merge sibling lists whose members run alternately into one sequence."""
    out: list[tuple[tuple[str, ...], list[int]]] = []
    for names, runs in sequences:
        for place, (others, theirs) in enumerate(out):
            beside = others[0].rpartition(".")[0] == names[0].rpartition(".")[0]
            turns = min(runs) < max(theirs) and min(theirs) < max(runs)
            if beside and turns and tracer.runs[runs[0]].parent == tracer.runs[theirs[0]].parent:
                out[place] = ((*others, *names), sorted([*theirs, *runs]))
                break
        else:
            out.append((names, runs))
    return out
