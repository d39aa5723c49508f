"""The operators of a lowered model, and their translation to ONNX.

Torch sees opaque operators, so that no exporter takes them apart: ``s2d::quantize`` (an activation through its codes),
``s2d::weight``, ``s2d::plain_weight`` and ``s2d::block_weight`` (codes to values), ``s2d::token_product`` (a product
whose activation scales come with each token), ``s2d::static_product`` (one whose scale does not, written out). Their
torch bodies compute the same and are the reference.

What they become depends on the form of the file:

- ``"qdq"``: reaches integer kernels in every runtime. Activations go through uint8 codes, below 8 bits behind a Clip to
  the grid; weights stay signed codes under a per-channel DequantizeLinear, stored ``[in, out]`` so that no Transpose
  stands between it and the MatMul.
- ``"integer"``: products of Linears are MatMulInteger on the codes, whatever the runtime's optimizer does.
- ``"types"``: codes have the types of their formats, as the standard means it and NPUs read it: INT4 and UINT4 at 4
  bits, INT8 with a zero point of 0 where ranges are symmetric, and a DequantizeLinear in blocks for groups of inputs.
  No CPU runs it fast.

Codes of 16 bits are INT16 or UINT16 in all of them; no CPU multiplies those.

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from s2d.optional import require
from s2d.quant.numerics.formats import FORMATS, IntFormat
from s2d.quant.numerics.quantizer import SMALLEST_SCALE, affine_parameters

Form = Literal["qdq", "integer", "types"]
FORMS: tuple[Form, ...] = get_args(Form)
_NARROW = {(0, 15): 21, (-7, 7): 22}  # ends of the 4-bit grids: the numbers of UINT4 and INT4 in ONNX
# Grids that end where their types do.
_WHOLE = ((0, 255), (0, 65535), (-32768, 32767))


def clips(low: int, top: int, form: Form) -> bool:
    """Whether a grid of codes ``low..top`` ends inside its type, so that a Clip stands before the rounding."""
    return (low, top) not in _WHOLE and not (form == "types" and (low, top) == (0, 15))


def narrow(low: int, top: int, form: Form) -> int | None:
    """The 4-bit type of ONNX in which a form stores codes ``low..top``; None for a wider type."""
    if form != "types":
        return None
    return next((kind for (a, b), kind in _NARROW.items() if a <= low and top <= b), None)


@torch.library.custom_op("s2d::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, top: int, axis: int) -> Tensor:
    """``x`` as its codes low..top hold it; scale and zero point (typed as codes) ``[]``, or ``[n]`` along ``axis``."""
    shape = [1] * x.ndim
    if axis >= 0:
        shape[axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    zero = zero_point.to(x.dtype)
    codes = torch.clamp(torch.round(x / scale) + zero, low, top)
    return (codes - zero) * scale


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, top: int, axis: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("s2d::weight", mutates_args=())
def weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (int8) ``[in, out]`` times their scales, ``[]`` or ``[out]``, for a product of integers."""
    return codes.to(scale.dtype) * scale


@weight.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("s2d::plain_weight", mutates_args=())
def plain_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (int8) times scales that broadcast, for a product in floating point.

    Written as a Mul: behind a DequantizeLinear onnxruntime would choose a kernel that rounds the activations to 8 bits.
    """
    return codes.to(scale.dtype) * scale


@plain_weight.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("s2d::block_weight", mutates_args=())
def block_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (int8) ``[in, out]`` times scales of groups of inputs ``[groups, out]``."""
    return codes.to(scale.dtype) * scale.repeat_interleave(codes.shape[0] // scale.shape[0], dim=0)


@block_weight.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("s2d::token_product", mutates_args=())
def token_product(x: Tensor, codes: Tensor, scale: Tensor, format: str) -> Tensor:
    """``x [..., I]``, rounded with a range for every token, times codes ``[I, O]`` and their scale."""
    grid = FORMATS[format]
    assert isinstance(grid, IntFormat)
    step, zero_point = affine_parameters(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), grid, grid.symmetric)
    zero = (zero_point - grid.qmin).to(x.dtype)
    rounded = torch.clamp(torch.round(x / step) + zero, 0, grid.qmax - grid.qmin)
    return (rounded @ codes.to(x.dtype) - zero * codes.sum(0, dtype=torch.int32).to(x.dtype)) * step * scale


@token_product.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


@torch.library.custom_op("s2d::static_product", mutates_args=())
def static_product(
    x: Tensor, scale: Tensor, zero_point: Tensor, top: int, codes: Tensor, weight_scale: Tensor
) -> Tensor:
    """``x [..., I]`` through its codes 0..top times codes ``[I, O]``; scales of both, the zero point uint8 ``[]``."""
    zero = zero_point.to(x.dtype)
    rounded = torch.clamp(torch.round(x / scale) + zero, 0, top)
    return ((rounded - zero) @ codes.to(x.dtype)) * (scale * weight_scale)


@static_product.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, top: int, codes: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


def translations(form: Form = "qdq") -> dict[Any, Any]:
    """For ``torch.onnx.export(custom_translation_table=...)``: each operator as a function of opset 21."""
    op: Any = require("onnxscript", "export").opset21

    def clipped(x: Any, scale: Any, zero_point: Any, first: int, top: int, axis: int) -> Any:
        zero = op.Cast(zero_point, to=1)
        low, high = (op.Mul(op.Sub(op.Constant(value_float=float(end)), zero), scale) for end in (first, top))
        if axis >= 0:
            shape = op.Constant(value_ints=[-1, 1, 1])
            return op.Max(op.Min(x, op.Reshape(high, shape)), op.Reshape(low, shape))
        return op.Clip(x, low, high)

    def quantize_onnx(x: Any, scale: Any, zero_point: Any, low: int, top: int, axis: int) -> Any:
        along = max(axis, 0)
        if clips(low, top, form):
            x = clipped(x, scale, zero_point, low, top, axis)
        kind = narrow(low, top, form)
        if kind is not None:
            zero_point = op.Cast(zero_point, to=kind)
        codes = op.QuantizeLinear(x, scale, zero_point, axis=along)
        return op.DequantizeLinear(codes, scale, zero_point, axis=along)

    def weight_onnx(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=1)

    def block_weight_onnx(codes: Any, scale: Any) -> Any:
        return op.DequantizeLinear(codes, scale, axis=0, block_size=codes.shape[0] // scale.shape[0])

    def plain_weight_onnx(codes: Any, scale: Any) -> Any:
        # A placeholder for a Cast: exporters fold a Cast of small codes into a matrix of floats, but keep this one.
        # `s2d.export.onnx` puts the Cast in its place.
        return op.Mul(op.DequantizeLinear(codes, op.Constant(value_float=1.0)), scale)

    def static_product_onnx(x: Any, scale: Any, zero_point: Any, top: int, codes: Any, weight_scale: Any) -> Any:
        if top < 255:
            x = clipped(x, scale, zero_point, 0, top, -1)
        products = op.MatMulInteger(op.QuantizeLinear(x, scale, zero_point), codes, zero_point)
        return op.Mul(op.Cast(products, to=1), op.Mul(scale, weight_scale))

    def token_product_onnx(x: Any, codes: Any, scale: Any, format: str) -> Any:
        grid = FORMATS[format]
        assert isinstance(grid, IntFormat)
        last = op.Constant(value_ints=[-1])
        nothing = op.Constant(value_float=0.0)
        tiny = op.Constant(value_float=SMALLEST_SCALE)
        top = op.Constant(value_float=float(grid.qmax - grid.qmin))
        low = op.Min(op.ReduceMin(x, last, keepdims=1), nothing)
        high = op.Max(op.ReduceMax(x, last, keepdims=1), nothing)
        if grid.symmetric:
            zero = op.Constant(value_float=float(grid.qmax))
            step = op.Max(op.Div(op.Max(op.Neg(low), high), zero), tiny)
        else:
            step = op.Max(op.Div(op.Sub(high, low), top), tiny)
            zero = op.Round(op.Div(op.Neg(low), step))
        rounded = op.Cast(op.Clip(op.Add(op.Round(op.Div(x, step)), zero), nothing, top), to=2)
        products = op.Cast(op.MatMulInteger(rounded, codes), to=1)
        sums = op.ReduceSum(op.Cast(codes, to=1), op.Constant(value_ints=[0]), keepdims=0)
        return op.Mul(op.Mul(op.Sub(products, op.Mul(zero, sums)), step), scale)

    return {
        torch.ops.s2d.quantize.default: quantize_onnx,
        torch.ops.s2d.weight.default: weight_onnx,
        torch.ops.s2d.plain_weight.default: plain_weight_onnx,
        torch.ops.s2d.block_weight.default: block_weight_onnx,
        torch.ops.s2d.token_product.default: token_product_onnx,
        torch.ops.s2d.static_product.default: static_product_onnx,
    }
