"""Stacks of matrices in one parameter (the weights of all experts of a layer), followed into the products they enter.

A torch function mode follows a module's stacks through views, lookups and casts to the operations that multiply them:

    F.linear(x, w[e])    x @ w[e]    bmm    einsum    grouped_mm(x, w) and transformers' form of it

`stacks_of` finds in a graph which parameters are such stacks, and over which of their dimensions the products sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from s2d.errors import InputError
from s2d.models.graph import Graph

_ADDED = (torch.baddbmm, Tensor.baddbmm, torch.addmm, Tensor.addmm)  # their first operand is no factor
_PRODUCTS = frozenset((
    *_ADDED, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm,
    Tensor.bmm, F.linear, torch.einsum,
))  # fmt: skip
_GROUPED = frozenset(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"))  # by name: versions of torch lack some
_CASTS = frozenset((Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as))


@dataclass(frozen=True)
class Stack:
    """A parameter ``[E, out, in]`` or ``[E, in, out]``.

    Attributes:
        owner: Path of the module that holds it and multiplies by it.
        name: Its name there.
        summed: The dimension that the products sum over, 2 or 1.
    """

    owner: str
    name: str
    summed: int

    @property
    def parameter(self) -> str:
        """Its name in the model."""
        return f"{self.owner}.{self.name}".lstrip(".")


def stacks_of(graph: Graph) -> list[Stack]:
    """The stacks of a traced model whose products can be followed: the module that multiplies by them holds them."""
    found: dict[tuple[str, str], set[int]] = {}
    elsewhere: set[str] = set()
    for call in graph.products:
        if not call.experts:
            continue
        mine = [name for name in call.parameters if name.rpartition(".")[0] == call.module]
        for name in mine:
            found.setdefault((call.module, name.rpartition(".")[2]), set()).add(call.summed)
        if not mine:
            elsewhere.update(call.parameters)
    stacks = [Stack(owner, name, summed.pop()) for (owner, name), summed in found.items() if len(summed) == 1]
    return [stack for stack in stacks if stack.summed and stack.parameter not in elsewhere]


@dataclass(frozen=True)
class _Part:
    """What was made of a stack: its name, and which matrix each position of the first dimension is (None: unknown)."""

    name: str
    experts: Tensor | None


class StackMode(TorchFunctionMode):
    """Shows the products with the stacks of one module, for one run of it; subclasses say what happens to them."""

    def __init__(self, module: nn.Module, arguments: tuple[Any, ...], *, rows: bool) -> None:
        """Prepare one forward of ``module``.

        Args:
            module: Holds the stacks.
            arguments: Those of the forward.
            rows: Follow which rows of the first of them the operands are.
        """
        super().__init__()
        self.module = module
        self.parts = WeakIdKeyDictionary()
        self.rows = WeakIdKeyDictionary()
        first = next((x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()), None)
        self.first = first if rows and first is not None and first.ndim > 1 else None
        self.count = 0 if self.first is None else self.first.shape[:-1].numel()

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def stacks(self) -> Mapping[str, Tensor]:
        """What the module finds under the names of its stacks."""
        raise NotImplementedError

    def operand(self, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        """What is multiplied in the place of ``x [..., in]``; ``rows``: which rows of the module's input it is."""
        return x

    def product(self, name: str, experts: Tensor | None, x: Tensor, y: Tensor, rows: Tensor | None) -> None:
        """See a product ``y [N, out]`` of ``x [N, in]``, and by which matrix of the stack each vector goes."""

    # -- the mode ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> StackMode:
        for name, stack in self.stacks().items():
            found = stack.view(stack.shape) if stack in self.parts else stack  # tied to another of them
            self.parts[found] = _Part(name, torch.arange(len(stack), device=stack.device))
            self.module.__dict__[name] = found  # found before the parameter
        if self.first is not None:
            self.rows[self.first] = torch.arange(self.count, device=self.first.device)
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        for name in {part.name for part in self.parts.values()}:
            self.module.__dict__.pop(name, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        part = next((self.parts[x] for x in _tensors((*args, *kwargs.values())) if x in self.parts), None)
        if part is None or func in _PRODUCTS or getattr(func, "__name__", "") in _GROUPED:
            out = func(*args, **kwargs) if part is None else self._multiply(func, args, kwargs)
            if len(self.rows):
                self._follow(func, args, out)
            return out
        out = func(*args, **kwargs)
        made = [x for x in _tensors((out,)) if x.is_floating_point()]
        others = [x for x in _tensors((*args, *kwargs.values())) if x not in self.parts and x.is_floating_point()]
        if made and others and func not in _CASTS:
            raise InputError(
                f"{type(self.module).__name__} uses its weights {part.name} in an unknown way "
                f"({getattr(func, '__name__', func)}); override their sites with keep"
            )
        for place, each in enumerate(made):
            self.parts[each] = _Part(part.name, _experts_after(func, args, part.experts, each, place, len(made)))
        return out

    def _multiply(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A product of an activation with (a part of) a stack."""
        args, kwargs = list(args), dict(kwargs)
        places: list[tuple[Any, Any, Tensor]] = []  # where the operands stand
        for holder, keys in ((args, range(len(args))), (kwargs, list(kwargs))):
            for key in keys:
                value = holder[key]
                if isinstance(value, Tensor) and key not in ("bias", "out", "offs"):
                    places.append((holder, key, value))
                elif isinstance(value, (list, tuple)) and func is torch.einsum:
                    holder[key] = list(value)
                    places += [(holder[key], at, each) for at, each in enumerate(value) if isinstance(each, Tensor)]
        factors = places[1:] if func in _ADDED else places
        factors = factors if func is torch.einsum else factors[:2]
        weight = next((at for at, (_, _, x) in enumerate(factors) if x in self.parts), None)
        if weight is None or len(factors) != 2 or factors[1 - weight][2] in self.parts:
            return func(*args, **kwargs)
        holder, key, x = factors[1 - weight]
        part: _Part = self.parts[factors[weight][2]]
        if func is torch.einsum:
            dim = _summed_by(args[0], 1 - weight)
        else:
            first = weight == 0 if func is not Tensor.__rmatmul__ else weight == 1
            dim = -2 if first and func is not F.linear and x.ndim > 1 else -1
        rows = self.rows.get(x)
        replaced = self.operand(part.name, x.movedim(dim, -1), rows)
        holder[key] = replaced.movedim(-1, dim)
        out = func(*args, **kwargs)
        if type(self).product is not StackMode.product:
            grouped = getattr(func, "__name__", "") in _GROUPED
            ends = (kwargs.get("offs") if "offs" in kwargs else args[2]) if grouped else None
            self._show(func, part, factors[weight][2], replaced, out.movedim(dim, -1), ends, rows)
        return out

    def _show(
        self, func: Any, part: _Part, weight: Tensor, x: Tensor, y: Tensor, ends: Tensor | None, rows: Tensor | None
    ) -> None:
        experts = part.experts
        if ends is not None and experts is not None:
            counts = ends.diff(prepend=ends.new_zeros(1))
            experts = experts.repeat_interleave(counts.long())
            x, y = x[: len(experts)], y[: len(experts)]
        elif experts is not None and weight.ndim == 3 and func is not torch.einsum and len(y) == len(experts):
            experts = experts.repeat_interleave(y[0].shape[:-1].numel())
            x = x.expand(*y.shape[:-1], x.shape[-1])
        elif experts is not None and weight.ndim == 2 and len(experts) == 1:
            experts = experts.expand(y.shape[:-1].numel())
        else:
            experts = None
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        known = experts is not None and len(experts) == len(x) == len(y)
        self.product(part.name, experts if known else None, x, y, None if rows is None else rows[: len(x)])

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


Seen = Callable[[str, Tensor, Tensor, Tensor, "Tensor | None"], None]


class _Watching(StackMode):
    def __init__(
        self, module: nn.Module, names: tuple[str, ...], arguments: tuple[Any, ...], see: Seen, real: Tensor | None
    ) -> None:
        super().__init__(module, arguments, rows=real is not None)
        self.names, self.see, self.real = names, see, real

    def stacks(self) -> Mapping[str, Tensor]:
        return {name: self.module.get_parameter(name).detach() for name in self.names}

    def product(self, name: str, experts: Tensor | None, x: Tensor, y: Tensor, rows: Tensor | None) -> None:
        if experts is not None:
            with torch._C.DisableTorchFunction():
                self.see(name, experts, x, y, real_rows(rows, self.count, self.real))


def show_products(
    module: nn.Module,
    names: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    see: Seen,
    real: Tensor | None = None,
) -> None:
    """Run a module's forward once more, without gradients, and show its products with its stacks.

    Args:
        module: Holds the stacks.
        names: Their names.
        args, kwargs: Those of the call.
        see: Gets a stack's name, the matrix by which each vector goes ``[N]``, ``x [N, in]``, ``y [N, out]`` (without a
            bias), and which vectors are real tokens, ``[N]`` bool, None for all.
        real: The mask ``[B, T]`` of the tokens of the module's first input, True at real ones; None if all are.
    """
    cuda = [module.get_parameter(names[0]).device] if module.get_parameter(names[0]).is_cuda else []
    arguments = (*args, *kwargs.values())
    with torch.no_grad(), torch.random.fork_rng(cuda), _Watching(module, names, arguments, see, real):
        module.forward(*args, **kwargs)


def real_rows(seen: Tensor | None, count: int, real: Tensor | None) -> Tensor | None:
    """Which vectors are real tokens.

    Args:
        seen: Which rows of the module's input they are, ``[N]``; None if that is unknown.
        count: How many rows that input has.
        real: The mask ``[B, T]`` of the module's input, True at real tokens; None if they are all real.

    Returns:
        ``[N]`` bool; None for all.
    """
    return None if seen is None or real is None or count != real.numel() else real.flatten()[seen]


def _experts_after(func: Any, args: Any, experts: Tensor | None, made: Tensor, place: int, parts: int) -> Tensor | None:
    """Which matrices a view, a lookup or a cast of a stack holds."""
    if experts is None:
        return None
    if func in (Tensor.__getitem__, Tensor.select) or func is torch.select:
        if func is not Tensor.__getitem__ and args[1] != 0:
            return None
        picks = args[1] if func is Tensor.__getitem__ else args[2]
        if isinstance(picks, tuple) and len(picks) == 1:
            picks = picks[0]
        if len(experts) > 1 or made.ndim == 3:
            return experts[picks].reshape(-1) if isinstance(picks, (int, Tensor)) else None
        return None
    if parts > 1:
        return experts[place : place + 1] if parts == len(experts) and made.ndim == 2 else None
    return experts if made.ndim < 3 and len(experts) == 1 or made.ndim == 3 and len(made) == len(experts) else None


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
