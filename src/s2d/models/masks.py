"""Which tokens are real: every mask of a batch on its own tokens, as the traced graph has them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from s2d.models.dimensions import Digit
from s2d.models.graph import Graph
from s2d.models.graph_parts import Call
from s2d.models.walks import picked_from
from s2d.targets.padding import MASKS, real_of, without_first

# What of a module: what it reads, what it returns, or an operand of the attention in it.
Where: TypeAlias = Literal["input", "weight", "output", "q", "k", "probs", "v"]
# A mask's key; behind a colon that of the input whose tokens these are, which no mask hides; None: no tokens of an
# input; "": the graph cannot tell.
_Key: TypeAlias = "str | None"
_CANNOT_TELL = ""


class _Whose:
    """The mask of each module and value, computed from a graph once."""

    def __init__(self, graph: Graph | None) -> None:
        self.graph = graph
        self._known: dict[tuple[str, Where], list[_Key]] = {}
        masked = [] if graph is None else [axis for mask in graph.masks for axis in mask.axes[1:]]
        self._masked = set() if graph is None else {graph.axes[axis].same_as for axis in masked}
        # A mask that the model itself does not read says what is padding all the same.
        unread = set() if graph is None else MASKS & graph.inputs.keys() - {mask.key for mask in graph.masks}
        self._unread = bool(unread)
        self.frames: dict[str, list[Digit]] = {}  # rows and tokens of each input; a dimension of one position has none
        for node in () if graph is None else graph.nodes:
            if node.source.startswith("input:") and len(node.shape) in (2, 3):
                self.frames.setdefault(node.source[6:], [dim[0] for dim in node.dims[:2] if dim])

    def keys(self, module: str, where: Where) -> list[_Key]:
        """The key of the mask in each execution of a module."""
        known = self._known.get((module, where))
        if known is None:
            nodes = self._nodes(module, where)
            known = self._known[module, where] = [self.key(node) for node in nodes] or [_CANNOT_TELL]
        return known

    def key(self, node: int) -> _Key:
        """The key of the mask of a value's tokens."""
        graph = self.graph
        assert graph is not None
        mask = graph.mask_at(node)
        if mask is not None:
            return mask.key
        for key, frame in self.frames.items():
            if graph.has_whole(node, [digit.axis for digit in frame], [digit.size for digit in frame]):
                return _CANNOT_TELL if self._unread else f":{key}"
        # Of masked tokens that were cut, moved or picked out since only the running forward may know.
        return _CANNOT_TELL if self._origins(node) & self._masked else None

    def picked_from(self, module: str) -> _Key:
        """The key of the mask of the tokens that a module picks its rows from by number."""
        for node in self._nodes(module, "input")[:1]:
            assert self.graph is not None
            return self.key(picked_from(self.graph, node))
        return _CANNOT_TELL

    def _origins(self, node: int) -> set[int]:
        """The axes of inputs that a value's tokens come from."""
        graph = self.graph
        assert graph is not None
        found = set()
        for dim in graph.nodes[node].dims:
            for axis in (digit.axis for digit in dim):
                while graph.axes[axis].kind == "derived":
                    axis = graph.axes[axis].source
                found.add(graph.axes[axis].same_as)
        return found

    def _nodes(self, module: str, where: Where) -> list[int]:
        graph = self.graph
        if graph is None:
            return []
        if where in ("q", "k", "probs", "v"):
            mine = [one for one in graph.attentions if _within(one.module, module)]
            return [{"q": one.q, "probs": one.q, "k": one.k, "v": one.v}[where] for one in mine]
        calls = [call for call in graph.products if call.module == module]
        if not calls:  # a block, or a layer that multiplies in parts of itself
            below = [c for c in graph.products if _within(c.module, module) and not graph.tokens(c).routed]
            calls = below[-1:] if where == "output" else below[:1]
        first: dict[int, Call] = {}
        for call in calls:
            if where == "output" or call.run not in first:
                first[call.run] = call
        return [call.output if where == "output" else call.input for call in first.values() if call.input is not None]


def _within(path: str, module: str) -> bool:
    return not module or f"{path}.".startswith(f"{module}.")


@dataclass
class Padding:
    """The masks of one forward; called with a module's name it gives the mask of what that reads.

    Attributes:
        given: The masks of the batch by key, ``[B, T]``, True at real tokens; None where nothing is padded.
        seen: The mask of the running forward where the graph cannot tell, as the model's own modules are given it.
        sizes: Rows and tokens of the batch's inputs.
        prefix: First tokens of every sequence that are none either.
    """

    whose: _Whose
    prefix: int = 0
    given: dict[str, Tensor | None] = field(default_factory=dict)
    seen: Tensor | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)

    def learn(self, graph: Graph) -> None:
        """From the next forward on, take every mask as that of its own tokens in this graph."""
        self.whose = _Whose(graph)

    def __call__(self, module: str = "", where: Where = "input") -> Tensor | None:
        """The mask ``[B, T]`` of the tokens that a module reads, or returns; None if they are all real."""
        keys = self.whose.keys(module, where)
        return self._of(keys[min(self.turns.get(module, 0), len(keys) - 1)])

    def of_rows(self, module: str) -> Tensor | None:
        """The mask ``[B, T]`` of the tokens of which a module picks some by number (those of an expert)."""
        return self._of(self.whose.picked_from(module))

    def of_output(self, x: Tensor) -> Tensor | None:
        """The mask of one of the model's outputs, told by its dimensions and channels."""
        graph = self.whose.graph
        for node in () if graph is None else graph.outputs:
            shape = graph.nodes[node].shape  # pyright: ignore[reportOptionalMemberAccess]
            if len(shape) == x.ndim and shape[-1:] == x.shape[-1:]:
                return self._of(self.whose.key(node))
        return self.seen

    def _of(self, key: _Key) -> Tensor | None:
        if key is None:
            return None
        if key == _CANNOT_TELL:
            return self.seen
        real, key = self.given.get(key), key.removeprefix(":")
        if self.prefix and key in self.sizes:
            real = torch.ones(self.sizes[key], dtype=torch.bool) if real is None else real.clone()
            real[:, : self.prefix] = False
        return real

    def kept(self) -> Padding:
        """As it is now, on CPU."""
        given = {key: None if mask is None else mask.cpu() for key, mask in self.given.items()}
        seen = None if self.seen is None else self.seen.cpu()
        return replace(self, given=given, seen=seen, sizes=dict(self.sizes), turns=dict(self.turns))


@contextmanager
def token_mask(model: nn.Module, graph: Graph | None = None, prefix: int | None = None) -> Iterator[Padding]:
    """While active, what is yielded gives the padding masks of the running forward.

    With a graph each mask is that of its own tokens. Where the graph cannot tell (tokens cut or moved since, a part
    that did not run when it was traced, no batch to trace), it is the ``attention_mask`` ``[batch, tokens]`` (non-zero:
    a real token), or what torch's own encoders and self-attention call ``src_key_padding_mask`` and
    ``key_padding_mask`` (True or -inf: padding), of the outermost call that has one; inner modules that receive a
    two-dimensional one of their own (a model that trims its batch first) replace it. The first ``prefix`` tokens are
    none either; None takes that of the model's quantizers.
    """
    if prefix is None:  # of quantizers, which this room does not know by class
        told = [getattr(module, "prefix", 0) for module in model.modules()]
        prefix = max((number for number in told if isinstance(number, int)), default=0)
    padding = Padding(_Whose(graph), prefix)
    signatures = {module: inspect.signature(module.forward) for module in model.modules()}
    names = {module: name for name, module in model.named_modules()}
    watched = {
        module: signature
        for module, signature in signatures.items()
        if module is model or not MASKS.isdisjoint(signature.parameters)
    }

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model:
            _take(padding, watched[module], args, kwargs)
        found = real_of(watched[module], args, kwargs)
        if prefix and (found is not None or module is model):
            found = without_first(found, watched[module], args, kwargs, prefix)
        if found is not None:
            padding.seen = None if bool(found.all()) else found
        elif module is model:
            padding.seen = None

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        padding.turns[names[module]] = padding.turns.get(names[module], -1) + 1

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in watched]
    if graph is not None:  # modules that read the tokens of several masks in turn
        several = {c.module for c in graph.products if len(set(padding.whose.keys(c.module, "input"))) > 1}
        hooks += [module.register_forward_pre_hook(count) for module, name in names.items() if name in several]
    try:
        yield padding
    finally:
        for hook in hooks:
            hook.remove()


def _take(padding: Padding, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the masks of a batch, by name and by position, as the graph may have either."""
    padding.turns.clear()
    graph = padding.whose.graph
    if graph is None:
        return
    given: dict[str, Any] = {**kwargs, **{str(place): value for place, value in enumerate(args)}}
    with suppress(TypeError):
        bound = signature.bind_partial(*args, **kwargs).arguments
        given |= bound | {str(place): bound[name] for place, name in enumerate(signature.parameters) if name in bound}
    padding.given, padding.sizes = {}, {}
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    for key in tensors.keys() & padding.whose.frames.keys():
        if tensors[key].ndim in (2, 3):
            padding.sizes[key] = (tensors[key].shape[0], tensors[key].shape[1])
    for mask in graph.masks:
        if mask.key in tensors and tensors[mask.key].ndim == 2:
            real = mask.keeps(tensors[mask.key])
            padding.given[mask.key] = None if bool(real.all()) else real
