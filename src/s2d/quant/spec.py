"""Quantization specs: ``"w4a4"``, ``"nvfp4"``, or the full form, checked before any work starts.

A spec names a format, a granularity and an observer for three groups of sites:

    weight      the weight of every Linear in the encoder; signed (symmetric) integers, one scale an output channel
    activation  the input of each of those Linears; unsigned integers with a zero point, one static range per tensor
    attention   the operands of the attention products: q, k, the softmax probabilities, v; as the activations

Short texts are ``wXaY`` with 2 to 8 bits, or 16 to keep; ``wXaint16`` and ``wXauint16``, whose activations are 16-bit
integers (symmetric, or with a zero point), as NPUs compute them; ``fp8`` (e4m3, ranges as for integers); and ``mxfp8``,
``mxfp4`` and ``nvfp4``, whose blocks have their own scales. ``wXaYkvZ`` gives the keys and values of attention Z bits
in the form of a cache (see below). The suffix ``-token`` on either gives every token its own range.

A ``token`` range belongs to one vector and is found in every forward (the last dimension: a token's features; q, k or v
of one head; a row of probabilities). For v, caches are quantized this way, but an integer product cannot fold such
scales.

A ``span-32`` range belongs to one channel of one head over 32 successive tokens and is found in every forward too. KIVI
(arXiv 2402.02750) caches keys this way, because their outliers stay in their channels. ``kvZ`` is ``span-32`` for k and
``token`` for v; k is what the product reads, after any rotary embedding. A span that is not full yet has its own range
too, where KIVI keeps it at full precision.

A weight can have one scale for every g inputs of a channel (``group-128``), an attention operand one range a head.

A ``prefix`` of n tokens keeps the inputs and attention operands of the first n tokens of every sequence at full
precision, and out of the ranges. Decoders need this where the first token's values are enormous. It is cheap, because
the keys and values of a prefix are computed once and cached (PrefixQuant, arXiv 2410.05265).

Whatever is not a site stays at full precision: norms, softmax, activation functions, residual additions, biases,
tables of embeddings. So do the first and the last layers (patch embedding, pooler, heads), unless ``ends`` says how to
quantize them, or an override names them.

Full form, as a dict (YAML or JSON)::

    base: w4a4                      # optional start; the other keys change it
    weight: {bits: 4, granularity: channel, observer: mse}      # channel, group-G or tensor
    activation: {bits: 8, granularity: token}                   # tensor or token
    attention: false                # or true (as the activations), or {bits: 8, granularity: head} (token, span-G)
    ends: w8a8                      # first and last layers; keep unless given
    prefix: 1                       # the first tokens of a text keep activations and cache at full precision
    overrides:                      # fnmatch, or re:..., on "module" or "module.site"; the last match wins
      "*.output.dense": w4a8
      "*.layer.0.*": keep
      "*.probs": {attention: {bits: 8}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import yaml

from s2d.errors import InputError
from s2d.quant.numerics.formats import (
    FORMATS,
    MAX_BITS,
    MIN_BITS,
    WIDE_BITS,
    BlockFormat,
    Format,
    IntFormat,
    get_format,
    integer_format,
)
from s2d.quant.numerics.observers import ObserverSpec
from s2d.quant.numerics.quantizer import Granularity

Group = Literal["weight", "activation", "attention"]
GROUPS: tuple[Group, ...] = get_args(Group)
KEEP = "keep"
FULL_BITS = 16

_EXAMPLES = 'for example "w4a4", "w8a8", "w4a16", "fp8", or {"base": "w4a4", "activation": {"granularity": "token"}}'
_GRANULARITIES: dict[Group, tuple[Granularity, ...]] = {
    "weight": ("channel", "tensor", "group", "block"),
    "activation": ("tensor", "token", "block"),
    "attention": ("tensor", "token", "head", "span", "block"),
}
# Short texts that name a format instead of widths.
_NAMED = {"fp8": "fp8_e4m3", "mxfp8": "mxfp8", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
# Ranges that are found anew in every forward, so no observer can choose them.
_OWN_RANGE = ("token", "span", "block")
# Granularities with a size, as they are written.
_SIZED = {"group": "group-128", "span": "span-32"}
_SHORT = re.compile(r"w([0-9]{1,4})a(u?int16|[0-9]{1,4})(?:kv([0-9]{1,4}))?(-token)?")
# What ``kvZ`` stands for, chosen on SmolLM2 at 4 bits (docs/results/smollm2.md): keys by spans lose a sixth of what
# keys by tokens lose, values by tokens a sixth of what values by channels lose.
_CACHE: dict[str, str] = {"*.k": "span-32", "*.v": "token"}


@dataclass(frozen=True)
class TensorSpec:
    """How the tensors of one group of sites are quantized; ``group`` is how many inputs or tokens share a scale."""

    format: Format
    granularity: Granularity
    observer: str = "minmax"
    group: int = 0

    def to_dict(self) -> dict[str, str]:
        """The full form."""
        granularity = f"{self.granularity}-{self.group}" if self.group else self.granularity
        return {"format": self.format.name, "granularity": granularity, "observer": self.observer}


@dataclass(frozen=True)
class QuantSpec:
    """A validated spec; ``None`` keeps a group, or the ends, at full precision. Made by `parse`."""

    weight: TensorSpec | None = None
    activation: TensorSpec | None = None
    attention: TensorSpec | None = None
    overrides: tuple[tuple[str, QuantSpec], ...] = ()
    ends: QuantSpec | None = None
    prefix: int = 0

    @staticmethod
    def parse(source: str | Mapping[str, Any] | QuantSpec) -> QuantSpec:
        """Read a spec from its short text, from its full form, or from a text of that (YAML or JSON in braces).

        Raises:
            InputError: Unknown text, key, format, granularity or observer; an impossible width.
        """
        if isinstance(source, QuantSpec):
            return source
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return _from_mapping(_mapping_in(source), None)
        if isinstance(source, str):
            return _from_text(source)
        if isinstance(source, Mapping):
            return _from_mapping(source, None)
        raise InputError(f"a quantization spec is a text or a mapping, not {type(source).__name__}; {_EXAMPLES}")

    def group(self, group: Group) -> TensorSpec | None:
        """The spec of one group of sites, ``None`` when it is kept."""
        return getattr(self, group)

    def override_for(self, module: str, what: str) -> tuple[str, QuantSpec] | None:
        """The last override whose pattern matches the module's or the site's name, with its pattern."""
        found = None
        for pattern, spec in self.overrides:
            if matches(pattern, module) or matches(pattern, f"{module}.{what}"):
                found = (pattern, spec)
        return found

    def with_observer(self, observer: str) -> QuantSpec:
        """The same spec with another calibrator.

        It sets the observer of activations and attention operands, in overrides too, and leaves the ranges of tokens
        and blocks alone, which are always their own. The weights follow with ``mse`` only and use ``minmax`` otherwise:
        a row is too short for a percentile to mean anything (99.9 % of 768 numbers clips less than one a side).

        Raises:
            InputError: Unknown observer.
        """
        weights = "mse" if ObserverSpec.parse(observer).kind == "mse" else "minmax"
        changed: dict[str, Any] = {}
        for group in GROUPS:
            tensor = self.group(group)
            if tensor is not None and tensor.granularity not in _OWN_RANGE:
                changed[group] = replace(tensor, observer=weights if group == "weight" else observer)
        overrides = tuple((pattern, spec.with_observer(observer)) for pattern, spec in self.overrides)
        ends = None if self.ends is None else self.ends.with_observer(observer)
        return replace(self, **changed, overrides=overrides, ends=ends)

    def to_dict(self) -> dict[str, Any]:
        """The full form; `parse` reads it back to an equal spec."""
        form: dict[str, Any] = {}
        for group in GROUPS:
            tensor = self.group(group)
            form[group] = KEEP if tensor is None else tensor.to_dict()
        if self.ends is not None:
            form["ends"] = self.ends.to_dict()
        if self.prefix:
            form["prefix"] = self.prefix
        if self.overrides:
            form["overrides"] = {pattern: spec.to_dict() for pattern, spec in self.overrides}
        return form

    def __str__(self) -> str:
        for text, name in _NAMED.items():
            if all(tensor is not None and tensor.format.name == name for tensor in (self.weight, self.activation)):
                return text
        bits = [_width(tensor) for tensor in (self.weight, self.activation)]
        by_token = self.activation is not None and self.activation.granularity == "token"
        shifts = any(t is not None and t.format.name.endswith("-pow2") for t in (self.weight, self.activation))
        kinds = f"{'-token' if by_token else ''}{'-pow2' if shifts else ''}"
        return f"w{bits[0]}a{bits[1]}{self._cache_name()}{kinds}"

    def _cache_name(self) -> str:
        """``kv8`` where the overrides say what that does."""
        overrides = dict(self.overrides)
        held = {overrides[pattern].attention for pattern in _CACHE if pattern in overrides}
        bits = {FULL_BITS if tensor is None else tensor.format.bits for tensor in held}
        return f"kv{bits.pop()}" if len(bits) == 1 and all(pattern in overrides for pattern in _CACHE) else ""


def _width(tensor: TensorSpec | None) -> str:
    """``"8"``, or ``"int16"`` where 16 alone would mean full precision."""
    if tensor is None:
        return str(FULL_BITS)
    name = tensor.format.name.removesuffix("-pow2")
    return name if isinstance(tensor.format, IntFormat) and tensor.format.bits == WIDE_BITS else str(tensor.format.bits)


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name matches ``re:...`` (searched) or an fnmatch pattern."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatchcase(name, pattern)


def _mapping_in(text: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise InputError(f"the quantization spec {text[:80]!r} is no mapping in braces; {_EXAMPLES}")
    return found


def _from_text(text: str) -> QuantSpec:
    named = _NAMED.get(text.strip().lower())
    if named is not None:
        format = FORMATS[named]
        blocks = isinstance(format, BlockFormat)
        activation = TensorSpec(format, "block" if blocks else "tensor")
        return QuantSpec(TensorSpec(format, "block" if blocks else "channel"), activation, activation)
    match = _SHORT.fullmatch(text.strip().lower())
    if match is None:
        raise InputError(f"unknown quantization spec {text[:80]!r}; {_EXAMPLES}")
    wide = FORMATS[match[2]] if match[2].endswith(str(WIDE_BITS)) and match[2] in FORMATS else None
    weight_bits, activation_bits = int(match[1]), FULL_BITS if wide is not None else int(match[2])
    cache_bits = None if match[3] is None else int(match[3])
    for bits in (weight_bits, activation_bits, cache_bits):
        if bits is not None and bits != FULL_BITS and not MIN_BITS <= bits <= MAX_BITS:
            possible = f"{MIN_BITS} to {MAX_BITS} bits, or {FULL_BITS} to keep full precision"
            raise InputError(f"spec {text!r}: {bits} bits is not possible; use {possible}")
    weight = None if weight_bits == FULL_BITS else TensorSpec(integer_format(weight_bits, signed=True), "channel")
    granularity: Granularity = "token" if match[4] else "tensor"
    activation = None
    if activation_bits != FULL_BITS:
        activation = TensorSpec(integer_format(activation_bits, signed=False), granularity)
    elif wide is not None:
        activation = TensorSpec(wide, granularity)
    spec = QuantSpec(weight, activation, activation)
    return spec if cache_bits is None else replace(spec, overrides=_cache(cache_bits, spec))


def _cache(bits: int, base: QuantSpec) -> tuple[tuple[str, QuantSpec], ...]:
    """Overrides that give the keys and values of attention so many bits, as caches hold them."""
    return tuple(
        (
            pattern,
            replace(base, attention=_tensor("attention", {"bits": bits, "granularity": granularity}, None)),
        )
        for pattern, granularity in _CACHE.items()
    )


def _from_mapping(form: Mapping[str, Any], base: QuantSpec | None) -> QuantSpec:
    _refuse_unknown("the quantization spec", form, ("base", *GROUPS, "ends", "prefix", "overrides"))
    if "base" in form:
        base = QuantSpec.parse(form["base"])
    # Attention follows the activations, unless it is given on its own or the base keeps it.
    follows = base is None or base.attention is not None
    base = base or QuantSpec()
    weight = _tensor("weight", form["weight"], base.weight) if "weight" in form else base.weight
    activation = _tensor("activation", form["activation"], base.activation) if "activation" in form else base.activation
    attention = activation if follows and "activation" in form else base.attention
    if form.get("attention") is True:
        attention = activation
        if activation is None:
            raise InputError('attention: true means "as the activations", but those are kept; give {"bits": 8} instead')
    elif "attention" in form:
        attention = _tensor("attention", form["attention"] or KEEP, attention or activation)
    spec = QuantSpec(weight, activation, attention)
    ends = base.ends
    if "ends" in form:
        ends = None if form["ends"] in (KEEP, None, False) else _inner("ends", form["ends"], spec)
    overrides = form.get("overrides", {})
    if not isinstance(overrides, Mapping):
        raise InputError('overrides is a mapping from pattern to spec, for example {"*.fc2": "w4a8", "head": "keep"}')
    added = tuple((str(pattern), _override(str(pattern), value, spec)) for pattern, value in overrides.items())
    prefix = form.get("prefix", base.prefix)
    if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
        raise InputError(f"prefix is a number of tokens, 0 or more, not {prefix!r}")
    return replace(spec, overrides=base.overrides + added, ends=ends, prefix=prefix)


def _override(pattern: str, value: Any, base: QuantSpec) -> QuantSpec:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise InputError(f"override {pattern!r} is not a regular expression: {error}") from None
    return QuantSpec() if value == KEEP else _inner(f"override {pattern!r}", value, base)


def _inner(where: str, value: Any, base: QuantSpec) -> QuantSpec:
    """A spec inside a spec: for the ends, or for what a pattern matches."""
    if not isinstance(value, Mapping):
        return QuantSpec.parse(value)
    if "overrides" in value:
        raise InputError(f"{where} holds overrides of its own; list them side by side instead")
    if "prefix" in value:
        raise InputError(f"{where} holds a prefix of its own; give it once, beside it")
    if "ends" in value:
        raise InputError(f"{where} holds ends of its own; give them once, beside it")
    return _from_mapping(value, base)


def _tensor(group: Group, form: Any, base: TensorSpec | None) -> TensorSpec | None:
    if form == KEEP or form is None:
        return None
    if not isinstance(form, Mapping):
        raise InputError(f'{group}: expected "keep" or a mapping such as {{"bits": 4}}, not {form!r}')
    _refuse_unknown(group, form, ("bits", "format", "granularity", "observer"))
    if "bits" in form and "format" in form:
        raise InputError(f"{group}: give bits or format, not both")
    if "format" in form:
        format = get_format(str(form["format"]))
        if group == "weight" and isinstance(format, IntFormat) and format.bits > MAX_BITS:
            raise InputError(f"weight: {format.name} is for activations; weights have {MIN_BITS} to {MAX_BITS} bits")
    elif "bits" in form:
        if form["bits"] == FULL_BITS:
            return None
        if not isinstance(form["bits"], int):
            raise InputError(f"{group}: bits is a whole number, not {form['bits']!r}")
        format = integer_format(form["bits"], signed=group == "weight")
    elif base is not None:
        format = base.format
    else:
        raise InputError(f'{group}: give bits or format, for example {{"bits": 8}}')
    blocks = isinstance(format, BlockFormat)
    inherited = base.granularity if base and (base.granularity == "block") == blocks else None
    granularity, size = inherited or ("block" if blocks else _GRANULARITIES[group][0]), base.group if base else 0
    if "granularity" in form:
        granularity, size = _granularity(group, form["granularity"])
    if (granularity == "block") != blocks:
        raise InputError(f"{group}: blocks belong to mxfp8, mxfp4 and nvfp4; {format.name} cannot be per {granularity}")
    observer = str(form.get("observer", base.observer if base and granularity not in _OWN_RANGE else "minmax"))
    if granularity in _OWN_RANGE and observer != "minmax":
        raise InputError(f"{group}: a range per {granularity} is its own; observer must be minmax, not {observer!r}")
    ObserverSpec.parse(observer)
    return TensorSpec(format, granularity, observer, size if granularity in _SIZED else 0)


def _granularity(group: Group, text: Any) -> tuple[Granularity, int]:
    """A granularity, and the size of its groups if it is one of groups."""
    match = re.fullmatch(r"(group|span)-([1-9][0-9]{0,8})", str(text))
    granularity: Any = match[1] if match else text
    # The names without a size.
    if granularity not in _GRANULARITIES[group] or text in _SIZED:
        known = ", ".join(_SIZED.get(name, name) for name in _GRANULARITIES[group])
        raise InputError(f"{group}: granularity {text!r} is not one of {known}")
    return granularity, int(match[2]) if match else 0


def _refuse_unknown(where: str, form: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = ", ".join(sorted(str(key) for key in form if key not in known))
    if unknown:
        names = "; names of layers belong under overrides" if "overrides" in known else ""
        raise InputError(f"unknown keys in {where}: {unknown}; known: {', '.join(known)}{names}")
