"""Quantization sites of a model: the plan, insertion and removal of quantizers.

Sites are the weight and the input of every Linear of the encoder, and the operands q, k, probs and v of every
attention. `nn.MultiheadAttention` keeps its query, key and value projections in one bare parameter: that parameter and
its input are the sites ``weight`` and ``input`` of the attention module itself. A parameter that holds a stack of
matrices (all experts of a layer) has the sites ``NAME.weight`` and ``NAME.input``, where NAME is that of the parameter.

Two groups stay at full precision by default. The ends are Linears and convolutions whose role in their family is a
head, a pooler or a patch embedding; the spec's ``ends`` can quantize them. Linears outside numbered blocks that no
family knows, and other convolutions, can be quantized by an override.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from s2d.errors import InputError
from s2d.models.family import family_of
from s2d.models.graph import Graph
from s2d.models.running import OPERANDS, What
from s2d.models.stack_products import stacks_of
from s2d.quant.modules import online
from s2d.quant.modules.attention import AttentionQuantizer, QuantizedAttention
from s2d.quant.modules.experts import (
    QuantizedExperts,
    StackQuantizers,
    quantizers_of_stack,
    swap_in_stacks,
    swap_out_stacks,
)
from s2d.quant.modules.linear import QuantizedConv, QuantizedLayer, QuantizedLinear, swap_in, swap_out
from s2d.quant.modules.products import attentions_of
from s2d.quant.numerics.formats import Format
from s2d.quant.numerics.quantizer import Granularity, Quantizer, WeightQuantizer
from s2d.quant.numerics.stacks import StackQuantizer
from s2d.quant.spec import FULL_BITS, Group, QuantSpec, TensorSpec, matches

PROJECTION: tuple[tuple[What, Group], ...] = (("weight", "weight"), ("input", "activation"))
KEPT_ROLES = {
    "head": "head: the last layer stays at full precision",
    "pooler": "pooler: the last layer stays at full precision",
    "patch_embed": "patch embedding: the first layer stays at full precision",
    "embedding": "embedding: the first layer stays at full precision",
}
# Why a weight cannot be quantized, whatever the spec asks for.
MORE = "computes more than a"
TURNED = "a Conv1D is not quantized"
OUTSIDE = "outside the encoder's blocks; an override that names it quantizes it"
COMPUTED = "its weight is computed from others (a parametrization), and no quantizer can sit in between yet"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FAST_PATHS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


@dataclass(frozen=True)
class Site:
    """One row of the plan: a tensor and how it is quantized, or why it is not.

    Attributes:
        module: Dotted name of the module; of a stack of matrices, that of the parameter.
        what: Which of its tensors.
        format: The number format, None when kept at full precision.
        granularity: What has a range of its own; empty when kept.
        observer: How the range is found; empty when kept.
        reason: Why it is kept; empty when quantized.
        shape: The weight's shape; empty for activations.
        group: How many inputs of a channel, or tokens, share a scale, when the granularity is groups or spans.
        prefix: First tokens of a sequence that this site leaves at full precision.
        summed: For a stack of matrices, ``[E, out, in]`` or ``[E, in, out]``: the dimension of the inputs; else 0.
    """

    module: str
    what: What
    format: Format | None
    granularity: Granularity | Literal[""]
    observer: str
    reason: str
    shape: tuple[int, ...] = ()
    group: int = 0
    prefix: int = 0
    summed: int = 0

    @property
    def owner(self) -> str:
        """Dotted name of the module that holds the quantizer."""
        return self.module.rpartition(".")[0] if self.summed else self.module

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs and inputs of a weight; a stack's matrices one below the other."""
        if self.summed:
            return self.shape[0] * self.shape[3 - self.summed], self.shape[self.summed]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def name(self) -> str:
        """``module.what``."""
        return f"{self.module}.{self.what}".lstrip(".")

    @property
    def bits(self) -> int:
        """Bits a value takes, 16 when kept."""
        return FULL_BITS if self.format is None else self.format.bits


def plan(model: nn.Module, spec: QuantSpec, graph: Graph | None = None) -> list[Site]:
    """Plan every site of a plain model from its modules; changes nothing. `coverage.planned` adds the products.

    Args:
        model: A model without quantizers.
        spec: What to quantize.
        graph: The graph of a traced forward (`s2d.trace`), which shows where attention is; without it only
            `nn.MultiheadAttention` is known.

    Raises:
        InputError: The model is quantized already, the spec quantizes nothing in it, an override matches nothing, or a
            module cannot be quantized.
    """
    sites = decide(model, spec, graph)
    if not any(site.format for site in sites):
        raise InputError(_nothing(model, spec, sites))
    return sites


def decide(model: nn.Module, spec: QuantSpec, graph: Graph | None = None) -> list[Site]:
    """As `plan`, but a plan that quantizes nothing is allowed."""
    refuse_quantized(model)
    attentions = {name: "" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    stacks: dict[str, list[tuple[str, int]]] = {}
    if graph is not None:
        attentions |= attentions_of(model, graph)
        for stack in stacks_of(graph):
            stacks.setdefault(stack.owner, []).append((stack.name, stack.summed))
    role = family_of(model).role
    sites: list[Site] = []
    for name, module in model.named_modules():
        if name in attentions:
            sites += _attention_sites(name, module, spec, attentions[name])
        elif isinstance(module, nn.Linear):
            sites += _linear_sites(name, module, spec, role(name))
        elif isinstance(module, CONVOLUTIONS):
            sites += _conv_sites(name, module, spec, role(name))
        elif type(module).__name__ == "Conv1D":  # of transformers: a Linear with its weight transposed
            weight = module.get_parameter("weight")
            sites.append(Site(name, "weight", None, "", "", TURNED, tuple(weight.shape)))
        for parameter, summed in stacks.get(name, ()):
            taken = any(site.module == name for site in sites)
            sites += _stack_sites(f"{name}.{parameter}".lstrip("."), module, parameter, summed, spec, taken)
    unknown: list[str] = []
    if graph is None:
        unknown = [f"{name}.{what}" for name, _ in model.named_modules() for what in OPERANDS]
        held = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
        unknown += [*held, *(f"{name}.{what}" for name in held for what, _ in PROJECTION)]
    _check_overrides(spec, sites, unknown)
    return sites


def describe(sites: Sequence[Site]) -> str:
    """The plan as a table in plain text, one row a site."""
    rows = [("site", "bits", "format", "granularity", "observer", "")]
    for site in sites:
        format = site.format.name if site.format else "full"
        granularity = f"{site.granularity}-{site.group}" if site.group else site.granularity or "-"
        rows.append((site.name, str(site.bits), format, granularity, site.observer or "-", site.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def described(site: Site) -> dict[str, Any]:
    """A site as plain data, as files hold it; only those of stacks have a ``summed``."""
    row = {**vars(site), "format": None if site.format is None else site.format.name}
    return row if site.summed else {name: value for name, value in row.items() if name != "summed"}


def insert(model: nn.Module, sites: Sequence[Site]) -> dict[Site, Quantizer]:
    """Put the quantizers of a plan into the model, in place, all of them off.

    Returns:
        The quantizer of every site that is not kept, in the plan's order.
    """
    quantizers: dict[Site, Quantizer] = {}
    by_module: dict[str, list[Site]] = {}
    for site in sites:
        if site.format is not None:
            quantizers[site] = _quantizer(site)
            by_module.setdefault(site.owner, []).append(site)
    try:
        for name, members in by_module.items():
            module = model.get_submodule(name)
            if members[0].summed:
                stacks: dict[str, dict[str, Quantizer]] = {}
                for site in members:
                    stacks.setdefault(site.module.rpartition(".")[2], {})[site.what] = quantizers[site]
                holders = {each: StackQuantizers(q.get("weight"), q.get("input")) for each, q in stacks.items()}
                swap_in_stacks(module, holders, name)
                continue
            mine = {site.what: quantizers[site] for site in members}
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                children: dict[str, nn.Module | None] = {
                    f"{what}_quantizer": mine.get(what) for what in ("weight", "input")
                }
                swap_in(module, QuantizedLinear if isinstance(module, nn.Linear) else QuantizedConv, children, name)
            else:
                holder = AttentionQuantizer(name, {str(what): quantizer for what, quantizer in mine.items()})
                swap_in(module, QuantizedAttention, {"attention_quantizer": holder}, name)
        _fast_paths(model, on=False)
    except BaseException:
        remove(model)
        raise
    for quantizer in quantizers.values():
        quantizer.train(model.training)
    return quantizers


def replace_quantizer(model: nn.Module, site: Site, quantizer: Quantizer) -> None:
    """Put another quantizer at a site that has one, in place."""
    quantizer.prefix = site.prefix
    module = model.get_submodule(site.owner)
    if site.summed:
        setattr(quantizers_of_stack(module, site.module.rpartition(".")[2]), site.what, quantizer)
    elif isinstance(module, QuantizedAttention):
        setattr(module.attention_quantizer, site.what, quantizer)
    else:
        setattr(module, f"{site.what}_quantizer", quantizer)


def remove(model: nn.Module) -> None:
    """Take all quantizers out, in place; the plain model is left as it was, its weights bit-identical.

    Online operations of methods (`online`) are merged into the weights; the function stays the same.
    """
    online.detach(model)
    _fast_paths(model, on=True)
    for module in list(model.modules()):
        if isinstance(module, QuantizedLayer):
            swap_out(module, ("weight_quantizer", "input_quantizer"))  # pyright: ignore[reportArgumentType]
        elif isinstance(module, QuantizedAttention):
            swap_out(module, ("attention_quantizer",))  # pyright: ignore[reportArgumentType]
        elif isinstance(module, QuantizedExperts):
            swap_out_stacks(module)  # pyright: ignore[reportArgumentType]


def quantizers_of(model: nn.Module) -> Iterator[Quantizer]:
    """All quantizers that sit in a model."""
    return (module for module in model.modules() if isinstance(module, Quantizer))


def is_quantized(model: nn.Module) -> bool:
    """Whether a model holds quantizers."""
    return any(True for _ in quantizers_of(model))


def refuse_quantized(model: nn.Module) -> None:
    """Raise InputError when the model holds quantizers already."""
    if is_quantized(model):
        raise InputError(
            f"{type(model).__name__} is quantized already; use the plain model, or call s2d.quant.remove first"
        )


def weight_name(model: nn.Module, site: Site) -> str:
    """The state-dict key of the parameter behind a ``weight`` site."""
    if site.summed:
        return site.module
    multi_head = isinstance(model.get_submodule(site.module), nn.MultiheadAttention)
    return f"{site.module}.{'in_proj_weight' if multi_head else 'weight'}".lstrip(".")


def _quantizer(site: Site) -> Quantizer:
    assert site.format is not None and site.granularity
    if site.what == "weight" and site.summed:
        return StackQuantizer(
            site.format, site.granularity, name=site.name, shape=site.shape, summed=site.summed, group=site.group
        )
    if site.what == "weight":
        groups = site.shape[1] // site.group if site.group else 0
        return WeightQuantizer(site.format, site.granularity, name=site.name, channels=site.shape[0], groups=groups)
    quantizer = Quantizer(site.format, site.granularity, name=site.name, span=site.group)
    quantizer.prefix = site.prefix
    quantizer.transposed = site.what == "v" and site.granularity == "block"
    return quantizer


def _attention_sites(name: str, module: nn.Module, spec: QuantSpec, forced: str) -> list[Site]:
    sites = []
    if isinstance(module, nn.MultiheadAttention):
        separate = module.in_proj_weight is None
        projection = module.q_proj_weight if separate else module.in_proj_weight
        for what, group in PROJECTION:
            site = _decide(name, what, group, spec, tuple(projection.shape) if what == "weight" else ())
            if separate and site.format is not None:
                raise InputError(f"{name}: separate kdim or vdim is not supported; override it with keep")
            sites.append(site)
    return sites + [_decide(name, what, "attention", spec, forced=forced) for what in OPERANDS]


def _stack_sites(name: str, owner: nn.Module, parameter: str, summed: int, spec: QuantSpec, taken: bool) -> list[Site]:
    kept = "" if re.search(r"(^|\.)\d+(\.|$)", name) else OUTSIDE
    weight = owner.get_parameter(parameter)
    forced = f"a {type(owner).__name__} has other quantizers, and no quantizer can sit beside them yet" if taken else ""
    if not weight.is_floating_point():
        forced = f"its weight is {weight.dtype} already"
    sites = []
    for what, group in PROJECTION:
        shape = tuple(weight.shape) if what == "weight" else ()
        if what == "input" and spec.prefix:
            forced = forced or f"its tokens come without their sequences, so the first {spec.prefix} cannot be kept"
        sites.append(_decide(name, what, group, spec, shape, default=kept, forced=forced, summed=summed))
    return sites


def _linear_sites(name: str, module: nn.Linear, spec: QuantSpec, role: str | None) -> list[Site]:
    kept = KEPT_ROLES.get(role or "", "")
    if role is None and not re.search(r"(^|\.)\d+(\.|$)", name):
        kept = OUTSIDE
    forced = ""
    if type(module).forward is not nn.Linear.forward:
        forced = f"{type(module).__name__} {MORE} Linear"
    elif "weight" not in module._parameters:
        forced = COMPUTED
    elif not module.weight.is_floating_point():
        forced = f"its weight is {module.weight.dtype} already"
    return _projection_sites(name, tuple(module.weight.shape), spec, kept, forced, end=role in KEPT_ROLES)


def _conv_sites(name: str, module: nn.Module, spec: QuantSpec, role: str | None) -> list[Site]:
    kind = type(module).__name__
    kept = KEPT_ROLES.get(role or "", f"a {kind}; an override that names it quantizes it")
    plain = next(cls for cls in CONVOLUTIONS if isinstance(module, cls))
    forced = "" if type(module).forward is plain.forward else f"{kind} {MORE} convolution"
    if "weight" not in module._parameters:
        forced = COMPUTED
    shape = tuple(getattr(module, "weight").shape)  # noqa: B009 (a tensor, computed or not)
    return _projection_sites(name, shape, spec, kept, forced, end=role in KEPT_ROLES)


def _projection_sites(
    name: str, shape: tuple[int, ...], spec: QuantSpec, kept: str, forced: str, *, end: bool
) -> list[Site]:
    ends = spec.ends if end else None
    if ends is not None:
        kept = ""
    return [
        _decide(name, what, group, spec, shape if what == "weight" else (), default=kept, forced=forced, ends=ends)
        for what, group in PROJECTION
    ]


def _decide(
    module: str,
    what: What,
    group: Group,
    spec: QuantSpec,
    shape: tuple[int, ...] = (),
    *,
    default: str = "",
    forced: str = "",
    ends: QuantSpec | None = None,
    summed: int = 0,
) -> Site:
    """One row, decided by the override if there is one, else by the ends, else by the default, else by the spec."""
    override = spec.override_for(module, what)
    tensor: TensorSpec | None = (override[1] if override else ends or spec).group(group)
    reason = forced
    if not reason and tensor is None:
        reason = f"override {override[0]!r}" if override else f"the spec keeps {group} sites"
    if not reason and not override:
        reason = default
    if reason or tensor is None:
        return Site(module, what, None, "", "", reason, shape, summed=summed)
    rows = (0, shape[summed]) if summed and shape else shape
    if tensor.granularity == "group" and (len(rows) != 2 or rows[1] % tensor.group):
        inputs = f"its {rows[1]} inputs" if len(rows) == 2 else "a convolution"
        raise InputError(
            f"{module}: groups of {tensor.group} do not divide {inputs}; choose another group size, or override it"
        )
    prefix = 0 if what == "weight" else spec.prefix
    return Site(
        module, what, tensor.format, tensor.granularity, tensor.observer, "", shape, tensor.group, prefix, summed
    )


def _check_overrides(spec: QuantSpec, sites: Sequence[Site], unknown: Iterable[str]) -> None:
    names = list(dict.fromkeys(name for site in sites for name in (site.module, site.name)))
    for pattern, _ in spec.overrides:
        if not any(matches(pattern, name) for name in (*names, *unknown)):
            # Patterns mostly say how a name ends, so ends are compared.
            end = re.sub(r"^re:|[*?$^\\]", "", pattern).strip(".")
            close = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, end, name[-len(end) :]).ratio())
            raise InputError(f"override {pattern!r} matches no site; close names: {', '.join(close[:3])}")


def _nothing(model: nn.Module, spec: QuantSpec, sites: Sequence[Site]) -> str:
    if not sites:
        return f"{type(model).__name__} has no Linear weights and no attention: there is nothing to quantize"
    if spec.weight is None and spec.activation is None and spec.attention is None and not spec.overrides:
        return f"{spec} keeps everything at full precision: there is nothing to quantize; use for example w8a8"
    kept = ", ".join(f"{site.name} ({site.reason})" for site in sites[:3])
    return (
        f"{spec} quantizes nothing in {type(model).__name__}: {kept}; name layers with overrides, as "
        '{"base": "w8a8", "overrides": {"*": "w8a8"}}'
    )


def _fast_paths(model: nn.Module, *, on: bool) -> None:
    """Torch's fused encoder layers read the plain weights; they are switched off where a quantizer sits below them."""
    for module in model.modules():
        for kind, attribute, off in _FAST_PATHS:
            if not isinstance(module, kind) or not is_quantized(module):
                continue
            saved = f"_plain_{attribute}"
            if on and saved in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(saved))
            elif not on:
                module.__dict__[saved] = getattr(module, attribute)
                setattr(module, attribute, off)
