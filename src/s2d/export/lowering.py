"""A quantized model rewritten in the operators of a runtime: integer codes in place of simulated rounding.

The result is a copy for exporting: its float weights of quantized layers are gone, its quantizers are the operators of
`s2d.export.operators`. Everything around them (norms, attention, what methods compute beside a weight) is the
model's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export import operators
from s2d.export.copies import shared_copy
from s2d.export.integers import (
    IntegerActivation,
    IntegerWeight,
    embedding_codes,
    integer_activation,
    integer_weight,
)
from s2d.export.operators import Form
from s2d.quant.modules.attention import QuantizedAttention
from s2d.quant.modules.linear import QuantizedConv, QuantizedLinear, turn_into
from s2d.quant.modules.online import OnlineLinear
from s2d.quant.modules.sites import is_quantized
from s2d.quant.numerics.formats import MAX_BITS
from s2d.quant.numerics.log_and_twin import LogSqrt2Quantizer, TwinQuantizer
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer, spread

SMALLEST_TABLE = 16  # rows; smaller tables (token types) gain nothing
HEADS = 1  # the dimension of heads in an attention operand [B, H, T, D]


class Rounded(nn.Module):
    """An activation through its codes: what a quantizer becomes."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, activation: IntegerActivation, form: Form = "qdq") -> None:
        """Hold the scale and zero point of a static activation, for a form of the file.

        Its codes begin at 0 and are unsigned, but for symmetric ones of 16 bits or in a file of types.
        """
        super().__init__()
        assert activation.scale is not None and activation.zero_point is not None
        format, zero = activation.format, activation.zero_point
        signed = format.signed and (form == "types" or format.bits > MAX_BITS)
        self.low = format.qmin if signed else 0
        self.top = activation.top + self.low
        self.clips = operators.clips(self.low, self.top, form)
        self.axis = HEADS if activation.scale.ndim else -1
        kind = format.storage if signed or format.bits > MAX_BITS else torch.uint8
        self.register_buffer("scale", activation.scale)
        self.register_buffer("zero_point", (zero + self.low).to(kind))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return operators.quantize(x, self.scale, self.zero_point, self.low, self.top, self.axis)


class Codes(nn.Module):
    """A weight as codes ``[in, out]``: what the weight quantizer of a projection becomes."""

    codes: Tensor
    weight_scale: Tensor

    def __init__(self, weight: IntegerWeight, *, integer: bool, form: Form = "qdq") -> None:
        """Hold a weight ``[out, in]``, turned over.

        Args:
            weight: Its codes and scales.
            integer: Whether the other factor has codes too; groups of inputs need a product in floating point.
            form: Of the file; in one of types all weights are codes under a DequantizeLinear.
        """
        super().__init__()
        self.integer = (integer or form == "types") and weight.granularity != "group"
        self.blocks = form == "types" and weight.granularity == "group"
        self.shape = weight.codes.t().shape
        codes, scale = weight.codes.t(), weight.scale
        if self.blocks:
            scale = scale.t()
        elif weight.granularity == "group":  # [groups, inputs of a group, out]
            codes, scale = codes.unflatten(0, (scale.shape[1], -1)), scale.t().unsqueeze(1)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("weight_scale", scale.contiguous())

    def values(self) -> Tensor:
        """``[in, out]`` in floating point."""
        if self.blocks:
            return operators.block_weight(self.codes, self.weight_scale)
        return operators.weight(self.codes, self.weight_scale) if self.integer else self._plain()

    def forward(self, weight: Tensor) -> Tensor:
        """``[out, in]``, in place of a weight that is cut into parts before its products."""
        return self.values().t()

    def _plain(self) -> Tensor:
        return operators.plain_weight(self.codes, self.weight_scale).reshape(self.shape)


class _IntegerProduct:
    """The product of a lowered Linear."""

    weight_codes: Codes
    input_quantizer: nn.Module | None
    token: IntegerActivation | None
    written_out: bool
    bias: Tensor | None

    def quantized_product(self, input: Tensor) -> Tensor:
        """``input [..., in]`` to ``[..., out]``."""
        if input.ndim == 2:  # of matrices, onnxruntime makes a Gemm, whose inputs it dequantizes
            return self.quantized_product(input.unsqueeze(0)).squeeze(0)
        codes, scale = self.weight_codes.codes, self.weight_codes.weight_scale
        if self.token is not None:
            output = operators.token_product(input, codes, scale, self.token.format.name)
        elif self.written_out:
            rounded: Any = self.input_quantizer
            output = operators.static_product(input, rounded.scale, rounded.zero_point, rounded.top, codes, scale)
        else:
            rounded = input if self.input_quantizer is None else self.input_quantizer(input)
            # Not the @ of Python: inside a quantized attention that would count as one of its two products.
            output = torch.ops.aten.matmul(rounded, self.weight_codes.values())
        # As many dimensions as the output has: where shapes are fixed, onnxruntime would turn a MatMul with a flat bias
        # into a Gemm, whose inputs it dequantizes.
        return output if self.bias is None else output + self.bias.view((1,) * (output.ndim - 1) + (-1,))


class LoweredLinear(_IntegerProduct, QuantizedLinear):
    """A Linear of integer codes."""


class LoweredOnlineLinear(_IntegerProduct, OnlineLinear):
    """The same under a transform of its input, or beside a low-rank branch."""


class LoweredEmbedding(nn.Module):
    """An embedding whose table is codes with a scale for every group of a row."""

    codes: Tensor
    weight_scale: Tensor

    def __init__(self, table: IntegerWeight) -> None:
        """Hold the codes ``[vocabulary, D]`` and scales ``[vocabulary, G]``."""
        super().__init__()
        self.register_buffer("codes", table.codes)
        self.register_buffer("weight_scale", table.scale)

    @property
    def weight(self) -> Tensor:
        """The table's values ``[vocabulary, D]``, for models that read it themselves."""
        return self.codes * spread(self.weight_scale, self.codes.shape)

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., D]``."""
        rows = F.embedding(ids, self.codes).to(self.weight_scale.dtype)
        scale = F.embedding(ids, self.weight_scale)
        groups = self.weight_scale.shape[1]
        return rows * scale if groups == 1 else (rows.unflatten(-1, (groups, -1)) * scale.unsqueeze(-1)).flatten(-2)


def round_embeddings(model: nn.Module, bits: int) -> list[str]:
    """Put codes in place of a model's embedding tables.

    Tables that share their parameter with another layer (a tied head) stay as they are.

    Returns:
        The names of the rounded ones.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    made = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Embedding) or type(module) is not nn.Embedding or module.max_norm is not None:
            continue
        if owners[id(module.weight)] > 1 or module.num_embeddings < SMALLEST_TABLE:
            continue
        model.set_submodule(name, LoweredEmbedding(embedding_codes(module.weight, bits)))
        made.append(name)
    return made


def lower(model: nn.Module, form: Form = "qdq") -> nn.Module:
    """A copy of a quantized model in integer operators.

    Args:
        model: Quantized, on the CPU; left as it is.
        form: Of the file that it is for; see `s2d.export.operators`.

    Raises:
        InputError: It is not quantized, or a site has no integer form; the message names the site.
    """
    if not is_quantized(model):
        raise InputError(f"{type(model).__name__} is not quantized; run s2d quantize first, then export its folder")
    made = shared_copy(model)
    for module in list(made.modules()):
        if isinstance(module, QuantizedLinear):
            _lower_linear(module, form)
        elif isinstance(module, QuantizedConv):
            _lower_conv(module, form)
        elif isinstance(module, QuantizedAttention):
            _lower_attention(module, form)
    return made


def _lower_linear(module: Any, form: Form) -> None:
    online = isinstance(module, OnlineLinear)
    quantizer = module.input_quantizer
    token = None
    if quantizer is not None:
        activation = integer_activation(quantizer)
        token = activation if activation.dynamic else None
        module.input_quantizer = None if token else _rounded(quantizer, activation, form)
    weights: WeightQuantizer | None = module.weight_quantizer
    if weights is None:
        if quantizer is not None:
            module.input_quantizer = _lowered(quantizer, form)
        return
    weight = integer_weight(module.weight, weights)
    if token is not None and weight.granularity == "group":
        raise InputError(f"{weights.name}: groups of inputs do not go with scales per token; use per-channel weights")
    turn_into(module, LoweredOnlineLinear if online else LoweredLinear)
    rounded: Any = module.input_quantizer
    module.weight_codes, module.token = Codes(weight, integer=rounded is not None, form=form), token
    narrow = isinstance(rounded, Rounded) and rounded.top <= 255  # MatMulInteger takes codes of 8 bits
    module.written_out = form == "integer" and narrow and module.weight_codes.integer
    module.weight_quantizer = None
    module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)  # open_clip asks for its type


def _lower_conv(module: Any, form: Form) -> None:
    if module.input_quantizer is not None:
        module.input_quantizer = _lowered(module.input_quantizer, form)
    if module.weight_quantizer is not None:
        module.weight_quantizer = _ConvCodes(integer_weight(module.weight, module.weight_quantizer))


class _ConvCodes(nn.Module):
    """A convolution's weight as codes, in its own layout."""

    codes: Tensor
    weight_scale: Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("weight_scale", weight.scale.reshape(-1, *(1 for _ in weight.codes.shape[1:])))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight's values."""
        return operators.plain_weight(self.codes, self.weight_scale)


def _lower_attention(module: QuantizedAttention, form: Form) -> None:
    holder: Any = module.attention_quantizer
    # Codes are for products of two rounded factors. Where one stays in floating point so does the product, and
    # runtimes move the codes about: OpenVINO ends the whole process on keys rounded before heads are repeated.
    both = {"q": "k", "k": "q", "probs": "v", "v": "probs"}
    alone = {each for each, other in both.items() if getattr(holder, other) is None}
    for operand in holder.OPERANDS:
        quantizer = getattr(holder, operand)
        if quantizer is None:
            continue
        if operand in alone:
            lowered = _lowered(quantizer, form)  # which refuses what has no integers
            setattr(holder, operand, _Plain(quantizer) if isinstance(lowered, Rounded) else lowered)
        elif operand == "weight":
            parameter = module.in_proj_weight  # type: ignore[attr-defined]
            codes = Codes(integer_weight(parameter, quantizer), integer=False)
            setattr(holder, operand, codes)
        else:
            # onnxruntime 1.32 fails where it moves a QuantizeLinear to INT8 through a Transpose.
            signed = quantizer.format.symmetric and quantizer.format.bits <= MAX_BITS
            setattr(holder, operand, _lowered(quantizer, "qdq" if signed else form))


def _lowered(quantizer: Quantizer, form: Form) -> nn.Module:
    # Two grids, a range per token, or a range per head: outside of a Linear these use torch's own operators. (No
    # product takes codes with a scale per head, and onnxruntime's optimizer fails on them.)
    if isinstance(quantizer, (LogSqrt2Quantizer, TwinQuantizer)):
        return _Plain(quantizer)
    activation = integer_activation(quantizer)
    if activation.scale is None or activation.scale.ndim:
        return _Plain(quantizer)
    return _rounded(quantizer, activation, form)


def _rounded(quantizer: Quantizer, activation: IntegerActivation, form: Form) -> Rounded:
    made = Rounded(activation, form)
    if made.clips and operators.narrow(made.low, made.top, form) is not None:
        raise InputError(
            f"{quantizer.name} is {activation.format.name}, which form types stores in a 4-bit type behind a Clip, and "
            "onnxruntime loads no such file; use form qdq, or activations in uint4 or uint8 (w4a4, w8a8)"
        )
    return made


class _Plain(nn.Module):
    """A quantizer whose rounding is exported as it is computed."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.quantizer.fake_quantize(x)
