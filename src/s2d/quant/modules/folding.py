"""Folding: scales and rotations moved from one weight into the next without changing the model's function.

Three exact moves, the first two found in the graph of a forward, the last from the roles that a family gives its parts:

    norm -> readers     the norm's output times 1/s, the readers' columns times s          (pre-norm blocks only)
    v -> proj           rows of v times 1/s, the same columns of proj times s: attention averages over tokens,
                        channel by channel, so it commutes with a scale; likewise the other factor of a gate
    basis of a stream   every writer to the residual stream times Q, every reader's input times Q^T

Where norms follow the residual sum (BERT), a norm's output is also the residual, and the first and the last move would
change it: such pairs are marked ``residual``; methods skip them or refuse the model.

All is computed in float64 and rounded once to the weights' own type.

Shapes: D the width of the stream, P the width of all heads together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.family import Family, family_of
from s2d.models.graph import Graph
from s2d.models.graph_parts import Call, Norm, Rows, Writer

_ATTENTION_READERS = ("q", "k", "v", "qkv")
_MLP_READERS = ("fc1", "gate")
_LAYER_SCALE = re.compile(r"(?:ls|layer_?scale|gamma)_?([12])(?:\.\w+)?$")
# In weights of this name the rows of q, k and v alternate head by head, so v is not one slice of rows.
_INTERLEAVED = re.compile(r"query_key_value$")


@dataclass(frozen=True)
class NormFold:
    """A norm and the Linears that read exactly its output.

    Attributes:
        norm: Dotted name of the norm.
        readers: Dotted names; `nn.MultiheadAttention` stands for its fused projection.
        residual: The output also feeds something else (the residual sum of post-norm blocks), or a reader reads other
            values too, so that no scale can move.
    """

    norm: str
    readers: tuple[str, ...]
    residual: bool


@dataclass(frozen=True)
class PairFold:
    """The values of an attention and the output projection that reads their weighted average, channel by channel; or
    the rows beside a gate and the Linear behind it, as one head.

    Attributes:
        writer: The module whose weight holds the rows of v.
        rows: First row of v, and the one behind the last.
        reader: The output projection, ``[D, P]``.
        head_dim: Channels a head.
        heads: Heads of the queries, ``P / head_dim``; those of v can be fewer, each shared by a group.
    """

    writer: str
    rows: tuple[int, int]
    reader: str
    head_dim: int
    heads: int

    @property
    def value_heads(self) -> int:
        """Heads of v."""
        return (self.rows[1] - self.rows[0]) // self.head_dim

    def to_reader(self, per_value: Tensor) -> Tensor:
        """From channels of v ``[value_heads * head_dim]`` to the columns of the reader that read them ``[P]``."""
        group = self.heads // self.value_heads
        return per_value.view(self.value_heads, self.head_dim).repeat_interleave(group, dim=0).flatten()

    def to_value(self, per_column: Tensor, how: Literal["max", "mean"]) -> Tensor:
        """From columns of the reader ``[P]`` to the channels of v that they read ``[value_heads * head_dim]``."""
        grouped = per_column.view(self.value_heads, -1, self.head_dim)
        return (grouped.amax(1) if how == "max" else grouped.mean(1)).flatten()


@dataclass(frozen=True)
class AttentionParts:
    """The rows of q and k of an attention, besides its values.

    Attributes:
        name: The attention module.
        values: Its v and proj.
        q: Module and rows ``(name, first, behind the last)``.
        k: Likewise.
        normed: Norms sit on q and k, so their channels cannot be mixed.
    """

    name: str
    values: PairFold
    q: tuple[str, int, int]
    k: tuple[str, int, int]
    normed: bool


@dataclass(frozen=True)
class Branch:
    """One sublayer of a pre-norm block.

    Attributes:
        norm: Its norm.
        readers: The Linears behind the norm.
        writer: The Linear whose output is added to the stream.
        scale: Name of the parameter ``[D]`` that multiplies the writer's output (LayerScale), or None.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    scale: str | None


@dataclass(frozen=True)
class Stream:
    """A residual stream: consecutive pre-norm blocks of one width."""

    blocks: tuple[str, ...]
    width: int
    centred: bool
    branches: tuple[Branch, ...] = field(repr=False)


def norm_folds(model: nn.Module, graph: Graph) -> list[NormFold]:
    """Every norm with a gain whose output Linears read, in the order in which they run.

    ``residual`` where anything else reads it too, in any of its executions, or where its readers read other values.
    """
    uses: dict[str, list[Norm]] = {}
    for norm in graph.norms:
        if norm.gain and norm.kind in ("layer", "rms"):
            uses.setdefault(_owner(norm.gain[0]), []).append(norm)
    folds = []
    for name, norms in uses.items():
        read = [(norm, r.call) for norm in norms for r in norm.readers if r.call is not None and r.kind == "product"]
        readers = tuple(dict.fromkeys(_owner(call.parameter) for _, call in read))
        if not readers or not _scalable(model, name) or not _own_weights(model, readers):
            continue
        calls = {call.operation for _, call in read}
        alone = all(call.operation in calls for call in graph.products if _owner(call.parameter) in readers)
        if all(_sums_channels(graph, norm, call) for norm, call in read):
            folds.append(NormFold(name, readers, not (alone and all(norm.foldable for norm in norms))))
    return folds


def _sums_channels(graph: Graph, norm: Norm, call: Call) -> bool:
    """Whether a product sums over the channels of a norm, not over its tokens (MLP-Mixer)."""
    dims = graph.nodes[norm.output].dims
    read = () if call.input is None else graph.nodes[call.input].dims
    return read[-1:] == dims[-1:] and dims.count(dims[-1]) == 1


def pair_folds(model: nn.Module, graph: Graph) -> list[PairFold]:
    """Every weight whose rows match the columns of the one Linear that reads them, in the order of the readers.

    Between them is an attention over tokens (values and output projection), or the product with a gate.
    """
    kinds = {operation.name: operation.kind for operation in graph.operations}
    heads = {w.call.operation: one.head_dim for one in graph.attentions for w in one.v_calls}
    pairs = [(call, writer) for call in graph.products for writer in graph.writers(call)]
    moving = [
        (call, writer) for call, writer in pairs
        if writer.exactness == "exact" and writer.call.kind == "product" and writer.rows is not None
        and not {kinds[name] for name in writer.path}.isdisjoint(("attention", "product", "multiply"))
    ]  # fmt: skip
    made_here = {writer.call.operation for _, writer in moving}
    readers: dict[tuple[int, int], set[str]] = {}  # of each row
    for call, writer in pairs:
        if writer.call.operation in made_here:
            rows = range(writer.call.output_shape[-1]) if writer.rows is None else writer.rows.indices()
            for row in rows:
                readers.setdefault((writer.call.operation, row), set()).add(call.parameter)
    found: dict[PairFold, None] = {}
    for call, writer in moving:
        made, names = writer.call, (_owner(writer.call.parameter), _owner(call.parameter))
        span = writer.rows.span if writer.rows is not None else None
        if (
            span is None
            or any(len(readers[made.operation, row]) > 1 for row in range(*span))
            or not _own_weights(model, names)
        ):
            continue
        first, width = (made.rows or (0, 0))[0], matrix(model, names[1])[0].shape[1]
        head_dim = heads.get(made.operation, span[1] - span[0])
        if width % head_dim == 0 and (span[1] - span[0]) % head_dim == 0:
            fold = PairFold(names[0], (first + span[0], first + span[1]), names[1], head_dim, width // head_dim)
            if fold not in found and fold.heads % fold.value_heads == 0 and _writes_exactly(fold, graph):
                found[fold] = None
    return list(found)


def _writes_exactly(fold: PairFold, graph: Graph) -> bool:
    """Whether a scale of the writer's rows reaches the reader unchanged."""
    reads = [call for call in graph.products if _owner(call.parameter) == fold.reader]
    order = fold.to_reader(torch.arange(*fold.rows)).tolist()  # the row behind each column, as the fold has it
    for call in reads:
        writers = graph.writers(call)
        mine = [w for w in writers if w.call.kind != "bias" and _owner(w.call.parameter) == fold.writer]
        exact = all(w.exactness == "exact" and order in _orders(graph, call, w) for w in mine)
        # A bias outside the writer would not be scaled.
        biases = [c for w in mine for c in graph.at(w.call.operation)] + [
            w.call for w in writers if w.exactness == "exact"
        ]
        strange = any(c.kind == "bias" and _owner(c.parameter) != fold.writer for c in biases)
        if not mine or not exact or strange:
            return False
    return bool(reads)


def _orders(graph: Graph, call: Call, writer: Writer) -> list[list[int]]:
    """The writer's row behind each column of a product: of those that the way from it forks to, and of its input,
    whose heads may be repeated. None where other values stand beside them (ConvBERT joins a convolution's).
    """
    first = (writer.call.rows or (0, 0))[0]
    found = [] if writer.rows is None else [writer.rows.indices()]
    digits = graph.nodes[call.input].dims[-1] if call.input is not None else ()
    if all(digit.axis == writer.call.features or digit.stride == 0 for digit in digits):
        rows = Rows(sum(digit.offset for digit in digits), tuple((digit.size, digit.stride) for digit in digits))
        found.append(rows.indices())
    return [[first + row for row in order] for order in found]


def second_linears(model: nn.Module) -> list[str]:
    """The Linears behind the activation functions of MLPs."""
    role = family_of(model).role
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and role(name) == "fc2"]


def attention_parts(model: nn.Module, graph: Graph) -> list[AttentionParts]:
    """Every attention whose q, k, v and proj are known by their rows, with nothing between v and proj."""
    family = family_of(model)
    modules = dict(model.named_modules())
    names = [*family.attentions(model), *(n for n, m in modules.items() if isinstance(m, nn.MultiheadAttention))]
    found = []
    for unit, parts in _units(model, family).items():
        mine = [name for name in dict.fromkeys(names) if f"{name}.".startswith(f"{unit}." if unit else "")]
        proj = _only(parts, "proj")
        if len(mine) != 1 or proj is None or not isinstance(modules[proj], nn.Linear):
            continue
        proj_weight, _ = matrix(model, proj)
        inner = [name.rpartition(".")[2] for name in parts.get("norm_inner", []) if name.startswith(f"{mine[0]}.")]
        width = proj_weight.shape[1]
        rows = _projection_rows(model, parts, width)
        head_dim = _head_dim(modules[mine[0]], width)
        if rows is None or head_dim is None or any(name not in ("q_norm", "k_norm") for name in inner):
            continue
        if not _own_weights(model, tuple({rows["q"][0], rows["k"][0], rows["v"][0], proj})):
            continue
        writer, start, stop = rows["v"]
        if width % head_dim or (stop - start) % head_dim or (width // head_dim) % ((stop - start) // head_dim):
            continue
        values = PairFold(writer, (start, stop), proj, head_dim, width // head_dim)
        if _writes_exactly(values, graph):
            found.append(AttentionParts(mine[0], values, rows["q"], rows["k"], bool(inner)))
    return found


def is_post_norm(model: nn.Module) -> bool:
    """Whether any block's norms follow the residual sum."""
    family = family_of(model)
    return any(not _is_pre_norm(model, family, name) for name in family.blocks(model))


def refuse_post_norm(model: nn.Module, method: str) -> None:
    """Raise InputError when norms follow the residual sum, so that nothing can be folded into them."""
    if is_post_norm(model):
        raise InputError(
            f"{method} folds into norms that feed only their own sublayer, but {type(model).__name__} is post-norm: "
            "their output is the residual too; use rtn, gptq, erq or svdquant"
        )


def streams(model: nn.Module, method: str) -> list[Stream]:
    """The residual streams of a pre-norm model, one for every run of blocks.

    Raises:
        InputError: A post-norm model, no blocks that a family knows, or a part of a block whose place in the stream is
            not known; named, with the remedy.
    """
    refuse_post_norm(model, method)
    family = family_of(model)
    units = _units(model, family)
    runs: dict[str, list[str]] = {}
    for name in family.blocks(model):
        runs.setdefault(name.rpartition(".")[0], []).append(name)
    if not runs:
        raise InputError(
            f"{method} finds no transformer blocks in {type(model).__name__}; use gptq or svdquant instead"
        )
    found = []
    for names in runs.values():
        branches = [branch for name in names for branch in _branches(model, name, units[name], method)]
        kinds = [norm_kind(model.get_submodule(branch.norm), branch.norm) for branch in branches]
        width = matrix(model, branches[0].writer)[0].shape[0]
        found.append(Stream(tuple(names), width, any(kind.startswith("layer") for kind in kinds), tuple(branches)))
    return found


def matrix(model: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight ``[out, in]`` and bias of a Linear, or of the fused projection of an `nn.MultiheadAttention`."""
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        return module.get_parameter("in_proj_weight"), module._parameters["in_proj_bias"]
    assert isinstance(module, nn.Linear)
    return module.get_parameter("weight"), module._parameters["bias"]


@torch.no_grad()
def scale_norm_output(norm: nn.Module, scale: Tensor) -> None:
    """Divide a norm's output by ``scale [D]`` (> 0), in place, through its gain and its bias."""
    offset = 1.0 if norm_kind(norm, type(norm).__name__).endswith("+1") else 0.0
    scale = scale.double()
    gain: Tensor = norm.get_parameter("weight")
    gain.copy_((gain.double() + offset) / scale - offset)
    bias = norm._parameters.get("bias")
    if bias is not None:
        bias.copy_(bias.double() / scale)


@torch.no_grad()
def scale_columns(weight: Tensor, scale: Tensor) -> None:
    """Multiply the columns of ``weight [out, in]`` by ``scale [in]``, in place."""
    weight.copy_(weight.double() * scale.double())


@torch.no_grad()
def scale_rows(weight: Tensor, bias: Tensor | None, scale: Tensor, rows: tuple[int, int]) -> None:
    """Divide those rows of a weight and a bias by ``scale [rows]`` (> 0), in place."""
    part = slice(*rows)
    weight[part] = (weight[part].double() / scale.double()[:, None]).to(weight.dtype)
    if bias is not None:
        bias[part] = (bias[part].double() / scale.double()).to(bias.dtype)


def apply_norm_fold(model: nn.Module, fold: NormFold, scale: Tensor) -> None:
    """Move ``scale [D]`` from a norm's output into its readers, in place; the function stays what it was."""
    assert not fold.residual
    scale_norm_output(model.get_submodule(fold.norm), scale)
    for reader in fold.readers:
        scale_columns(matrix(model, reader)[0], scale)


def apply_value_fold(model: nn.Module, fold: PairFold, scale: Tensor) -> None:
    """Move ``scale [value_heads * head_dim]`` from v into proj, in place; the function stays what it was."""
    scale_rows(*matrix(model, fold.writer), scale, fold.rows)
    scale_columns(matrix(model, fold.reader)[0], fold.to_reader(scale))


def norm_kind(norm: nn.Module, name: str) -> Literal["layer", "rms", "layer+1", "rms+1"]:
    """What a norm computes, found by a test input: LayerNorm, RMSNorm, or one of them with a gain stored as gain - 1
    (Nemotron, Gemma).

    Raises:
        InputError: It is none of these.
    """
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    shape: Any = getattr(norm, "normalized_shape", None)
    width = len(weight) if weight is not None else int(shape[-1] if isinstance(shape, (tuple, list)) else shape or 0)
    if not width:
        raise InputError(f"{name} ({type(norm).__name__}) is a norm of unknown width; use a method that folds nothing")
    dtype, device = (torch.float32, None) if weight is None else (weight.dtype, weight.device)
    x = torch.linspace(-1.0, 2.0, width, dtype=torch.float64).sin() * 3.0 + 1.0
    with torch.no_grad():
        y = norm(x.to(device, dtype)[None])[0].double().cpu()
    gain = torch.ones(width, dtype=torch.float64) if weight is None else weight.detach().double().cpu()
    shift = torch.zeros(width, dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    normed = {"layer": (x - x.mean()) / x.var(correction=0).sqrt(), "rms": x / x.square().mean().sqrt()}
    candidates = {kind: value * gain for kind, value in normed.items()}
    candidates |= {f"{kind}+1": value * (gain + 1.0) for kind, value in normed.items()}
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 3e-2
    for kind, value in candidates.items():
        if (value + shift - y).norm() <= tolerance * y.norm().clamp(min=1e-6):
            return kind  # pyright: ignore[reportReturnType]
    raise InputError(
        f"{name} ({type(norm).__name__}) is neither LayerNorm nor RMSNorm; use a method that folds nothing"
    )


@torch.no_grad()
def merge_norm(model: nn.Module, branch: Branch) -> None:
    """Move a norm's gain and bias into its readers and a LayerScale into its writer, in place.

    If a reader has no bias, the norm's bias stays in the norm, divided by the gain.

    Raises:
        InputError: Such a bias meets a gain of 0.
    """
    norm = model.get_submodule(branch.norm)
    gain_parameter, shift_parameter = norm._parameters.get("weight"), norm._parameters.get("bias")
    if gain_parameter is not None:
        offset = 1.0 if norm_kind(norm, branch.norm).endswith("+1") else 0.0
        gain = gain_parameter.double() + offset
        weights = [matrix(model, reader) for reader in branch.readers]
        if shift_parameter is not None:
            shift = shift_parameter.double()
            if all(bias is not None for _, bias in weights):
                for weight, bias in weights:
                    assert bias is not None
                    bias.copy_(bias.double() + weight.double() @ shift)
                shift_parameter.zero_()
            elif bool((gain == 0).any()):
                raise InputError(
                    f"{branch.norm} has a gain of 0 and a reader without a bias: it cannot be folded; "
                    "use a method that folds nothing"
                )
            else:
                shift_parameter.copy_(shift / gain)
        for weight, _ in weights:
            scale_columns(weight, gain)
        gain_parameter.fill_(1.0 - offset)
    if branch.scale is not None:
        scale = model.get_parameter(branch.scale)
        weight, bias = matrix(model, branch.writer)
        weight.copy_(weight.double() * scale.double()[:, None])
        if bias is not None:
            bias.copy_(bias.double() * scale.double())
        scale.fill_(1.0)


@torch.no_grad()
def change_basis(model: nn.Module, stream: Stream, rotation: Tensor) -> None:
    """Let the blocks of a stream work on ``x Q`` in place of ``x``, in place. Norms must have no gains (`merge_norm`).

    A LayerNorm takes the mean out first, so for streams with one Q must keep the vector of ones: then the mean of
    ``x Q`` is that of ``x``, and the norm commutes with Q as it is.

    Args:
        model: The model.
        stream: Which of its streams.
        rotation: Q, orthogonal ``[D, D]``, float64.
    """
    for branch in stream.branches:
        for reader in branch.readers:
            weight, _ = matrix(model, reader)
            weight.copy_(weight.double() @ rotation)
        shift = model.get_submodule(branch.norm)._parameters.get("bias")
        if shift is not None:
            shift.copy_(shift.double() @ rotation)
        weight, bias = matrix(model, branch.writer)
        weight.copy_(rotation.T @ weight.double())
        if bias is not None:
            bias.copy_(bias.double() @ rotation)


def _units(model: nn.Module, family: Family) -> dict[str, dict[str, list[str]]]:
    """Blocks, and attention pooling heads, with the names of their parts by role."""
    # Quantizers in a model are named after operands (q, k, v) and are no parts of it.
    names = [
        name
        for name, module in model.named_modules()
        if "_quantizer" not in name and not isinstance(module, nn.Identity)
    ]
    units: dict[str, dict[str, list[str]]] = {name: {} for name in family.blocks(model)}
    for attention in family.attentions(model):
        if not any(attention.startswith(f"{unit}.") for unit in units):
            whole = any(name.startswith(f"{attention}.") and family.role(name) == "fc1" for name in names)
            units[attention if whole else attention.rpartition(".")[0]] = {}
    for name in names:
        role = family.role(name)
        unit = max((unit for unit in units if name.startswith(f"{unit}.") or not unit), key=len, default=None)
        if role is not None and unit is not None:
            units[unit].setdefault(role, []).append(name)
    return units


def _is_pre_norm(model: nn.Module, family: Family, unit: str) -> bool:
    # Torch's own layer says which of the two it is; the family's entry is a guess.
    stated = getattr(model.get_submodule(unit), "norm_first", None)
    return stated if isinstance(stated, bool) else family.norm_position == "pre"


def _present(parts: dict[str, list[str]], roles: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of these roles; empty when a role occurs twice."""
    if any(len(parts.get(role, ())) > 1 for role in roles):
        return ()
    return tuple(parts[role][0] for role in roles if role in parts)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _only(parts: dict[str, list[str]], role: str) -> str | None:
    return parts[role][0] if len(parts.get(role, ())) == 1 else None


def _scalable(model: nn.Module, norm: str) -> bool:
    """Whether a norm has a gain for each channel and computes, given tokens ``[N, D]``, what `norm_kind` knows."""
    module = model.get_submodule(norm)
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1:
        return False
    try:
        norm_kind(module, norm)
    except (InputError, RuntimeError, TypeError):  # of images, or with other inputs
        return False
    return True


def _own_weights(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether all are plain products whose weights nothing else uses."""
    modules = [model.get_submodule(name) for name in names]
    if not all(
        isinstance(module, nn.Linear)
        or (isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None)
        for module in modules
    ):
        return False
    mine = {id(matrix(model, name)[0]) for name in names}
    uses = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return all(uses.count(one) == 1 for one in mine)


def _projection_rows(
    model: nn.Module, parts: dict[str, list[str]], width: int
) -> dict[str, tuple[str, int, int]] | None:
    """Module and rows of q, k and v, None when they are not known. ``width`` is P, that of the queries."""
    fused, both, single = _only(parts, "qkv"), _only(parts, "kv"), [_only(parts, role) for role in ("q", "k", "v")]
    if fused is not None and single == [None] * 3 and not _INTERLEAVED.search(fused):
        if not _own_weights(model, (fused,)) or getattr(model.get_submodule(fused), "bias_k", None) is not None:
            return None
        total = matrix(model, fused)[0].shape[0]
        if total <= width or (total - width) % 2:
            return None
        middle = width + (total - width) // 2
        return {"q": (fused, 0, width), "k": (fused, width, middle), "v": (fused, middle, total)}
    named: dict[str, str | None] = {"q": single[0], "k": single[1], "v": single[2]}
    if both is not None and single[0] is not None and _own_weights(model, (both, single[0])):
        half = matrix(model, both)[0].shape[0] // 2
        return {"q": (single[0], 0, width), "k": (both, 0, half), "v": (both, half, 2 * half)}
    chosen = {which: name for which, name in named.items() if name is not None}
    if len(chosen) < 3 or not _own_weights(model, tuple(chosen.values())):
        return None
    return {which: (name, 0, matrix(model, name)[0].shape[0]) for which, name in chosen.items()}


def _head_dim(attention: nn.Module, width: int) -> int | None:
    for name in ("head_dim", "attention_head_size"):
        value = getattr(attention, name, None)
        if isinstance(value, int) and value > 0 and width % value == 0:
            return value
    for name in ("num_heads", "num_attention_heads", "n_heads", "heads"):
        value = getattr(attention, name, None)
        if isinstance(value, int) and value > 0 and width % value == 0:
            return width // value
    return None


def _branches(model: nn.Module, block: str, parts: dict[str, list[str]], method: str) -> Iterator[Branch]:
    """The attention and the MLP of a block, after checking that nothing else in it can touch the stream."""
    remedy = "use a method that folds nothing, such as gptq or svdquant"
    scales = {}
    known = {name for role in ("norm_inner", "norm1", "norm2", "proj", "fc2") for name in parts.get(role, ())}
    known |= {name for role in (*_ATTENTION_READERS, *_MLP_READERS) for name in parts.get(role, ())}
    for name, parameter in model.get_submodule(block).named_parameters():
        full = f"{block}.{name}"
        if "_quantizer." in name:
            continue
        scale = _LAYER_SCALE.search(name)
        if scale is not None and parameter.ndim == 1:
            scales[scale[1]] = full
        elif full.rpartition(".")[0] not in known and not re.search(r"relative_position_bias", name):
            raise InputError(f"{method} does not know what {full} does to the residual stream; {remedy}")
    for number, norm_role, readers, writer_role in (
        ("1", "norm1", _ATTENTION_READERS, "proj"),
        ("2", "norm2", _MLP_READERS, "fc2"),
    ):
        norm, writer, found = _only(parts, norm_role), _only(parts, writer_role), _present(parts, readers)
        if norm is None or writer is None or not found or not _own_weights(model, (*found, writer)):
            raise InputError(
                f"{method} does not find one {norm_role}, its readers and {writer_role} in {block}; {remedy}"
            )
        yield Branch(norm, found, writer, scales.get(number))
