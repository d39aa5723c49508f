"""The dispatch mode: each operation becomes a row, and each of its operands that is a weight a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from s2d.models import propagation
from s2d.models.dimensions import Dims, unknown, whole
from s2d.models.flops import flops_of
from s2d.models.graph_parts import Call, Node, Operation
from s2d.models.operations import ADDED, BATCH_NORMS, GROUP_NORMS, GROUPED, Kind
from s2d.models.tensors import (
    Memory,
    all_unknown,
    full_name,
    geometry_of,
    has_storage,
    info_of,
    numbers_in,
    spread,
    tensors_in,
    written_by,
)

_COPIES = frozenset(("clone", "_to_copy", "contiguous"))
_FILLS = frozenset(("fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"))


class Tracer(Memory):
    """Records operations, nodes and calls while it is active."""

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.stack and self.stack[-1][0]._parameters:
            self._tell_replaced()
        info = self._infos.get(func)
        if info is None:
            info = self._infos[func] = info_of(func)
        name, kind, mutates = info
        tensors: list[Tensor] = []
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
            elif isinstance(arg, (list, tuple)):
                tensors += [each for each in arg if isinstance(each, Tensor)]
            elif isinstance(arg, dict):
                tensors += list(tensors_in(arg))
        mask = None
        for key, arg in kwargs.items():
            if isinstance(arg, Tensor):
                tensors.append(arg)
                if key in ("attn_mask", "attn_bias"):
                    mask = arg
        inputs = [self._seen(tensor) for tensor in tensors]
        written = written_by(func, args, kwargs) if mutates else ()
        for tensor in written:
            self._guard(tensor)
        out = func(*args, **kwargs)
        if name in ("detach", "alias") and isinstance(out, Tensor) and has_storage(out) and len(inputs) == 1:
            self._storage(out).values.setdefault(geometry_of(out), inputs[0])
            return out
        if kind == "attention" and mask is None and len(args) > 3 and isinstance(args[3], Tensor):
            mask = args[3]
        self._record(func, name, kind, args, kwargs, tensors, inputs, out, written, mask)
        return out

    def _guard(self, tensor: Tensor) -> None:
        """Keep a copy of a buffer or parameter that an operation is about to change."""
        if not has_storage(tensor):
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

    def _record(
        self, func: Any, name: str, kind: Kind, args: Any, kwargs: Any, tensors: list[Tensor], inputs: list[Node],
        out: Any, written: tuple[Tensor, ...], mask: Tensor | None,
    ) -> None:  # fmt: skip
        outs = [out] if isinstance(out, Tensor) else list(tensors_in(out))
        if not outs:
            return
        if name in _FILLS:
            inputs, tensors = [], []
        if name == "copy_" and len(inputs) == 2:
            inputs, tensors = inputs[1:], tensors[1:]
        index = len(self.operations)
        function = self._is_function(kind, name, inputs)
        states = {node.state for node in inputs}
        state = "activation"
        if function or states <= {"constant"}:
            state = "weight" if "weight" in states else "constant"
        parameters = tuple(dict.fromkeys(p for n in inputs for p in n.parameters)) if state == "weight" else ()
        if kind == "product":
            inputs = [self._matrices(node) for node in inputs]
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
                    if has_storage(value):
                        storage = self._storage(value)
                        if storage.parameters:
                            rows = self._rows(value, parameters[0], storage)  # pyright: ignore[reportGeneralTypeIssues]
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
                if kind == "lookup":
                    self._pick(name, args, inputs[0], value, node)
                held = self._matrices(inputs[0]) if inputs and name in _COPIES else None
                if held is not None and held.plain and has_storage(value):
                    along = self._dimensions(tensors[0], held.parameters[0])
                    if len(along) == value.ndim > 1:
                        self._storage(value).walks = dict(zip(value.stride(), along, strict=True))
            made.append(node)
        numbers = numbers_in(args) if kind in ("multiply", "add", "lookup") or name == "expand" else ()
        flops = flops_of(name, tensors, outs, kwargs, args)
        operation = self._operation(name, kind, tuple(n.id for n in inputs), tuple(n.id for n in made), flops, numbers)
        if kind == "unknown" and "activation" in states | {state}:
            self.unknown[(full_name(func), operation.module)] = None
        if kind == "softmax" or mask is not None:
            self._see_padding(name, outs, made, mask)
        if calls or (function and len(parameters) > 1):
            self._call(operation, name, kind, calls, inputs, made, tensors, features, flops, parameters)

    def _keep(self, value: Tensor, node: Node, in_place: bool) -> None:
        if not in_place or not has_storage(value):
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
        storage.values[geometry_of(value)] = node

    def _is_function(self, kind: Kind, name: str, inputs: list[Node]) -> bool:
        """Whether the operation makes a weight of weights, and is no use of one."""
        states = {node.state for node in inputs}
        if "weight" not in states or "activation" in states:
            return False
        if kind in ("embedding", "lookup"):
            return False
        weights = [node for node in inputs if node.state == "weight"]
        if kind in ("product", "convolution", "norm", "attention"):
            if any(len(n.shape) > 1 and n.state != "weight" for n in inputs):
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
                rows, summed = node.rows, 0
                if len(self.shapes[parameter]) == 3 and what == "product":
                    experts, rows = self._experts(name, node, parameter, tensors), None
                    summed = self._summed(name, position, tensors[position], parameter)
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
                        summed=summed,
                    )
                )

    def _pick(self, name: str, args: Any, table: Node, value: Tensor, node: Node) -> None:
        """Note which matrices of a stack ``[E, a, b]`` a lookup by its first dimension picks: ``[..., a, b]``."""
        whole_stack = table.plain and table.rows is None and len(table.parameters) == 1
        if not whole_stack or len(self.shapes[table.parameters[0]]) != 3 or len(table.shape) != 3:
            return
        places = args[1] if name == "index" else [args[2]] if name == "index_select" and args[1] == 0 else []
        if len(places) == 1 and isinstance(places[0], Tensor) and value.ndim > 2 and has_storage(value):
            chosen = places[0].nonzero() if places[0].dtype == torch.bool else places[0]
            self.picks[node.id] = tuple(chosen.flatten().unique().tolist())
            self._storage(value).walks = {value.stride(-2): 1, value.stride(-1): 2}

    def _matrices(self, node: Node) -> Node:
        """A value that holds matrices picked out of a stack, as that weight; any other node as it is."""
        found = node
        while found.id not in self.picks:
            operation = self.operations[found.operation] if found.operation >= 0 else None
            if found.state != "activation" or operation is None or operation.kind != "view":
                return node
            found = self.nodes[operation.inputs[0]]
        table = self.nodes[self.operations[found.operation].inputs[0]]
        self.picks[node.id] = self.picks[found.id]
        return replace(node, state="weight", parameters=table.parameters, plain=True)

    def _experts(self, name: str, node: Node, parameter: int, tensors: list[Tensor]) -> tuple[int, ...]:
        if node.id in self.picks:
            return self.picks[node.id]
        first, stop = node.rows if node.rows is not None else (0, self.shapes[parameter][0])
        if name in GROUPED and len(tensors) > 2 and not tensors[2].is_floating_point():
            ends = tensors[2].tolist()
            return tuple(first + e for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a)
        return tuple(range(first, stop))

    def _summed(self, name: str, position: int, weight: Tensor, parameter: int) -> int:
        """Over which dimension of a stack of matrices a product sums; 0 if it does not multiply by its matrices."""
        if weight.ndim < 2:
            return 0
        along = self._dimensions(weight, parameter)
        first = next(i for i in range(3) if i != ADDED.get(name))
        last = position == first or name in ("linear", "linear_relu")
        summed, kept = (along[-1], along[-2]) if last else (along[-2], along[-1])
        return summed if {summed, kept} == {1, 2} else 0

    def _dimensions(self, value: Tensor, parameter: int) -> tuple[int, ...]:
        """Along which dimension of a parameter each one of a view of it walks; -1 where that cannot be told."""
        if not has_storage(value):
            return (-1,) * value.ndim
        storage = self._storage(value)
        held = next((row[3] for row in storage.parameters if row[2] == parameter), None)
        walks = storage.walks if held is None else {stride: dim for dim, stride in enumerate(held)}
        return tuple(walks.get(stride, -1) for stride in value.stride())

    def _applied(self, node: Node) -> str:
        """How a gain multiplies: as it is, or with a number added to it, such as 1 + w."""
        while not node.plain:
            if node.operation < 0:
                return "other"
            operation = self.operations[node.operation]
            if operation.name.rstrip("_") == "add" and len(operation.arguments) == 1 and len(operation.inputs) <= 2:
                weights = [self.nodes[i] for i in operation.inputs if self.nodes[i].state == "weight"]
                added = operation.arguments[0]
                return f"{added:g}+w" if len(weights) == 1 and weights[0].plain else "other"
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
            # The weight names only the channels that it makes.
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
                2 * p == d * (k - 1) for p, d, k in zip(spread(padding, kernel), spread(dilation, kernel), kernel,
                                                        strict=True)
            )  # fmt: skip
            return propagation.convolution(axes, dims[0], shape, features, same)
        if kind == "embedding":
            return (*dims[1], whole(features, shape[-1])) if len(dims[1]) + 1 == len(shape) else all_unknown(shape)  # pyright: ignore[reportGeneralTypeIssues]
        if kind == "attention":
            if part:
                return all_unknown(shape)
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
                return all_unknown(shape)
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
        """The value of a mask that marks padding: the value at the tokens that no query attends to."""
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
