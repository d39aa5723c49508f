"""The parts of a graph: calls, the tensors between them, writers, readers, attentions, norms, blocks, masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from s2d.models.dimensions import Dims

Exactness = Literal["exact", "near", "none"]


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """What a dimension counts: rows or tokens of an input, output channels of a call ("features"), or derived ones.

    Attributes:
        kind: ``"input"``, ``"features"``, ``"derived"``, or empty for axis 0: nothing known.
        name: The batch's key, the parameter that makes the channels, or the operation that changed the positions.
        dimension: Which dimension of the input.
        source: The axis that a derived one was made from.
        same_as: The first of the axes equal to this one: a mask's tokens are the tokens that it masks.
    """

    kind: str
    name: str
    dimension: int
    source: int
    same_as: int


@dataclass(frozen=True)
class Node:
    """One value of a tensor: a view of it, or the tensor after an in-place operation, is another one.

    Attributes:
        shape: Its shape in the traced batch.
        dims: What its dimensions count.
        operation: The number of the operation that made it; -1 for one that was there before.
        source: ``"input:KEY"``, ``"parameter"``, ``"buffer:NAME"``, ``"constant"``, ``"outside"`` (torch did not see
            where it came from), or ``"operation"``.
        state: ``"weight"`` for a function of parameters alone, ``"constant"``, or ``"activation"``.
        parameters: For a weight the parameters that it is a function of, by number.
        rows: For a plain view of one parameter, which of its rows; for one of three dimensions its experts.
        plain: It is a view, a transposition or a cast of one parameter, not another function of it.
    """

    id: int
    shape: Shape
    dtype: str
    dims: Dims
    operation: int
    source: str
    state: str
    parameters: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    plain: bool = False


@dataclass(frozen=True)
class Operation:
    """One operation: its kind from `s2d.models.operations`, the module that ran it, what it read and made."""

    index: int
    name: str
    kind: str
    module: str
    run: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    flops: int = 0
    arguments: tuple[float, ...] = ()


@dataclass(frozen=True)
class Call:
    """One use of a weight by one operation.

    ``(id, kind)`` is unique: an operation that reads a weight and its bias makes two calls.

    Attributes:
        module: Path of the innermost module that ran: where a quantizer would be put.
        ordinal: Which operation with weights in this module, counted over all its executions.
        run: Which execution of the module.
        kind: ``"product"``, ``"convolution"``, ``"embedding"``, ``"lookup"`` (rows of a table by number), ``"gain"``,
            ``"bias"``, ``"inserted"`` (a token), ``"elementwise"``, ``"operand"`` (of an attention), ``"function"``
            (with other parameters alone: a merged LoRA), or ``"unknown"``.
        op: The operation, e.g. ``"addmm"``.
        parameters: All tied names of the parameter.
        rows: The part of it that is read: ``(start, stop)`` of its first dimension; None for all.
        experts: For a parameter with three dimensions which matrices took part; empty for any other.
        plain: The operand is the parameter or a view of it; False for a function (1 + w, weight norm, LoRA).
        applied: For a gain: ``"w"``; with a number added first ``"1+w"`` (scaling moves to w + 1); ``"other"``.
        input: Node that is read beside the weight; None if there is none.
        output: Node that is made.
        side: The weight's factor in a product, ``"left"`` or ``"right"``.
        summed: For a parameter with three dimensions that holds a matrix for each position of the first: over which of
            the other two, 1 or 2, the product sums; 0 where it is no such stack.
    """

    module: str
    ordinal: int
    run: int
    kind: str
    op: str
    parameters: tuple[str, ...]
    rows: tuple[int, int] | None
    experts: tuple[int, ...]
    plain: bool
    applied: str
    input: int | None
    output: int
    input_shape: Shape
    output_shape: Shape
    module_class: str
    operation: int
    features: int
    side: str = "right"
    flops: int = 0
    summed: int = 0

    @property
    def id(self) -> tuple[str, int]:
        """``(module path, ordinal)``."""
        return self.module, self.ordinal

    @property
    def parameter(self) -> str:
        """The first name of the parameter."""
        return self.parameters[0]

    def __str__(self) -> str:
        """``kind parameter[rows]``."""
        part = f"[{self.rows[0]}:{self.rows[1]}]" if self.rows else ""
        part += f"[experts {', '.join(map(str, self.experts))}]" if self.experts else ""
        return f"{self.kind} {self.parameter}{part}"


@dataclass(frozen=True)
class Rows:
    """Output channels of a call: ``offset`` plus every sum of ``digit * stride``."""

    offset: int
    digits: tuple[tuple[int, int], ...]

    def indices(self) -> list[int]:
        """The channels, in the order in which the reader has them."""
        out = [self.offset]
        for size, stride in self.digits:
            out = [base + i * stride for base in out for i in range(size)]
        return out

    @property
    def span(self) -> tuple[int, int] | None:
        """``(start, stop)`` if they are neighbours, else None."""
        found = sorted(set(self.indices()))
        return (found[0], found[-1] + 1) if found[-1] - found[0] + 1 == len(found) else None


@dataclass(frozen=True)
class Writer:
    """A call that writes what another call reads.

    Attributes:
        call: The one that writes.
        exactness: Whether a scale of a channel may be moved from what is read into its rows: ``"exact"`` (gain of a
            norm, values of an attention, the linear factor of a gate, ReLU), ``"near"`` (through GELU), ``"none"``.
        path: Names of the operations between the two, from the reader back.
        rows: Which of its output channels are read; None for all, or where they cannot be followed.
    """

    call: Call
    exactness: Exactness
    path: tuple[str, ...]
    rows: Rows | None = None


@dataclass(frozen=True)
class Attention:
    """One softmax attention: its operands are nodes, its products operations.

    Attributes:
        module: Innermost module that ran the products.
        form: ``"fused"`` or ``"math"``.
        q, k, v: Nodes that are multiplied.
        probabilities: Node of the attention's weights; None in the fused form.
        scores, context: Operations of ``q k^T`` and ``probabilities v`` (one in the fused form).
        heads: Heads of the queries.
        q_calls, k_calls, v_calls: What writes the operands, through norms and rotary embeddings.
        mask: Node that is added to the scores or given as mask; None if there is none.
        mask_inputs: Keys of the batch that the mask is made from.
    """

    module: str
    form: str
    q: int
    k: int
    v: int
    probabilities: int | None
    scores: int
    context: int
    heads: int
    head_dim: int
    q_calls: tuple[Writer, ...]
    k_calls: tuple[Writer, ...]
    v_calls: tuple[Writer, ...]
    mask: int | None
    mask_inputs: tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """A reader of a value: a call, or another operation (an unknown one, a residual sum, the model's output)."""

    op: str
    kind: str
    module: str
    call: Call | None = None


@dataclass(frozen=True)
class Norm:
    """One use of a normalisation.

    Attributes:
        module: Innermost module that ran it.
        kind: ``"layer"``, ``"rms"``, ``"batch"`` or ``"group"``.
        gain: Names of its gain; empty if it has none.
        bias: Names of its bias; empty if it has none.
        applied: ``"w"``, ``"1+w"`` or the like; empty without a gain.
        output: Node after gain and bias.
        readers: Everything that reads it, unknown readers too.
    """

    module: str
    kind: str
    gain: tuple[str, ...]
    bias: tuple[str, ...]
    applied: str
    input: int
    output: int
    readers: tuple[Reader, ...]

    @property
    def foldable(self) -> bool:
        """Whether every reader is a product with a weight, so that the gain can move into them."""
        return bool(self.readers) and all(r.call is not None and r.kind == "product" for r in self.readers)


@dataclass(frozen=True)
class Blocks:
    """Blocks that repeat, in the order in which they ran.

    Attributes:
        containers: Path of the list that holds them; several if their blocks take turns.
        members: ``(module path, execution)`` of each block; a shared block comes once for each execution. Execution -1:
            its ``forward`` is called past its hooks.
        inside: The block of an outer sequence that this one is a part of; empty on top.
        shared: A member runs more than once.
    """

    containers: tuple[str, ...]
    members: tuple[tuple[str, int], ...]
    inside: str
    shared: bool


@dataclass(frozen=True)
class Mask:
    """An input that says which tokens are padding.

    Attributes:
        key: Its key in the batch (the position as text, for a batch that is a tuple).
        axes: What its dimensions count.
        padding: The value that marks padding, seen in the attention's weights: 0, 1 (``key_padding_mask``) or -inf;
            None if the traced batch showed none.
    """

    key: str
    axes: tuple[int, ...]
    padding: float | None

    def keeps(self, mask: Tensor) -> Tensor:
        """Where a mask of this kind keeps a token: bool, the shape of ``mask``."""
        padding = self.padding if self.padding is not None else 0.0
        if mask.dtype == torch.bool:
            real = mask if padding == 0 else ~mask
            # The meaning of the values is unknown: a mask does not hide everything.
            return real if self.padding is not None or bool(real.any()) else ~real
        if self.padding is None and mask.is_floating_point() and not bool((mask == 1).any()):
            return mask > -1e3  # one that is added to the scores, of a batch that showed no padding
        return mask > padding if padding < -1e3 else mask != padding


@dataclass(frozen=True)
class Tokens:
    """Which dimensions of a call's input are tokens.

    Attributes:
        dims: Dimensions of the input that count rows or tokens of the model's inputs, all others are channels.
        axes: For each of them the axes that it counts; more than one after a merge, parts of one in windows.
        inputs: Keys of the batch that they come from.
        routed: Rows were picked by number (experts): no mask of the batch has their shape.
    """

    dims: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    routed: bool
