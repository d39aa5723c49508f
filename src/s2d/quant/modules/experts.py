"""Stacks of matrices in one parameter, mostly the weights of a layer's experts, quantized by one mechanism.

While a module with such parameters runs, it finds them rounded, and a torch function mode follows them through views,
lookups and casts to the products that they enter, where it puts the quantizer on the other factor:

    F.linear(x, w[e])    x @ w[e]    bmm    einsum    grouped_mm(x, w) and transformers' form of it

A quantized stack that meets an activation in any other operation is an error that names the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.quant.modules.attention import BADDBMMS, MATMULS
from s2d.quant.modules.linear import Quantized, swap_in, swap_out
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.numerics.stacks import StackQuantizer

_ADDED = (*BADDBMMS, torch.addmm, Tensor.addmm)  # their first operand is no factor
_PRODUCTS = frozenset((*MATMULS, *_ADDED, torch.mm, Tensor.mm, Tensor.__rmatmul__, F.linear, torch.einsum))
_GROUPED = frozenset(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"))  # by name: versions of torch lack some
_CASTS = frozenset((Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as))


class StackQuantizers(nn.Module):
    """The quantizer of one stack, and that of what is multiplied with it; None leaves it alone."""

    weight: StackQuantizer | None
    input: Quantizer | None

    def __init__(self, weight: Quantizer | None, input: Quantizer | None) -> None:
        """Hold both."""
        super().__init__()
        self.register_module("weight", weight)
        self.register_module("input", input)
        # Of the operand that is shown to the input's `watch`: which rows of the module's input its vectors are, and how
        # many that has.
        self.rows_seen: tuple[Tensor, int] | None = None


class QuantizedExperts(Quantized):
    """A module whose stacks are quantized; each stack ``NAME`` has its quantizers in ``NAME_quantizer``."""

    _stacks: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's forward, under the mode that quantizes its products."""
        with StackMode(self, (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def quantizers_of_stack(module: Any, name: str) -> StackQuantizers:
    """The quantizers of the stack that a module holds under this name."""
    return getattr(module, f"{name}_quantizer")


def swap_in_stacks(module: nn.Module, holders: dict[str, StackQuantizers], path: str) -> None:
    """Make a module quantize its stacks, in place.

    Raises:
        InputError: Something else has already replaced the module's forward.
    """
    swap_in(module, QuantizedExperts, {f"{name}_quantizer": holder for name, holder in holders.items()}, path)
    module.__dict__["_stacks"] = tuple(holders)


def swap_out_stacks(module: nn.Module) -> None:
    """Undo `swap_in_stacks`."""
    swap_out(module, tuple(f"{name}_quantizer" for name in module.__dict__.pop("_stacks")))


class StackMode(TorchFunctionMode):
    """Quantizes the products with the stacks of one module, for one run of it."""

    def __init__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        """Prepare one forward of ``module`` on these arguments."""
        super().__init__()
        self.module = module
        self.weights = WeakIdKeyDictionary()  # what was made of a stack: its name
        self.rows = WeakIdKeyDictionary()  # what was made of the module's input: which of its rows
        self.count = 0
        self.first = next((x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()), None)

    def __enter__(self) -> StackMode:
        watched = False
        for name in self.module._stacks:
            held, weight = quantizers_of_stack(self.module, name), self.module._parameters[name]
            rounded = weight if held.weight is None else held.weight(weight)
            if rounded in self.weights:  # tied to another stack of the module
                rounded = rounded.view(rounded.shape)
            self.weights[rounded] = name
            self.module.__dict__[name] = rounded  # found before the parameter
            watched |= held.input is not None and held.input.watch is not None
        if watched and self.first is not None and self.first.ndim > 1:
            self.count = self.first.shape[:-1].numel()
            self.rows[self.first] = torch.arange(self.count, device=self.first.device)
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        for name in self.module._stacks:
            self.module.__dict__.pop(name, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = [x for x in _tensors((*args, *kwargs.values())) if x in self.weights]
        if not named:
            out = func(*args, **kwargs)
            if len(self.rows):
                self._follow(func, args, out)
            return out
        if func in _PRODUCTS or getattr(func, "__name__", "") in _GROUPED:
            out = self._product(func, args, kwargs)
            if len(self.rows):
                self._follow(func, args, out)
            return out
        out = func(*args, **kwargs)
        made = [x for x in _tensors((out,)) if x.is_floating_point()]
        others = [x for x in _tensors((*args, *kwargs.values())) if x not in self.weights and x.is_floating_point()]
        if made and others and func not in _CASTS:
            raise InputError(
                f"{type(self.module).__name__} uses its weights {self.weights[named[0]]} in an unknown way "
                f"({getattr(func, '__name__', func)}); override their sites with keep"
            )
        for each in made:
            self.weights[each] = self.weights[named[0]]
        return out

    def _product(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A product of an activation with (a part of) a stack."""
        args, kwargs = list(args), dict(kwargs)
        places: list[tuple[Any, Any, Tensor]] = []  # where the operands stand
        for holder, keys in ((args, range(len(args))), (kwargs, list(kwargs))):
            for key in keys:
                value = holder[key]
                if isinstance(value, Tensor) and key not in ("bias", "out"):
                    places.append((holder, key, value))
                elif isinstance(value, (list, tuple)) and func is torch.einsum:
                    holder[key] = list(value)
                    places += [(holder[key], at, each) for at, each in enumerate(value) if isinstance(each, Tensor)]
        factors = places[1:] if func in _ADDED else places
        factors = factors if func is torch.einsum else factors[:2]
        weight = next((at for at, (_, _, x) in enumerate(factors) if x in self.weights), None)
        if weight is None or len(factors) != 2:
            return func(*args, **kwargs)
        holder, key, x = factors[1 - weight]
        held = quantizers_of_stack(self.module, self.weights[factors[weight][2]])
        if held.input is None or x in self.weights:
            return func(*args, **kwargs)
        if func is torch.einsum:
            dim = _summed_by(args[0], 1 - weight)
        else:
            first = weight == 0 if func is not Tensor.__rmatmul__ else weight == 1
            dim = -2 if first and func is not F.linear and x.ndim > 1 else -1
        rows = self.rows.get(x)
        held.rows_seen = None if rows is None else (rows, self.count)
        holder[key] = held.input(x) if dim == -1 else held.input(x.movedim(dim, -1)).movedim(-1, dim)
        held.rows_seen = None
        return func(*args, **kwargs)

    def _follow(self, func: Any, args: Any, out: Any) -> None:
        """Note which rows of the module's input the rows of a result are, as far as that can be told."""
        source: Any = next((x for x in _tensors(args) if x in self.rows), None)
        if source is None:
            return
        rows: Tensor | None = self.rows[source]
        assert rows is not None
        picks: Any = args[1] if func is Tensor.__getitem__ else args[2] if func is torch.index_select else None
        picks = picks[0] if isinstance(picks, tuple) and picks and isinstance(picks[0], Tensor) else picks
        if isinstance(picks, Tensor):
            plain = args[0] is source and source.ndim == 2 and isinstance(out, Tensor) and out.ndim == 2
            rows = rows[picks] if plain and picks.ndim == 1 else None
        elif getattr(func, "__name__", "") == "repeat_interleave":
            rows = rows.repeat_interleave(args[1]) if len(args) > 1 and isinstance(args[1], int) else None
        for each in _tensors((out,)):
            if rows is not None and each.ndim > 1 and each.shape[:-1].numel() == len(rows):
                self.rows[each] = rows


def stacks_of(graph: Graph) -> dict[str, list[tuple[str, int]]]:
    """The stacks of a traced model that can be quantized: by the module that holds and multiplies them, name and
    dimension that its products sum over.
    """
    found: dict[tuple[str, str], set[int]] = {}
    elsewhere: set[str] = set()
    for call in graph.products:
        for name in call.parameters if call.experts else ():
            owner, _, last = name.rpartition(".")
            if owner == call.module:
                found.setdefault((owner, last), set()).add(call.summed)
        if call.experts and not any(name.rpartition(".")[0] == call.module for name in call.parameters):
            elsewhere.update(call.parameters)
    made: dict[str, list[tuple[str, int]]] = {}
    for (owner, last), summed in found.items():
        if len(summed) == 1 and 0 not in summed and f"{owner}.{last}".lstrip(".") not in elsewhere:
            made.setdefault(owner, []).append((last, summed.pop()))
    return made


def real_rows(x: Tensor, seen: tuple[Tensor, int] | None, real: Tensor | None) -> Tensor:
    """The vectors of real tokens.

    Args:
        x: Vectors ``[N, D]`` that a stack reads.
        seen: Which rows of the module's input they are, ``[N]``, and how many it has; None if that is unknown.
        real: The mask ``[B, T]`` of the module's input, True at real tokens; None if they are all real.
    """
    if seen is None or real is None or len(seen[0]) != len(x) or seen[1] != real.numel():
        return x
    return x[real.flatten()[seen[0]]]


def _summed_by(equation: Any, operand: int) -> int:
    """The dimension of an operand of einsum, from its end, that only the two operands have."""
    if not isinstance(equation, str):
        return -1
    left, _, right = equation.replace(" ", "").partition("->")
    mine, other = left.split(",")[operand], left.split(",")[1 - operand]
    shared = [letter for letter in mine if letter in other and letter not in right and letter != "."]
    return mine.replace("...", "").rindex(shared[0]) - len(mine.replace("...", "")) if shared else -1


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
