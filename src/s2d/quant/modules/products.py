"""Products of two activations in a traced forward: attentions, and whether their operands can be quantized."""

from __future__ import annotations

from torch import nn

from s2d.models.graph import Graph
from s2d.models.graph_parts import Attention, Operation

KEPT = "computes attention in a way that cannot be quantized yet"


def attentions_of(model: nn.Module, graph: Graph) -> dict[str, str]:
    """The modules that compute attention, each with the reason why its products cannot be quantized; empty if they can.

    An attention belongs to the innermost module that runs both of its products.
    """
    owners: dict[str, list[Attention]] = {}
    for one in graph.attentions:
        at = [graph.operations[number].module for number in (one.scores, one.context)]
        owners.setdefault(_owner(model, at[0], at[1]), []).append(one)
    return {name: _reason(model, graph, name, owners) for name in sorted(owners, key=_order(model).__getitem__)}


def other_products(model: nn.Module, graph: Graph) -> dict[str, int]:
    """Modules that multiply two activations outside every attention, with their floating-point operations."""
    inside = attentions_of(model, graph)
    mine = {number for one in graph.attentions for number in (one.scores, one.context)}
    found: dict[str, int] = {}
    for operation in _products(graph):
        if operation.index not in mine and not _within(operation.module, inside):
            found[operation.module] = found.get(operation.module, 0) + operation.flops
    return found


def attention_flops(graph: Graph, name: str) -> int:
    """Floating-point operations of the products of two activations in an attention module."""
    return sum(operation.flops for operation in _products(graph) if _within(operation.module, (name,)))


def _products(graph: Graph) -> list[Operation]:
    """Operations that multiply two activations."""
    return [
        operation
        for operation in graph.operations
        if operation.flops and not any(call.kind in ("product", "convolution") for call in graph.at(operation.index))
    ]


def _within(module: str, names: object) -> bool:
    return any(f"{module}.".startswith(f"{name}." if name else "") for name in names)  # type: ignore[attr-defined]


def _order(model: nn.Module) -> dict[str, int]:
    return {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}


def _owner(model: nn.Module, a: str, b: str) -> str:
    """The innermost called module around both; module lists are not called."""
    common = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        common.append(x)
    while common and isinstance(model.get_submodule(".".join(common)), (nn.ModuleList, nn.ModuleDict)):
        common.pop()
    name = ".".join(common)
    # Leaves of torch.nn (a Softmax, a Dropout) act for the module that calls them.
    leaf = name and type(model.get_submodule(name)).__module__.startswith("torch.nn.modules")
    return (
        name.rpartition(".")[0] if leaf and not isinstance(model.get_submodule(name), nn.MultiheadAttention) else name
    )


def _reason(model: nn.Module, graph: Graph, name: str, owners: dict[str, list[Attention]]) -> str:
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        return ""
    inner = [other for other in owners if other != name and _within(other, (name,))]
    here = [o for o in graph.operations if _within(o.module, (name,)) and not _within(o.module, inner)]
    mine = owners[name]
    known = {number for one in mine for number in (one.scores, one.context)}
    numbers = {operation.index for operation in _products(graph)}
    kind = type(module).__name__
    if any(operation.index in numbers - known for operation in here):
        return f"{kind} {KEPT}: more than two products of activations"
    by_hand = [one for one in mine if one.form == "math"]
    softmaxes = [operation for operation in here if operation.kind == "softmax"]
    if len(softmaxes) > len(by_hand):
        return f"{kind} {KEPT}: a softmax that is not between the two products"
    sizes = {_size(graph.nodes[operation.outputs[0]].shape) for operation in softmaxes}
    if any(
        one.probabilities is not None and _size(graph.nodes[one.probabilities].shape) not in sizes for one in by_hand
    ):
        return f"{kind} {KEPT}: its probabilities are cut or joined behind the softmax"
    return ""


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


__all__ = ["KEPT", "attention_flops", "attentions_of", "other_products"]
