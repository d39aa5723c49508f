"""One forward under a dispatch mode, which sees every operation whoever calls it: `trace(model, batch) -> Graph`.

Left as it was found: state dict, buffers, random state, training modes, caches' settings, torch's own fast path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from s2d.errors import InputError, first_line
from s2d.models import propagation
from s2d.models.dimensions import Dims, unknown, whole
from s2d.models.flops import flops_of
from s2d.models.graph import Call, Graph, Node, Operation
from s2d.models.operations import ADDED, BATCH_NORMS, GROUP_NORMS, GROUPED, Kind, kind_of

Geometry = tuple[Any, ...]
ROWS = 2
_FILLS = frozenset(["fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "trunc_normal_"])


def trace(model: nn.Module, batch: Any) -> Graph:
    """What a model does with its weights, seen in one forward of two rows of a batch.

    Wrappers (`DistributedDataParallel`, `torch.compile`) are looked through; names are those of the module inside.

    Args:
        model: Any module. It is left as it was.
        batch: A dict of keyword arguments, a tensor, or a tuple of positional arguments, as the model takes them.

    Raises:
        InputError: The model cannot run this batch; the line names the module and the input.
    """
    model = unwrapped(model)
    args, kwargs = _arguments(batch, _device_of(model))
    short_args, short_kwargs, cut = _two_rows(args, kwargs)
    try:
        return _traced(model, short_args, short_kwargs)
    except InputError:
        # Inputs whose first dimension is not rows (patches of all images in one list) cannot be cut.
        if not cut:
            raise
    return _traced(model, *_copied(args, kwargs))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data parallelism and compilation."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# -- inputs ------------------------------------------------------------------------------------------------------------


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _arguments(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {str(key): move(value) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return (move(batch),), {}
    if isinstance(batch, (tuple, list)):
        return tuple(move(value) for value in batch), {}
    raise InputError(f"a batch to trace is a dict, a tensor or a tuple, not a {type(batch).__name__}")


def _two_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Two rows of everything that has as many rows as the first tensor; a single row is doubled.

    Of the rows those with most and least padding; without padding one token of the copy is made padding, as models
    leave out a mask that masks nothing, and then nobody sees whose it is.
    """
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
    rows = len(tensors[0]) if tensors else 0
    masks = {k: v for k, v in kwargs.items() if k.endswith("mask") and isinstance(v, Tensor) and v.ndim == 2}
    chosen = list(range(ROWS)) if rows >= ROWS else [0] * ROWS
    for mask in masks.values():
        marked = mask.ne(0).sum(1)
        if len(mask) == rows > ROWS and marked.min() < marked.max():
            chosen = [int(marked.argmax()), int(marked.argmin())]
            break
    picked = torch.tensor(chosen)
    cut = rows > 0 and (rows != ROWS)

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[picked.to(value.device)] if rows and value.ndim > 0 and len(value) == rows else value.clone()

    short = {k: take(v) for k, v in kwargs.items()}
    for key in masks:
        mask = short[key]
        if mask.shape[1] > 1 and len(mask) > 1 and bool((mask == mask[0, 0]).all()):
            if mask.dtype == torch.bool or mask[0, 0] == 1:
                mask[-1, -1] = ~mask[0, 0] if mask.dtype == torch.bool else 0
                cut = True
    return tuple(take(v) for v in args), short, cut


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return tuple(copy(v) for v in args), {k: copy(v) for k, v in kwargs.items()}


# -- leaving no trace --------------------------------------------------------------------------------------------------


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation without caches, checkpointing, fast paths, compilation and our own quantizers; all restored."""
    modules = list(model.modules())
    set_back: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        set_back.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    buffers = [dict(module._buffers) for module in modules]
    persistent = [set(module._non_persistent_buffers_set) for module in modules]
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modules:
            if module.training:
                # Not eval(): some models merge adapters in it.
                put(module, "training", False)
            for name in ("gradient_checkpointing", "grad_checkpointing"):
                if module.__dict__.get(name) is True:
                    put(module, name, False)
            if type(module).__module__.startswith("s2d.") and module.__dict__.get("enabled") is True:
                put(module, "enabled", False)
            config = module.__dict__.get("config")
            if getattr(config, "use_cache", None) is True:
                put(config, "use_cache", False)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for owner, name, value in reversed(set_back):
            setattr(owner, name, value)
        for module, before, kept in zip(modules, buffers, persistent, strict=True):
            if (
                dict(module._buffers) != before
                if len(module._buffers) != len(before)
                else any(module._buffers.get(name) is not value for name, value in before.items())
            ):
                module._buffers.clear()
                module._buffers.update(before)
                module._non_persistent_buffers_set = kept
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    from s2d.models.structure import finish

    tracer = Tracer(model)
    given: dict[str, Tensor] = {str(i): v for i, v in enumerate(args) if isinstance(v, Tensor)}
    given |= {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
    with _untouched(model), ExitStack() as stack:
        for key, value in given.items():
            tracer.tell_input(key, value)
        stack.callback(tracer.restore)
        before = sys.exc_info()[1]
        tracer.error_before = before
        hooks = (
            register_module_forward_pre_hook(tracer.enter),
            register_module_forward_hook(tracer.leave, always_call=True),
        )
        for hook in hooks:
            stack.callback(hook.remove)
        try:
            with tracer:
                output = model(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:
            path = tracer.failed_in
            inputs = ", ".join(f"{k} {list(v.shape)}" for k, v in given.items()) or "no tensors"
            where = f"in {path} ({type(tracer.by_path[path]).__name__})" if path else "at the model itself"
            raise InputError(
                f"{type(model).__name__} cannot run the batch to trace ({inputs}): {where}: {first_line(error)}; "
                "give the inputs that its forward takes"
            ) from error
        tracer.tell_output(output)
    return finish(tracer, given)


@dataclass
class _Storage:
    """What is known of a piece of memory; the weak reference keeps its address from being given to another."""

    reference: Any
    version: int = 0
    values: dict[Geometry, Node] = field(default_factory=dict)
    stale: dict[Geometry, Node] = field(default_factory=dict)
    writes: list[Node] = field(default_factory=list)
    base: Node | None = None
    # (first byte, byte after the last, number of the parameter, its strides) of each parameter in it
    parameters: list[tuple[int, int, int, tuple[int, ...]]] = field(default_factory=list)
    guarded: Tensor | None = None


@dataclass
class Run:
    """One execution of a module: numbers of the first operation and the one after the last."""

    path: str
    run: int
    first: int
    last: int
    parent: int


class Tracer(TorchDispatchMode):
    """Records operations, nodes and calls while it is active."""

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

    def _tell_parameter(self, number: int, value: Tensor) -> None:
        if not _has_storage(value):
            self._objects[value] = self._node(value, "parameter", "weight", (number,), plain=True)
            return
        storage = self._storage(value)
        size = value.element_size()
        first = value.storage_offset() * size
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        storage.guarded = value.detach()
        storage.parameters = [row for row in storage.parameters if row[:2] != (first, first + extent * size)]
        storage.parameters.append((first, first + extent * size, number, tuple(value.stride())))
        node = self._node(value, "parameter", "weight", (number,), plain=True)
        storage.values[_geometry(value)] = node

    def _tell_value(self, value: Tensor, source: str, guard: bool = False) -> Node:
        node = self._node(value, source, "constant")
        self._put(value, node)
        if guard and _has_storage(value):
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
        for value in _tensors(output):
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
        if not _has_storage(value):
            self._objects[value] = node
            return
        storage = self._storage(value)
        if storage.base is None:
            storage.base = node
        storage.values[_geometry(value)] = node

    def _is_known(self, value: Tensor) -> bool:
        if not _has_storage(value):
            return value in self._objects
        return value.untyped_storage()._cdata in self._storages

    def _lookup(self, value: Tensor) -> Node | None:
        if not _has_storage(value):
            return self._objects.get(value)
        storage = self._storages.get(value.untyped_storage()._cdata)
        if storage is None:
            return None
        geometry = _geometry(value)
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
        begin, rest = divmod(value.storage_offset() - row[0] // value.element_size(), stride)
        return None if rest else (begin, begin + value.numel() // per_row)

    def _reread(self, value: Tensor, storage: _Storage, geometry: Geometry) -> Node:
        """A view that nobody made in the open, or one of memory that was written to since."""
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
        if value.ndim == 0 or value.numel() == 1:
            return self._tell_value(value, "constant")
        node = self._node(value, "outside", "activation")
        self._put(value, node)
        self.unknown[("data from outside torch", self.stack[-1][1] if self.stack else "")] = None
        return node

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        info = self._infos.get(func)
        if info is None:
            info = self._infos[func] = _info(func)
        name, kind, mutates = info
        tensors: list[Tensor] = []
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
            elif isinstance(arg, (list, tuple)):
                tensors += [each for each in arg if isinstance(each, Tensor)]
            elif isinstance(arg, dict):
                tensors += list(_tensors(arg))
        mask = None
        for key, arg in kwargs.items():
            if isinstance(arg, Tensor):
                tensors.append(arg)
                if key in ("attn_mask", "attn_bias"):
                    mask = arg
        inputs = [self._seen(tensor) for tensor in tensors]
        written = _written(func, args, kwargs) if mutates else ()
        for tensor in written:
            self._guard(tensor)
        out = func(*args, **kwargs)
        if name in ("detach", "alias") and isinstance(out, Tensor) and _has_storage(out) and len(inputs) == 1:
            self._storage(out).values.setdefault(_geometry(out), inputs[0])
            return out
        if kind == "attention" and mask is None and len(args) > 3 and isinstance(args[3], Tensor):
            mask = args[3]
        self._record(func, name, kind, args, kwargs, tensors, inputs, out, written, mask)
        return out

    def _guard(self, tensor: Tensor) -> None:
        """Keep a copy of a buffer or parameter that an operation is about to change."""
        if not _has_storage(tensor):
            return
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is not None and storage.guarded is not None:
            self._saved.append((storage.guarded, storage.guarded.clone()))
            storage.guarded = None

    def restore(self) -> None:
        """Put back what the forward changed in place."""
        with torch.no_grad():
            for tensor, copy in reversed(self._saved):
                tensor.copy_(copy)
        self._saved.clear()

    def _operation(
        self, name: str, kind: str, inputs: tuple[int, ...], outputs: tuple[int, ...], flops: int = 0,
        arguments: tuple[float, ...] = (),
    ) -> Operation:  # fmt: skip
        _, path, run, _ = self.stack[-1] if self.stack else (None, "", 0, 0)
        operation = Operation(len(self.operations), name, kind, path, run, inputs, outputs, flops, arguments)
        self.operations.append(operation)
        return operation

    def _record(
        self, func: Any, name: str, kind: Kind, args: Any, kwargs: Any, tensors: list[Tensor], inputs: list[Node],
        out: Any, written: tuple[Tensor, ...], mask: Tensor | None,
    ) -> None:  # fmt: skip
        outs = [out] if isinstance(out, Tensor) else list(_tensors(out))
        if not outs:
            return
        if name in _FILLS:
            inputs, tensors = [], []
        if name == "copy_" and len(inputs) == 2:
            inputs, tensors = inputs[1:], tensors[1:]
        index = len(self.operations)
        function = self._is_function(kind, name, inputs)
        states = {node.state for node in inputs}
        if function or states <= {"constant"}:
            state = "weight" if "weight" in states else "constant"
        else:
            state = "activation"
        parameters = tuple(dict.fromkeys(p for n in inputs for p in n.parameters)) if state == "weight" else ()
        calls = self._operands(kind, name, inputs) if state == "activation" else []
        features = 0
        weight = next((inputs[i] for i, what in calls if what in ("product", "convolution", "embedding", "gain")), None)
        if weight is not None:
            names = self.names[weight.parameters[0]]
            features = self.axes.new("features", names[0])
        made: list[Node] = []
        fresh: dict[int, Node] = {}
        for part, value in enumerate(outs):
            node = fresh.get(id(value))
            if node is None:
                dims = self._dims(name, kind, args, tensors, inputs, value, part, features, calls, mask)
                plain, rows = False, None
                if (
                    state == "weight"
                    and len(inputs) == 1
                    and inputs[0].plain
                    and (kind == "view" and name not in ("flip", "roll", "constant_pad_nd", "pad"))
                ):
                    plain, rows = True, inputs[0].rows
                    if _has_storage(value):
                        storage = self._storage(value)
                        if storage.parameters:
                            rows = self._rows(value, parameters[0], storage)
                        elif name in ("select", "slice", "split", "unbind") and rows is None:
                            plain = name == "slice" and value.numel() == tensors[0].numel()
                elif state == "weight":
                    rows = next((n.rows for n in inputs if n.rows is not None), None)
                node = self._node(
                    value, "operation" if inputs else "constant", state, parameters,
                    dims=dims, rows=rows, plain=plain, operation=index,
                )  # fmt: skip
                fresh[id(value)] = node
                self._keep(value, node, any(value is each for each in written))
            made.append(node)
        numbers = _numbers(args) if kind in ("multiply", "add", "lookup") or name == "expand" else ()
        flops = flops_of(name, tensors, outs, kwargs, args)
        operation = self._operation(name, kind, tuple(n.id for n in inputs), tuple(n.id for n in made), flops, numbers)
        if kind == "unknown" and "activation" in states | {state}:
            self.unknown[(_full_name(func), operation.module)] = None
        if kind == "softmax" or mask is not None:
            self._see_padding(name, outs, made, mask)
        if calls or (function and len(parameters) > 1):
            self._call(operation, name, kind, calls, inputs, made, tensors, features, flops, parameters)

    def _keep(self, value: Tensor, node: Node, in_place: bool) -> None:
        if not in_place or not _has_storage(value):
            self._put(value, node)
            return
        storage = self._storage(value)
        storage.version += 1
        storage.stale.update(storage.values)
        storage.values.clear()
        if value.numel() * value.element_size() >= value.untyped_storage().nbytes():
            storage.base, storage.writes = node, []
            storage.stale.clear()
        else:
            storage.writes.append(node)
        storage.values[_geometry(value)] = node

    def _is_function(self, kind: Kind, name: str, inputs: list[Node]) -> bool:
        """Whether the operation makes a weight of weights, and is no use of one."""
        states = {node.state for node in inputs}
        if "weight" not in states or "activation" in states:
            return False
        if kind in ("embedding", "lookup"):
            return False
        weights = [node for node in inputs if node.state == "weight"]
        if kind in ("product", "convolution", "norm", "attention"):
            if len(weights) < len([n for n in inputs if len(n.shape) > 1]):
                return False  # a table of constants goes through a layer
            here = self.stack[-1][1] if self.stack else ""
            owned = [any(here in self.owners[p] for p in node.parameters) for node in weights]
            # A learned query goes through a layer's weight: the layer owns one of them only.
            return all(owned) or not any(owned)
        return True

    def _operands(self, kind: Kind, name: str, inputs: list[Node]) -> list[tuple[int, str]]:
        """Position and kind of each operand that is a weight."""
        found: list[tuple[int, str]] = []
        for position, node in enumerate(inputs):
            if node.state == "weight":
                found.append((position, self._use(kind, name, position, node, inputs)))
        if kind == "product" and sum(what == "product" for _, what in found) > 1:
            here = self.stack[-1][1] if self.stack else ""
            mine = [p for p, w in found if w == "product" and any(here in self.owners[n] for n in inputs[p].parameters)]
            keep = mine[0] if mine else max(p for p, w in found if w == "product")
            found = [(p, "operand" if w == "product" and p != keep else w) for p, w in found]
        return found

    def _use(self, kind: Kind, name: str, position: int, node: Node, inputs: list[Node]) -> str:
        if kind == "product":
            added = ADDED.get(name)
            if position == added or (name in GROUPED and position > 2):
                return "bias"
            return "product" if len(node.shape) > 1 or name in ("mv", "dot") else "operand"
        if kind == "convolution":
            return ("operand", "convolution", "bias")[min(position, 2)]
        if kind == "embedding":
            return "embedding" if position == 0 else "operand"
        if kind == "lookup":
            return "lookup" if position == 0 else "operand"
        if kind == "norm":
            # Every normalisation reads its input first, then gain and bias; one of them may be missing.
            return "operand" if position == 0 else "gain" if position == 1 and len(node.parameters) == 1 else "bias"
        one = len(node.shape) == 0 or max(node.shape) == 1
        if kind == "multiply":
            return "elementwise" if one else "gain"
        if kind == "add":
            return "bias"
        if kind == "join":
            return "inserted"
        return "unknown" if kind == "unknown" else "elementwise" if kind in ("homogeneous", "activation") else "operand"

    def _call(
        self, operation: Operation, name: str, kind: Kind, calls: list[tuple[int, str]], inputs: list[Node],
        made: list[Node], tensors: list[Tensor], features: int, flops: int, parameters: tuple[int, ...],
    ) -> None:  # fmt: skip
        path = operation.module
        ordinal = self.ordinals.get(path, -1) + 1
        self.ordinals[path] = ordinal
        module = self.stack[-1][0] if self.stack else self.model
        if not calls:
            calls = [(i, "function") for i, node in enumerate(inputs) if node.state == "weight"]
        weights = {i for i, what in calls if what != "operand"}
        for position, what in calls:
            node = inputs[position]
            read = next((n for i, n in enumerate(inputs) if i not in weights and n.state == "activation"), None)
            if read is None:
                read = next((n for i, n in enumerate(inputs) if i != position and i not in weights), None)
            left = what == "product" and read is not None and inputs.index(read) > position
            for parameter in node.parameters:
                experts: tuple[int, ...] = ()
                rows = node.rows
                if len(self.shapes[parameter]) == 3 and what == "product":
                    experts, rows = self._experts(name, node, parameter, tensors), None
                self.calls.append(
                    Call(
                        module=path,
                        ordinal=ordinal,
                        run=operation.run,
                        kind=what,
                        op=name,
                        parameters=self.names[parameter],
                        rows=rows,
                        experts=experts,
                        plain=node.plain,
                        applied=self._applied(node) if what == "gain" else "",
                        input=None if read is None else read.id,
                        output=made[0].id,
                        input_shape=() if read is None else read.shape,
                        output_shape=made[0].shape,
                        module_class=type(module).__name__,
                        operation=operation.index,
                        features=features if what in ("product", "convolution", "embedding", "gain") else 0,
                        side="left" if left else "right",
                        flops=flops if what in ("product", "convolution") and parameter == node.parameters[0] else 0,
                    )
                )

    def _experts(self, name: str, node: Node, parameter: int, tensors: list[Tensor]) -> tuple[int, ...]:
        first, stop = node.rows if node.rows is not None else (0, self.shapes[parameter][0])
        if name in GROUPED and len(tensors) > 2 and not tensors[2].is_floating_point():
            ends = tensors[2].tolist()
            return tuple(first + e for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a)
        return tuple(range(first, stop))

    def _applied(self, node: Node) -> str:
        """How a gain multiplies: as it is, or as 1 + w."""
        while not node.plain:
            if node.operation < 0:
                return "other"
            operation = self.operations[node.operation]
            if operation.kind == "add" and operation.arguments[:1] == (1.0,) and len(operation.inputs) <= 2:
                weights = [self.nodes[i] for i in operation.inputs if self.nodes[i].state == "weight"]
                return "1+w" if len(weights) == 1 and weights[0].plain else "other"
            if operation.kind != "view" or len(operation.inputs) != 1:
                return "other"
            node = self.nodes[operation.inputs[0]]
        return "w"

    # -- dimensions ----------------------------------------------------------------------------------------------------

    def _dims(
        self, name: str, kind: Kind, args: Any, tensors: list[Tensor], inputs: list[Node], out: Tensor, part: int,
        features: int, calls: list[tuple[int, str]], mask: Tensor | None,
    ) -> Dims:  # fmt: skip
        shape = tuple(out.shape)
        if not inputs:
            return tuple(unknown(n) for n in shape)
        if all(n.state != "activation" for n in inputs) and kind != "embedding" and not features:
            return tuple(unknown(n) for n in shape)
        axes, first = self.axes, inputs[0]
        dims = [node.dims for node in inputs]
        if kind == "product":
            if name in GROUPED:
                return (dims[0][0], whole(features, shape[-1])) if features else (dims[0][0], unknown(shape[-1]))
            added = ADDED.get(name)
            factors = [i for i in range(len(inputs)) if i != added][:2]
            a, b = (list(dims[i]) for i in factors)
            used = {i for i, what in calls if what == "product"}
            # The weight names nothing but the channels that it makes.
            if features and factors[1] in used:
                b = [*(unknown(n) for n in inputs[factors[1]].shape[:-1]), whole(features, shape[-1])]
            elif features and factors[0] in used:
                a = [*(unknown(n) for n in inputs[factors[0]].shape)]
                if len(a) > 1:
                    a[-2] = whole(features, inputs[factors[0]].shape[-2])
            return propagation.matrix_product(axes, tuple(a), tuple(b), shape)
        if kind == "convolution" and len(shape) > 2:
            kernel, stride, padding = tensors[1].shape[2:], args[3], args[4]
            dilation, transposed = args[5], args[6]
            same = not transposed and all(s == 1 for s in stride) and all(
                2 * p == d * (k - 1) for p, d, k in zip(_spread(padding, kernel), _spread(dilation, kernel), kernel,
                                                        strict=True)
            )  # fmt: skip
            return propagation.convolution(axes, dims[0], shape, features, same)
        if kind == "embedding":
            return (*dims[1], whole(features, shape[-1])) if len(dims[1]) + 1 == len(shape) else _all_unknown(shape)
        if kind == "attention":
            if part:
                return _all_unknown(shape)
            masked = None if mask is None else self._seen(mask).dims
            return propagation.attention(axes, dims[0], dims[1], dims[2], masked, shape)
        if kind == "view":
            return propagation.view(axes, name.removesuffix("_"), args, dims[0], first.shape, out, part)
        if kind == "lookup":
            return propagation.looked_up(axes, name, args, dims[0], shape, self._seen)
        if kind == "join":
            if name in ("cat", "concat", "concatenate", "hstack", "vstack"):
                dim = args[1] if len(args) > 1 else 0
                return propagation.joined(axes, dim, dims, [n.shape for n in inputs], shape)
            return (
                propagation.broadcast(axes, dims, shape)
                if name.startswith("masked_fill")
                else (propagation.same_sizes(axes, name, dims[0], shape))
            )
        if kind in ("reduction", "statistic"):
            return propagation.reduced(axes, name, args, dims[0], shape)
        if kind == "norm":
            if part:
                return _all_unknown(shape)
            return self._gained(dims[0], shape, features, 1 if name in BATCH_NORMS | GROUP_NORMS else -1)
        if kind in ("multiply", "add", "homogeneous", "activation", "routing"):
            if first.shape != shape and len(first.shape) == len(shape) and len(inputs) == 1:
                return propagation.same_sizes(axes, name, dims[0], shape)
            made = propagation.broadcast(axes, dims, shape)
            return self._gained(made, shape, features) if features and kind == "multiply" else made
        return propagation.same_sizes(axes, name, dims[0], shape)

    def _gained(self, dims: Dims, shape: tuple[int, ...], features: int, channels: int = -1) -> Dims:
        """After a gain the channels are the gain's."""
        if not features or len(shape) < 2 or len(dims) != len(shape):
            return dims
        made = list(dims)
        made[channels] = whole(features, shape[channels])
        return tuple(made)

    def _see_padding(self, name: str, outs: list[Tensor], made: list[Node], mask: Tensor | None) -> None:
        """Which value of a mask marks padding: the one at the tokens that no query looks at."""
        if mask is not None:
            node, closed = self._seen(mask), (~mask if mask.dtype == torch.bool else mask < -1e3)
        else:
            node, closed = made[0], outs[0] == 0
        for key, value in self._input_values.items():
            if key in self.padding or value.ndim != 2 or value.numel() == 0:
                continue
            axes = [self.axes.find(d[0].axis) if len(d) == 1 else -1 for d in self._input_dims[key]]
            places = [
                i for i, dim in enumerate(node.dims)
                if len(dim) == 1 and self.axes.find(dim[0].axis) == axes[1] and dim[0].size == value.shape[1]
            ]  # fmt: skip
            rows = [i for i, dim in enumerate(node.dims) if dim and self.axes.find(dim[0].axis) == axes[0]]
            if not places or not rows or rows[0] == places[-1] or len(node.dims[rows[0]]) != 1:
                continue
            others = [i for i in range(closed.ndim) if i not in (rows[0], places[-1])]
            shut = closed
            for i in reversed(others):
                shut = shut.all(i)
            if rows[0] > places[-1]:
                shut = shut.mT
            if shut.shape != value.shape or not shut.any() or shut.all():
                continue
            inside, kept = value[shut].unique(), value[~shut].unique()
            if len(inside) == 1 and not bool((kept == inside[0]).any()) and len(kept) == 1:
                self.padding[key] = float(inside[0])


# -- small things ------------------------------------------------------------------------------------------------------


def _info(func: Any) -> tuple[str, Kind, bool]:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(getattr(func, "__name__", func)), "unknown", False
    name = schema.name.partition("::")[2]
    return name, kind_of(name), schema.is_mutable


def _full_name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return schema.name if schema is not None else str(getattr(func, "__name__", func))


def _written(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
        found += list(_tensors(value))
    return tuple(found)


def _has_storage(value: Tensor) -> bool:
    if type(value) in (Tensor, nn.Parameter):
        return value.layout == torch.strided
    return not is_traceable_wrapper_subclass(value) and value.layout == torch.strided


def _geometry(value: Tensor) -> Geometry:
    return value.storage_offset(), value.shape, value.stride(), value.dtype


def _shares(a: Tensor, b: Tensor) -> bool:
    if not _has_storage(a) or not _has_storage(b):
        return a is b
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dataclass_fields__"):
        for each in vars(value).values():
            yield from _tensors(each)


def _numbers(args: Any) -> tuple[float, ...]:
    return tuple(float(a) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool))


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _spread(values: Any, kernel: Any) -> list[int]:
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return values * len(kernel) if len(values) == 1 else values


def _all_unknown(shape: tuple[int, ...]) -> Dims:
    return tuple(unknown(n) for n in shape)
