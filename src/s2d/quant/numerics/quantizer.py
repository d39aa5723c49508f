"""Scale and zero point, and fake quantization with a straight-through gradient.

Integers: `code = clamp(round(x / scale) + zero_point, qmin, qmax)`, `x_hat = scale * (code - zero_point)`, round half
to even. Floating point: `x_hat = scale * round_float(x / scale)`. Blocks: the same, with a scale found for every block.
Pure functions on tensors first, then the modules that sit in a model.

Scale and zero point broadcast against x:
    per tensor   []            one pair
    per channel  [C, 1, ...]   one pair a row of a weight
    per group    [C, D]        one pair for every g inputs of a row (kept as [C, D / g])
    per head     [H, 1, 1]     one pair a head of an attention operand [B, H, T, D]
    per token    [..., 1]      one pair a vector, found anew in every forward
    per span     [..., T, D]   one pair for a channel of every g successive tokens, found anew in every forward
    per block    []            the tensor's scale, above those of the blocks (1 for formats that have none)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant.numerics.formats import MAX_BITS, BlockFormat, FloatFormat, Format, IntFormat, power_of_two, round_float

Granularity = Literal["tensor", "channel", "group", "token", "span", "head", "block"]

# Dead channels have an empty range; their scale stops here, so that 1/scale stays finite and zeros stay zeros.
SMALLEST_SCALE = 2.0**-40


def affine_parameters(lo: Tensor, hi: Tensor, format: Format, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[lo, hi]``.

    The range is widened to contain 0, so that 0 is always represented exactly (padding, masked probabilities, dead
    units). The zero point is an integer inside the code range.

    Args:
        lo: Smallest value of each range, any shape.
        hi: Largest value of each range, the shape of ``lo``.
        format: The number format.
        symmetric: Centre the range on 0 (zero point 0); needs a symmetric format. Only integers can do without.

    Returns:
        ``scale`` (float32, > 0; the next power of two where the format has no others; 1 where blocks bring all the
        scale there is) and ``zero_point`` (int32), both of the shape of ``lo``.
    """
    lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
    if symmetric:
        if not format.symmetric:
            raise ValueError(f"a symmetric range needs a signed format, not {format.name}")
        scale = (torch.maximum(-lo, hi) / format.qmax).clamp(min=SMALLEST_SCALE)
        if isinstance(format, BlockFormat) and format.scale is None:
            scale = torch.ones_like(scale)
        if isinstance(format, IntFormat) and format.power_of_two:
            scale = power_of_two(scale)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    if not isinstance(format, IntFormat):
        raise ValueError(f"{format.name} has no zero point; its ranges are symmetric")
    # Dividing before subtracting keeps the width finite for any finite float32 ends.
    steps = format.qmax - format.qmin
    scale = (hi / steps - lo / steps).clamp(min=SMALLEST_SCALE)
    zero_point = (format.qmin - torch.round(lo / scale)).clamp(format.qmin, format.qmax)
    return scale, zero_point.to(torch.int32)


def spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """A weight's scales (or zero points) broadcastable to its shape.

    Args:
        scale: ``[]``, one a channel ``[C]``, or one a group of inputs ``[C, G]``.
        shape: The weight's, ``[C, ...]``, or ``[C, D]`` for groups.
    """
    if scale.ndim == 2:
        return scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
    return scale.view((-1,) + (1,) * (len(shape) - 1)) if scale.ndim else scale


def span_range(x: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every channel over each ``span`` successive tokens.

    Args:
        x: ``[..., T, D]``.
        span: How many tokens share a range; the last ones may be fewer.

    Returns:
        ``lo`` and ``hi``, each ``[..., T, D]``: every value's own range.
    """
    parts = x.detach().split(span, dim=-2)
    return tuple(  # pyright: ignore[reportReturnType]
        torch.cat([end(part, dim=-2, keepdim=True).expand_as(part) for part in parts], dim=-2)
        for end in (torch.amin, torch.amax)
    )


def quantize_codes(x: Tensor, scale: Tensor, zero_point: Tensor, format: IntFormat) -> Tensor:
    """The integer codes of ``x`` (shape of x, the format's storage type)."""
    codes = torch.round(_in_steps(x, scale, format)) + zero_point
    return codes.clamp_(format.qmin, format.qmax).to(format.storage)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The float32 values that integer codes stand for; bit-identical to `fake_quantize` of what gave the codes."""
    return (codes.float() - zero_point) * scale


def to_blocks(x: Tensor, format: BlockFormat) -> Tensor:
    """``[..., D]`` as float32 blocks ``[..., ceil(D / block), block]``, filled up with zeros."""
    return F.pad(x.float(), (0, -x.shape[-1] % format.block)).unflatten(-1, (-1, format.block))


def block_scales(blocks: Tensor, scale: Tensor, format: BlockFormat) -> Tensor:
    """The scale of every block, before the tensor's own scale is applied.

    Args:
        blocks: ``[..., blocks, block]``.
        scale: The tensor's scale; read only by formats that have one.
        format: The block format.

    Returns:
        ``[..., blocks, 1]`` float32, values of the scale's format, or powers of two.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    if format.scale is None:
        # OCP Microscaling v1.0, section 6.3: the power of two below the largest value, over the element's own.
        if format.rule == "even":  # half of the step that one more bit would make, then the same power of two below
            largest = (largest.contiguous().view(torch.int32) + (1 << 21)).view(torch.float32)
        exponent = torch.frexp(largest).exponent - 1 - format.element.largest_exponent
        return torch.ldexp(torch.ones_like(largest), exponent.clamp(-127, 127))
    if format.rule == "even":
        found = round_float((largest / format.element.qmax * (1.0 / scale)).clamp(max=format.scale.qmax), format.scale)
        return torch.where(found == 0, 0.125, found)
    wanted = largest / format.element.qmax / scale
    return round_float(wanted.clamp(2.0**format.scale.smallest_exponent, format.scale.qmax), format.scale)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, format: Format) -> Tensor:
    """Quantize and dequantize ``x``; same shape and dtype.

    The gradient is straight-through: 1 where the value is inside the range, 0 where ``x`` was clipped. Integer values
    equal those of ``torch.fake_quantize_per_tensor_affine`` and ``_per_channel_affine``; written out here because on
    CPU the elementwise form is several times faster (torch's operator can cost as much as the matrix product that
    follows), takes any broadcastable scale, and lets NaN through instead of turning it into a code.

    Args:
        x: Any shape, any floating dtype (half types are computed in float32).
        scale: Broadcastable to x, float32; one number for block formats.
        zero_point: The shape of ``scale``, integer; 0 for all but unsigned integers.
        format: The number format.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, scale, zero_point, format)  # pyright: ignore[reportReturnType]
    return _quantize_dequantize(x, scale, zero_point, format)[0]


def _in_steps(x: Tensor, scale: Tensor, format: IntFormat) -> Tensor:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    # A product is faster. Of codes of 16 bits it would move one in 500 away from what runtimes find by dividing.
    return x / scale if format.bits > MAX_BITS else x * (1.0 / scale)


def _quantize_dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, format: Format, *, want_mask: bool = False
) -> tuple[Tensor, Tensor | None]:
    if isinstance(format, IntFormat):
        return _integers(x, scale, zero_point, format, want_mask)
    if isinstance(format, BlockFormat):
        blocks = to_blocks(x, format)
        block_scale = block_scales(blocks, scale, format) * scale
        rounded, inside = _floats(blocks, block_scale, format.element, want_mask)
        size = x.shape[-1]
        inside = None if inside is None else inside.flatten(-2)[..., :size]
        return rounded.flatten(-2)[..., :size].to(x.dtype), inside
    assert isinstance(format, FloatFormat)
    rounded, inside = _floats(x.float(), scale, format, want_mask)
    return rounded.to(x.dtype), inside


def _integers(
    x: Tensor, scale: Tensor, zero_point: Tensor, format: IntFormat, want_mask: bool
) -> tuple[Tensor, Tensor | None]:
    # In place and with scalar limits: torch's clamp with tensor limits alone would cost more than all of this.
    codes = _in_steps(x, scale, format).round_()
    if not format.symmetric:
        codes.add_(zero_point)
    inside = (codes >= format.qmin) & (codes <= format.qmax) if want_mask else None
    codes.clamp_(format.qmin, format.qmax)
    if not format.symmetric:
        codes.sub_(zero_point)
    return codes.mul_(scale).to(x.dtype), inside


def _floats(x: Tensor, scale: Tensor, format: FloatFormat, want_mask: bool) -> tuple[Tensor, Tensor | None]:
    scaled = x / scale
    inside = scaled.abs() <= format.qmax if want_mask else None
    return round_float(scaled, format).mul_(scale), inside


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, format: Format) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        output, inside = _quantize_dequantize(x, scale, zero_point, format, want_mask=True)
        ctx.save_for_backward(inside)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class RangeFinder(Protocol):
    """What a quantizer needs of an observer: the best range, for a format or for another way to round."""

    def range(
        self, format: Format, rounding: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(lo, hi)``, two scalars."""
        ...


class Quantizer(nn.Module):
    """Fake-quantizes one site.

    A fresh quantizer passes everything through; `set_range` gives it its parameters and `enabled` switches it on.
    ``dynamic`` says that no range has to be found beforehand: each token, span or block brings its own. While
    ``watch`` is set, every tensor that passes is shown to it first (calibration uses this).

    A quantizer that rounds in another way is a subclass with a ``kind`` of its own: it overrides `set_range`, `fit` and
    `fake_quantize`, names in `options` what it takes to build it again, and is entered with `register_kind`.
    """

    kind: ClassVar[str] = "affine"
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        format: Format,
        granularity: Granularity,
        *,
        name: str,
        channels: int = 0,
        groups: int = 0,
        span: int = 0,
    ) -> None:
        """Make a quantizer that is still off.

        Args:
            format: The number format; block formats go with blocks.
            granularity: How many pairs of scale and zero point: one, or one a channel, group, token, head or block.
            name: The site's name, for messages.
            channels: The number of channels, when ``granularity`` is ``"channel"`` or ``"group"``.
            groups: The number of groups a channel, when it is ``"group"``.
            span: How many tokens share a range, when it is ``"span"``.
        """
        super().__init__()
        self.name = name
        self.format = format
        self.granularity: Granularity = granularity
        self.span = span
        self.dynamic = granularity in ("token", "span") or (isinstance(format, BlockFormat) and format.scale is None)
        self.enabled = False
        # Blocks run along the dimension that a product sums over; for an attention's v that is the one before the last.
        self.transposed = False
        # This many first tokens of every sequence are not quantized.
        self.prefix = 0
        # Tokens that the model's cache held before this call, and tokens of the call.
        self.cached: tuple[int, int] = (0, 0)
        self.watch: Callable[[Tensor], None] | None = None
        if granularity not in ("token", "span"):
            # How many heads there are is known when the range is set, or loaded.
            shape = {"channel": (channels,), "group": (channels, groups)}.get(granularity, ())
            self.register_buffer("scale", torch.ones(shape))
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Take scale and zero point from the range ``[lo, hi]`` (shape of ``scale``; ``[H]`` for heads)."""
        scale, zero_point = affine_parameters(lo, hi, self.format, self.format.symmetric)
        if self.granularity == "head":
            self.resize(scale.shape)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def fit(self, observer: RangeFinder) -> None:
        """Take the range that an observer finds for this way of rounding."""
        self.set_range(*observer.range(self.format))

    def options(self) -> dict[str, Any]:
        """Options to build this quantizer again, beside the site's format and granularity; JSON types."""
        return {}

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, shaped to broadcast against ``x``."""
        if self.granularity == "token":
            # On CPU two reductions are several times faster than one aminmax over a dimension.
            lo, hi = x.detach().amin(-1, keepdim=True), x.detach().amax(-1, keepdim=True)
            return affine_parameters(lo, hi, self.format, self.format.symmetric)
        if self.granularity == "span":
            return affine_parameters(*span_range(x, self.span), self.format, self.format.symmetric)
        if self.granularity != "head":
            return spread(self.scale, x.shape), spread(self.zero_point, x.shape)
        # Keys and values of fewer heads may come repeated for their groups of queries; exporters take that path.
        group = max(x.shape[1] // len(self.scale), 1)
        pair = (each.repeat_interleave(group) if group > 1 else each for each in (self.scale, self.zero_point))
        scale, zero_point = (spread(each, x.shape[1:]) for each in pair)
        return scale, zero_point

    def resize(self, shape: Sequence[int]) -> None:
        """Resize the buffers for this many pairs; their values are discarded."""
        self.scale = self.scale.new_ones(shape)
        self.zero_point = self.zero_point.new_zeros(shape)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.granularity == "head" and f"{prefix}scale" in state_dict:
            self.resize(state_dict[f"{prefix}scale"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` (any shape; tokens and blocks lie along its last dimension)."""
        if self.watch is not None:
            self.watch(x)
        if not self.enabled:
            return x
        if self.prefix:
            if x.ndim < 3:
                raise InputError(
                    f"{self.name} sees its tokens without their sequences, {list(x.shape)}, so the first {self.prefix} "
                    "cannot be kept; leave out the prefix, or override the site with keep"
                )
            kept = max(self.prefix - self._position(x.shape[-2]), 0)
            return torch.cat([x[..., :kept, :], self._rounded(x[..., kept:, :])], dim=-2)
        return self._rounded(x)

    def _position(self, tokens: int) -> int:
        """Where in its sequence a tensor of so many tokens begins; keys and values of a cache begin with it, and with a
        sliding window, later.
        """
        before, now = self.cached
        return before if tokens == now else max(before + now - tokens, 0)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.transposed:
            x = x.transpose(-2, -1)
        x = self.fake_quantize(x)
        return x.transpose(-2, -1) if self.transposed else x

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` as its codes hold it, whether or not the quantizer is enabled."""
        return fake_quantize(x, *self.parameters_for(x), self.format)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Quantizer:
        # model.half() must not round the scales: they follow the device, never the dtype.
        scale = self._buffers.get("scale")
        super()._apply(fn, recurse)
        if scale is not None:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.format.name}, per {self.granularity}{'' if self.enabled else ', off'}"


@contextmanager
def switched_on(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """While active, these quantizers are on; afterwards they are off."""
    members = list(quantizers)
    for quantizer in members:
        quantizer.enabled = True
    try:
        yield
    finally:
        for quantizer in members:
            quantizer.enabled = False


_KINDS: dict[str, type[Quantizer]] = {}
Kind = TypeVar("Kind", bound=Quantizer)


def register_kind(kind: type[Kind]) -> type[Kind]:
    """Make a kind of quantizer known to those who build quantizers by name (loading a model)."""
    assert kind.kind not in _KINDS and kind.kind != Quantizer.kind, f"quantizer kind {kind.kind} is registered twice"
    _KINDS[kind.kind] = kind
    return kind


def build_kind(kind: str, format: Format, name: str, options: dict[str, Any]) -> Quantizer:
    """A quantizer of a registered kind, still off, for the site called ``name``.

    Raises:
        KeyError: No such kind.
        TypeError: It does not take these options.
    """
    return _KINDS[kind](format, name=name, **options)  # pyright: ignore[reportCallIssue]


class WeightQuantizer(Quantizer):
    """The quantizer of a weight: rounds it once and keeps the result while nothing changes.

    In training mode, or when a gradient is wanted, the weight is quantized anew with the straight-through gradient.
    In-place changes of the weight or the scale are noticed (version counters); those made through ``weight.data`` are
    noticed at the next ``train()`` or ``eval()``.
    """

    def __init__(
        self, format: Format, granularity: Granularity, *, name: str, channels: int = 0, groups: int = 0
    ) -> None:
        """Make a weight quantizer that is still off; arguments as for `Quantizer`."""
        super().__init__(format, granularity, name=name, channels=channels, groups=groups)
        self._cache: tuple[tuple[object, ...], tuple[weakref.ref[Tensor], ...], Tensor] | None = None

    def train(self, mode: bool = True) -> WeightQuantizer:
        """Switch between training and evaluation; forgets the kept weight."""
        self._cache = None
        super().train(mode)
        return self

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize ``weight`` (``[out, in]``)."""
        live = self.training or (torch.is_grad_enabled() and weight.requires_grad) or not self.enabled
        # Tracers (torch.compile, torch.export) see no memory addresses; in their graph the weight is rounded in place.
        if live or torch.compiler.is_compiling():
            self._cache = None
            return super().forward(weight)
        parts = (weight, self.scale, self.zero_point)
        if torch._C._functorch.maybe_current_level() is not None or any(t.is_inference() for t in parts):  # pyright: ignore[reportAttributeAccessIssue]
            return super().forward(weight)  # wrapped values have no versions, nor have those of inference mode
        # Addresses and ids are used again: the very tensors must still be there, and point to what they did.
        key = tuple((t.data_ptr(), t.dtype, t.device, t._version) for t in parts)
        cache = self._cache
        if cache is None or cache[0] != key or any(r() is not t for r, t in zip(cache[1], parts, strict=True)):
            plain = weight.detach()
            with torch.inference_mode(False), torch.no_grad():  # what is kept outlives inference mode
                rounded = super().forward(plain)
            # A weight that is on the grid, as loaded ones and those of most methods are, needs no second copy.
            kept = plain if torch.equal(rounded, plain) else rounded
            cache = self._cache = (key, tuple(weakref.ref(t) for t in parts), kept)
        return cache[2]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles of a model need not carry the rounded weights.
        return {**self.__dict__, "_cache": None}
