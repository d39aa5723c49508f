"""Targets: the weights of a model that s2d measures and changes.

A target is a weight, not a module: a parameter, or the rows of one. Checkpoints disagree about how attention is stored
(one fused ``[3D, D]`` Linear, a bare ``in_proj_weight``, three separate projections) and a patch embedding is a
convolution; here each becomes matrices ``[out, in]`` with a stable, readable name.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from s2d.distributed.sharding import Block, is_dtensor
from s2d.errors import InputError

Kind: TypeAlias = Literal["linear", "conv", "embedding", "norm"]
Selector: TypeAlias = str | Sequence[str] | Callable[[nn.Module, str], bool]

KINDS: tuple[Kind, ...] = get_args(Kind)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUSED_QKV = frozenset({"qkv", "Wqkv", "qkv_proj", "query_key_value", "in_proj_weight", "c_attn"})
# In these models the rows of q, k and v alternate head by head. No row slice holds one of them, so it stays whole.
_INTERLEAVED_QKV = ("GPTNeoX", "Bloom", "Falcon")
_WRAPPER_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


@dataclass(frozen=True, eq=False)
class Target:
    """One weight of a model, or the rows of one.

    Attributes:
        name: The parameter's dotted name, with a suffix such as ``[0:384]`` when it is a slice. Names do not depend on
            ``torch.compile`` or data-parallel wrappers.
        module_name: Dotted name of the module that owns the parameter, without wrappers.
        module: That module.
        parameter_name: Attribute of the module that holds the parameter, mostly ``"weight"``.
        rows: The outputs of the parameter that belong to the target, ``None`` for all.
        kind: ``"linear"``, ``"conv"``, ``"embedding"`` (one row per entry) or ``"norm"`` (a gain ``[d]``).
        transposed: The parameter is stored ``[in, out]`` (transformers' ``Conv1D``).
        offset: For a norm: the number added to the weight before it multiplies (1 in Gemma); NaN where the output is no
            linear function of the weight.
    """

    name: str
    module_name: str
    module: nn.Module
    parameter_name: str
    rows: slice | None
    kind: Kind
    transposed: bool = False
    offset: float = 0.0

    @property
    def parameter(self) -> nn.Parameter:
        """The whole parameter, of which `rows` may be a part. It is looked up each time, as it may be replaced."""
        return getattr(self.owner, self.parameter_name)

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter: `module`, except where adapters wrap it."""
        return self.module

    @property
    def depth(self) -> int | None:
        """The first integer among the parts of the name (the block's number), or None."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(match.group(1)) if match else None

    def view(self, tensor: Tensor) -> Tensor:
        """The `[out, in]` matrix that this target is within a tensor shaped like its parameter.

        For the weight, its gradient or an optimizer's state. A view wherever strides allow, so writing to it writes to
        `tensor`.

        Args:
            tensor: `[out, in]`, `[out, in, *kernel]` or, when transposed, `[in, out]`.

        Returns:
            `[out, in]`, with `out` reduced to `rows` and kernels flattened into `in`.

        Raises:
            InputError: The target is a norm gain, which is a vector.
        """
        if self.kind == "norm":
            raise InputError(f"{self.name} is a norm gain, not a matrix: its singular values are its absolute entries")
        matrix = tensor.t() if self.transposed else tensor
        if self.rows is not None:
            matrix = matrix[self.rows]
        return matrix.flatten(1) if matrix.ndim > 2 else matrix

    def matrix(self) -> Tensor:
        """The weight as a detached `[out, in]` view that shares the parameter's memory; see `view`."""
        return self.view(self.parameter.detach())

    def block(self, tensor: Tensor | None = None) -> Block:
        """The part of the matrix that this rank holds, in the weight or in a tensor shaped like it; see `view`.

        A norm gain is one column. Only DTensors are divided.

        Raises:
            InputError: The weight is divided along other dimensions than rows and columns of a matrix.
        """
        whole = Block.of(self.parameter.detach() if tensor is None else tensor)
        whole = whole.mT if self.transposed else whole
        return whole if self.rows is None else whole.take(self.rows)

    def edit(self, change: Callable[[Block], None]) -> None:
        """Let `change` write to this rank's part of the weight."""
        change(self.block())

    def __str__(self) -> str:
        return self.name


def find_targets(
    model: nn.Module,
    include: Selector = "all-linear",
    exclude: Selector = (),
    kinds: Sequence[Kind] = ("linear", "conv"),
    more: Iterable[Target] = (),
) -> list[Target]:
    """Resolve which weights of a model are meant, in the model's own order.

    A fused query-key-value weight gives three targets, one per row slice. A parameter tied to several modules appears
    once. Parameters that cannot be worked on (on the meta device, quantized, not floating point, lazy) are left out.

    Args:
        model: Any module, wrapped (`torch.compile`, data parallel) or not.
        include: ``"all-linear"`` for every weight of `kinds`; an fnmatch pattern or ``"re:..."`` (searched) over the
            target's name, the parameter's name or the module's name; several of these; or a callable
            ``(module, module_name) -> bool``.
        exclude: The same, removed afterwards. It may match nothing.
        kinds: Kinds of weight considered.
        more: Weights that modules do not show (stacks of experts, from the graph), which the patterns name too.

    Raises:
        InputError: Nothing is selected (close names are listed), a regular expression is broken, a kind is unknown, or
            the model holds no weight of these kinds.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"unknown kind of weight {kind!r}; choose from {', '.join(KINDS)}")
    candidates = [target for target in (*_candidates(model), *more) if target.kind in kinds]
    if not candidates:
        wanted = " or ".join(kinds)
        raise InputError(f"{type(model).__name__} has no {wanted} weights to work on (floating point, not quantized)")

    selected = [target for target in candidates if _selects(include, target)]
    if not callable(include):
        patterns = [include] if isinstance(include, str) else list(include)
        unmatched = [pattern for pattern in patterns if not any(_matches(pattern, target) for target in candidates)]
        if not selected:
            raise InputError(_nothing_matches(unmatched, candidates))
        for pattern in unmatched:
            warnings.warn(_nothing_matches([pattern], candidates), stacklevel=2)
    chosen = [target for target in selected if not _selects(exclude, target)]
    if not chosen:
        reason = "the callable selects no weight" if not selected else f"{exclude!r} excludes every selected weight"
        raise InputError(f"nothing is left to work on: {reason}; candidates are {_listing(c.name for c in candidates)}")
    return list(_without_ties(chosen))


def is_selected(target: Target, include: Selector, exclude: Selector = ()) -> bool:
    """Whether patterns as those of `find_targets` select a target."""
    return _selects(include, target) and not _selects(exclude, target)


def clean_name(name: str) -> str:
    """A dotted module name without the parts that `torch.compile` and checkpoint wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _candidates(model: nn.Module) -> Iterator[Target]:
    """Every weight of every kind, in module order; ties are kept."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    modules = dict(model.named_modules())
    for full_name, module in modules.items():
        parent = modules.get(full_name.rpartition(".")[0])
        for parameter_name, kind, transposed in _weights(module):
            parameter = module._parameters.get(parameter_name)
            if parameter is None or not _usable(parameter):
                continue
            name = clean_name(full_name)
            fqn = f"{name}.{parameter_name}" if name else parameter_name
            for rows in _row_slices(module, parent, name, parameter_name, parameter, transposed):
                suffix = "" if rows is None else f"[{rows.start}:{rows.stop}]"
                yield Target(fqn + suffix, name, module, parameter_name, rows, kind, transposed)


def _weights(module: nn.Module) -> Iterator[tuple[str, Kind, bool]]:
    """(parameter name, kind, transposed) of the weights that a module itself owns."""
    if isinstance(module, nn.Linear):
        yield "weight", "linear", False
    elif isinstance(module, _CONVOLUTIONS):
        yield "weight", "conv", False
    elif isinstance(module, nn.Embedding):
        yield "weight", "embedding", False
    elif isinstance(module, nn.MultiheadAttention):
        for parameter_name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield parameter_name, "linear", False
    else:
        weight = module._parameters.get("weight")
        class_name = type(module).__name__
        if weight is None or is_lazy(weight):
            return
        if weight.ndim == 1 and "norm" in class_name.lower():
            yield "weight", "norm", False
        elif weight.ndim == 2 and class_name == "Conv1D":  # transformers' Linear with its weight transposed (GPT-2)
            yield "weight", "linear", True
        elif weight.ndim == 2 and "in_proj_weight" not in module._parameters and class_name.endswith("Linear"):
            yield "weight", "linear", False
        if "in_proj_weight" in module._parameters:  # attention classes that copy nn.MultiheadAttention's storage
            yield "in_proj_weight", "linear", False


def _usable(parameter: nn.Parameter) -> bool:
    if is_lazy(parameter) or parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2:
        return False
    # Quantized weights may pose as floating point through a tensor subclass; sharded ones (DTensor) are genuine.
    plain = type(parameter.data) is Tensor or is_dtensor(parameter)
    return plain and not parameter.is_quantized and parameter.numel() > 0


def _row_slices(
    module: nn.Module,
    parent: nn.Module | None,
    name: str,
    parameter_name: str,
    parameter: nn.Parameter,
    transposed: bool,
) -> list[slice] | list[None]:
    """The three slices of a fused query-key-value weight; otherwise the whole."""
    last = parameter_name if parameter_name != "weight" else name.rpartition(".")[2]
    if last not in _FUSED_QKV or parameter.ndim != 2:
        return [None]
    owner = module if parameter_name != "weight" else parent
    if owner is not None and type(owner).__name__.startswith(_INTERLEAVED_QKV):
        return [None]
    out, in_ = parameter.shape if not transposed else parameter.shape[::-1]
    widths = [in_]
    heads, head_dim = getattr(owner, "num_heads", None), getattr(owner, "head_dim", None)
    if isinstance(heads, int) and isinstance(head_dim, int):
        widths.append(heads * head_dim)
    if out not in [3 * width for width in widths]:  # grouped-query attention: k and v are narrower than q
        return [None]
    third = out // 3
    return [slice(start, start + third) for start in (0, third, 2 * third)]


def _selects(selector: Selector, target: Target) -> bool:
    if callable(selector):
        return bool(selector(target.module, target.module_name))
    patterns = (selector,) if isinstance(selector, str) else selector
    return any(_matches(pattern, target) for pattern in patterns)


def _matches(pattern: str, target: Target) -> bool:
    if pattern == "all-linear":
        return True
    fqn = f"{target.module_name}.{target.parameter_name}" if target.module_name else target.parameter_name
    names = (target.name, fqn, target.module_name)
    if pattern.startswith("re:"):
        try:
            return any(re.search(pattern[3:], name) for name in names)
        except re.error as error:
            raise InputError(f"target pattern {pattern!r} is not a regular expression: {error}") from None
    # Equality first: a slice's name holds [0:384], which fnmatch would read as a set of characters.
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _without_ties(targets: Iterable[Target]) -> Iterator[Target]:
    seen: set[tuple[int, int]] = set()
    for target in targets:
        key = (id(target.parameter), target.rows.start if target.rows is not None else -1)
        if key not in seen:
            seen.add(key)
            yield target


def _nothing_matches(patterns: Sequence[str], candidates: Sequence[Target]) -> str:
    names = list(dict.fromkeys(name for target in candidates for name in (target.name, target.module_name) if name))
    close: list[str] = []
    for pattern in patterns:
        wanted = pattern.removeprefix("re:").strip("*.^$")
        close += difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
        ends = {name.rpartition(".")[2]: name for name in reversed(names)}
        close += [ends[end] for end in difflib.get_close_matches(wanted.rpartition(".")[2], ends, n=2, cutoff=0.6)]
    quoted = " or ".join(repr(pattern) for pattern in patterns) or "an empty list of patterns"
    hint = f"close names: {_listing(dict.fromkeys(close))}" if close else f"names are like {_listing(names)}"
    return f"no weight of the model matches {quoted}; {hint}"


def _listing(names: Iterable[str], most: int = 6) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
