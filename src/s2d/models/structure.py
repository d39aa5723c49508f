"""The structure of a recorded forward: attentions, norms, blocks, masks, and modules that did not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from s2d.models.blocks import find_blocks
from s2d.models.graph import Graph
from s2d.models.graph_parts import Attention, Axis, Call, Mask, Node, Norm, Operation
from s2d.models.operations import BATCH_NORMS, GROUP_NORMS, LAYER_NORMS
from s2d.models.walks import activations, readers_of, reads, source_of, writers_of

if TYPE_CHECKING:
    from s2d.models.recording import Tracer

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
    graph.blocks = find_blocks(tracer, graph)
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
