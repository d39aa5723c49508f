"""Identify tensors while a model runs: by storage, version and geometry, never by address or `id`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from s2d.models import propagation
from s2d.models.dimensions import Dims, unknown, whole
from s2d.models.graph_parts import Call, Node, Operation
from s2d.models.operations import Kind, kind_of

Geometry = tuple[Any, ...]


@dataclass
class _Storage:
    """The record of a piece of memory; the weak reference keeps its address from being reused."""

    reference: Any
    version: int = 0
    values: dict[Geometry, Node] = field(default_factory=dict)
    stale: dict[Geometry, Node] = field(default_factory=dict)
    writes: list[Node] = field(default_factory=list)
    base: Node | None = None
    # (first byte, byte after the last, number of the parameter, its strides) of each parameter in it
    parameters: list[tuple[int, int, int, tuple[int, ...]]] = field(default_factory=list)
    # in a copy of (a part of) a parameter: which of its dimensions a stride walks along
    walks: dict[int, int] = field(default_factory=dict)
    guarded: Tensor | None = None


@dataclass
class Run:
    """One execution of a module: numbers of the first operation and the one after the last."""

    path: str
    run: int
    first: int
    last: int
    parent: int


class Memory(TorchDispatchMode):
    """The identity of tensors: parameters, buffers and inputs by name, all others by the operation that made them."""

    # Without this torch refuses flex_attention and cond; with it they arrive whole, as unknown operations.
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        """Learn the names of a model's parameters and buffers."""
        super().__init__()
        self.model = model
        self.axes = propagation.Axes()
        self.nodes: list[Node] = []
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.runs: list[Run] = []
        self.stack: list[tuple[nn.Module, str, int, int]] = []
        self.paths: dict[nn.Module, str] = {}
        self.by_path: dict[str, nn.Module] = {}
        self.entered: dict[str, int] = {}
        self.ordinals: dict[str, int] = {}
        self.names: list[tuple[str, ...]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.owners: list[set[str]] = []
        self.numbers: dict[str, int] = {}
        self.unknown: dict[tuple[str, str], None] = {}
        self.outputs: list[int] = []
        self.padding: dict[str, float] = {}
        self.picks: dict[int, tuple[int, ...]] = {}  # which matrices of a stack a node holds
        self.failed_in: str | None = None
        self.error_before: BaseException | None = None
        self._failed: BaseException | None = None
        self._storages: dict[int, _Storage] = {}
        self._objects: Any = WeakTensorKeyDictionary()
        self._input_values: dict[str, Tensor] = {}
        self._input_dims: dict[str, Dims] = {}
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._told: dict[int, Any] = {}
        self._infos: dict[Any, tuple[str, Kind, bool]] = {}
        self._learn()

    def _learn(self) -> None:
        tied: dict[int, int] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            number = tied.get(id(parameter))
            if number is None:
                number = tied[id(parameter)] = len(self.names)
                self.names.append(())
                self.shapes.append(tuple(parameter.shape))
                self.owners.append(set())
            self.names[number] += (name,)
            self.numbers[name] = number
        for path, module in self.model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, path)
            self.by_path[path] = module
        for name, number in self.numbers.items():
            owner = name.rpartition(".")[0]
            self.owners[number].add(self.paths.get(self.by_path.get(owner, self.model), owner))
        for module in self.paths:
            self._tell(module)

    # -- telling -------------------------------------------------------------------------------------------------------

    def _tell(self, module: nn.Module) -> None:
        """Parameters and buffers of a module as they are now: FSDP2 and `functional_call` put others in their place."""
        path = self.paths[module]
        for name, value in module._parameters.items():
            if value is None:
                continue
            full = f"{path}.{name}" if path else name
            number = self.numbers.get(full)
            if number is not None and self._told.get(number) is not value:
                self._told[number] = value
                self._tell_parameter(number, value)
        for name, value in module._buffers.items():
            if value is not None and not self._is_known(value):
                self._tell_value(value, f"buffer:{path}.{name}" if path else f"buffer:{name}", guard=True)
        for name in getattr(module, "_flat_weights_names", ()):
            value = getattr(module, name, None)
            number = self.numbers.get(f"{path}.{name}" if path else name)
            if number is not None and isinstance(value, Tensor):
                self._tell_parameter(number, value)

    def _tell_replaced(self) -> None:
        """Parameters of the running module that were replaced since it was entered, as its own hooks do (FSDP2)."""
        module, path, *_ = self.stack[-1]
        for name, value in module._parameters.items():
            number = self.numbers.get(f"{path}.{name}" if path else name, -1)
            if value is not None and self._told.get(number) is not value:
                return self._tell(module)

    def _tell_parameter(self, number: int, value: Tensor) -> None:
        if not has_storage(value):
            self._objects[value] = self._node(value, "parameter", "weight", (number,), plain=True)
            return
        storage = self._storage(value)
        size = value.element_size()
        first = int(value.storage_offset()) * size
        extent = 1 + sum((int(n) - 1) * int(s) for n, s in zip(value.shape, value.stride(), strict=True))
        storage.guarded = value.detach()
        storage.parameters = [row for row in storage.parameters if row[:2] != (first, first + extent * size)]
        storage.parameters.append((first, first + extent * size, number, tuple(value.stride())))
        node = self._node(value, "parameter", "weight", (number,), plain=True)
        storage.values[geometry_of(value)] = node

    def _tell_value(self, value: Tensor, source: str, guard: bool = False) -> Node:
        node = self._node(value, source, "constant")
        self._put(value, node)
        if guard and has_storage(value):
            self._storage(value).guarded = value.detach()
        return node

    def tell_input(self, key: str, value: Tensor) -> None:
        """An input of the model; each of its dimensions is an axis."""
        self._input_values[key] = value
        dims = tuple(whole(self.axes.new("input", key, d), n) for d, n in enumerate(value.shape))
        self._input_dims[key] = dims
        self._put(value, self._node(value, f"input:{key}", "activation", dims=dims))

    def tell_output(self, output: Any) -> None:
        """What the model returned."""
        for value in tensors_in(output):
            node = self._lookup(value)
            if node is not None:
                self.outputs.append(node.id)

    # -- modules -------------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any) -> None:
        """A module begins to run."""
        path = self.paths.get(module)
        if path is None:
            return
        run = self.entered.get(path, -1) + 1
        self.entered[path] = run
        parent = self.stack[-1][3] if self.stack else -1
        self.runs.append(Run(path, run, len(self.operations), -1, parent))
        self.stack.append((module, path, run, len(self.runs) - 1))
        if module._parameters or module._buffers:
            self._tell(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module has run, or failed."""
        error = sys.exc_info()[1]
        if error is not None and error is not self.error_before and error is not self._failed:
            # The innermost module leaves first. A model may catch an error and go on; the last one counts.
            self._failed, self.failed_in = error, self.paths.get(module, "")
        if module not in self.paths:
            return
        while self.stack:
            left, _, _, index = self.stack.pop()
            self.runs[index].last = len(self.operations)
            if left is module:
                break

    # -- values --------------------------------------------------------------------------------------------------------

    def _node(
        self,
        value: Tensor,
        source: str,
        state: str,
        parameters: tuple[int, ...] = (),
        *,
        dims: Dims | None = None,
        rows: tuple[int, int] | None = None,
        plain: bool = False,
        operation: int = -1,
    ) -> Node:
        shape = tuple(value.shape)
        if dims is None:
            dims = tuple(unknown(n) for n in shape)
        node = Node(
            len(self.nodes), shape, str(value.dtype)[6:], dims, operation, source, state, parameters, rows, plain
        )
        self.nodes.append(node)
        return node

    def _storage(self, value: Tensor) -> _Storage:
        memory = value.untyped_storage()
        found = self._storages.get(memory._cdata)
        if found is None:
            found = self._storages[memory._cdata] = _Storage(StorageWeakRef(memory))
        return found

    def _put(self, value: Tensor, node: Node) -> None:
        if not has_storage(value):
            self._objects[value] = node
            value = _block_of(value)  # a rank's part represents the whole tensor when it is taken out
            if value is None:
                return
        storage = self._storage(value)
        if storage.base is None:
            storage.base = node
        storage.values[geometry_of(value)] = node

    def _is_known(self, value: Tensor) -> bool:
        if not has_storage(value):
            return value in self._objects
        return value.untyped_storage()._cdata in self._storages

    def _lookup(self, value: Tensor) -> Node | None:
        if not has_storage(value):
            found, block = self._objects.get(value), _block_of(value)
            return found if found is not None or block is None else self._lookup(block)
        storage = self._storages.get(value.untyped_storage()._cdata)
        if storage is None:
            return None
        geometry = geometry_of(value)
        node = storage.values.get(geometry)
        if node is not None:
            return node
        if storage.parameters and not storage.writes:
            node = self._part_of_parameter(value, storage)
        if node is None and storage.base is not None:
            node = self._reread(value, storage, geometry)
        if node is not None:
            storage.values[geometry] = node
        return node

    def _part_of_parameter(self, value: Tensor, storage: _Storage) -> Node | None:
        first = value.storage_offset() * value.element_size()
        for start, stop, number, _ in storage.parameters:
            if start <= first < stop:
                rows = self._rows(value, number, storage)
                return self._node(value, "parameter", "weight", (number,), rows=rows, plain=True)
        return None

    def _rows(self, value: Tensor, number: int, storage: _Storage) -> tuple[int, int] | None:
        """Which rows of a parameter a view of it holds; None for all of them, or no whole rows."""
        row = next((row for row in storage.parameters if row[2] == number), None)
        shape = self.shapes[number]
        if row is None or not shape or not value.numel() or value.numel() >= _product(shape):
            return None
        stride = row[3][0] if row[3] else 0
        per_row = _product(shape[1:])
        if stride <= 0 or value.numel() % per_row:
            return None
        begin, rest = divmod(int(value.storage_offset()) - row[0] // value.element_size(), stride)
        return None if rest else (begin, begin + value.numel() // per_row)

    def _reread(self, value: Tensor, storage: _Storage, geometry: Geometry) -> Node:
        """A view that no recorded operation made, or a view of memory that was written to since."""
        before = storage.stale.get(geometry)
        sources = [n for n in (before or storage.base, *storage.writes) if n is not None]
        dims = next((n.dims for n in reversed(sources) if n.shape == tuple(value.shape)), None)
        states = {n.state for n in sources}
        state = "activation" if "activation" in states else "weight" if "weight" in states else "constant"
        parameters = tuple(dict.fromkeys(p for n in sources for p in n.parameters)) if state == "weight" else ()
        node = self._node(value, "operation", state, parameters, dims=dims, operation=len(self.operations))
        kind = "join" if storage.writes else "view"
        self._operation("reread", kind, tuple(n.id for n in sources), (node.id,))
        return node

    def _seen(self, value: Tensor) -> Node:
        """The node of an operand, which may be one that came from outside."""
        node = self._lookup(value)
        if node is not None:
            return node
        for module, *_ in reversed(self.stack):
            self._tell(module)
            node = self._lookup(value)
            if node is not None:
                return node
        for module, path, *_ in reversed(self.stack):
            for name, held in module.__dict__.items():
                if isinstance(held, Tensor) and _shares(held, value):
                    return self._tell_value(value, f"buffer:{path}.{name}" if path else f"buffer:{name}", guard=True)
        if value.numel() <= 1:
            return self._tell_value(value, "constant")
        node = self._node(value, "outside", "activation")
        self._put(value, node)
        self.unknown[("data from outside torch", self.stack[-1][1] if self.stack else "")] = None
        return node

    def _operation(
        self, name: str, kind: str, inputs: tuple[int, ...], outputs: tuple[int, ...], flops: int = 0,
        arguments: tuple[float, ...] = (),
    ) -> Operation:  # fmt: skip
        _, path, run, _ = self.stack[-1] if self.stack else (None, "", 0, 0)
        operation = Operation(len(self.operations), name, kind, path, run, inputs, outputs, flops, arguments)
        self.operations.append(operation)
        return operation


def info_of(func: Any) -> tuple[str, Kind, bool]:
    """Name without namespace and overload, kind, and whether it writes to its operands."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(getattr(func, "__name__", func)), "unknown", False
    name = schema.name.partition("::")[2]
    return name, kind_of(name), schema.is_mutable


def full_name(func: Any) -> str:
    """Name with its namespace."""
    schema = getattr(func, "_schema", None)
    return schema.name if schema is not None else str(getattr(func, "__name__", func))


def written_by(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """The operands that a call of an operation writes to."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
        found += list(tensors_in(value))
    return tuple(found)


def has_storage(value: Tensor) -> bool:
    """Whether memory identifies a tensor; wrapper subclasses and sparse tensors are identified by object."""
    if type(value) in (Tensor, nn.Parameter):
        return value.layout == torch.strided
    return not is_traceable_wrapper_subclass(value) and value.layout == torch.strided


def _block_of(value: Any) -> Any:
    """This rank's part of a DTensor; None of any other tensor without storage."""
    block = getattr(value, "_local_tensor", None)
    return block if isinstance(block, Tensor) and has_storage(block) else None


def geometry_of(value: Tensor) -> Geometry:
    """Which part of its storage a tensor shows."""
    return value.storage_offset(), value.shape, value.stride(), value.dtype


def _shares(a: Tensor, b: Tensor) -> bool:
    if not has_storage(a) or not has_storage(b):
        return a is b
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif hasattr(value, "__dataclass_fields__"):
        for each in vars(value).values():
            yield from tensors_in(each)


def numbers_in(args: Any) -> tuple[float, ...]:
    """The plain numbers among arguments."""
    return tuple(float(a) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool))


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def spread(values: Any, kernel: Any) -> list[int]:
    """One number for each dimension of a kernel."""
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return values * len(kernel) if len(values) == 1 else values


def all_unknown(shape: tuple[int, ...]) -> Dims:
    """Dimensions of which nothing is known."""
    return tuple(unknown(n) for n in shape)
