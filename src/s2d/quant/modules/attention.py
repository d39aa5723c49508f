"""Attention products, quantized by one mechanism for every model family.

While a quantized attention module runs, a torch function mode sees the operations it calls and puts quantizers on the
four operands, however the attention is written:

    F.scaled_dot_product_attention       taken apart into its two products (masks, causality, grouped heads kept)
    matmul -> softmax -> matmul          `@`, matmul, bmm, baddbmm, einsum; the operands are quantized where they enter
    nn.MultiheadAttention                taken apart likewise; its fused projection weight and its input are sites too

    probs = softmax(Q(q) Q(k)^T * scale + mask)      out = Q(probs) Q(v)

Anything else that a module does between entering and leaving is an error that names the module, never a silent pass.

Shapes: B batch, H heads, L queries, S keys, D head dimension;
q `[B, H, L, D]`, k and v `[B, H, S, D]`, probs `[B, H, L, S]`.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2d.errors import InputError
from s2d.quant.modules.linear import Quantized
from s2d.quant.numerics.quantizer import Quantizer, WeightQuantizer

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
BADDBMMS = (torch.baddbmm, Tensor.baddbmm)
SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
SDPA = F.scaled_dot_product_attention
MULTI_HEAD = F.multi_head_attention_forward

_MULTI_HEAD_SIGNATURE = inspect.signature(MULTI_HEAD)
_SDPA_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("query", inspect.Parameter.empty),
            ("key", inspect.Parameter.empty),
            ("value", inspect.Parameter.empty),
            ("attn_mask", None),
            ("dropout_p", 0.0),
            ("is_causal", False),
            ("scale", None),
            ("enable_gqa", False),
        )
    ]
)


class AttentionQuantizer(nn.Module):
    """The quantizers of one attention module; ``None`` leaves an operand alone.

    ``weight`` and ``input`` belong to the fused projection of ``nn.MultiheadAttention``; elsewhere the projections are
    Linears of their own.
    """

    OPERANDS = ("q", "k", "probs", "v", "weight", "input")

    q: Quantizer | None
    k: Quantizer | None
    probs: Quantizer | None
    v: Quantizer | None
    weight: WeightQuantizer | None
    input: Quantizer | None

    def __init__(self, name: str, quantizers: dict[str, Quantizer]) -> None:
        """Hold the quantizers of the attention module called ``name``."""
        super().__init__()
        self.name = name
        for operand in self.OPERANDS:
            self.register_module(operand, quantizers.get(operand))

    @property
    def products(self) -> bool:
        """Whether any operand of the two products is quantized."""
        return any(quantizer is not None for quantizer in (self.q, self.k, self.probs, self.v))


class QuantizedAttention(Quantized):
    """An attention module whose products are quantized."""

    attention_quantizer: AttentionQuantizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's forward, under the mode that quantizes its products."""
        with AttentionMode(self.attention_quantizer, self):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


_running = threading.local()


class AttentionMode(TorchFunctionMode):
    """Quantizes the attention products of one run of one module."""

    def __init__(self, quantizers: AttentionQuantizer, module: Any) -> None:
        """Prepare one forward of ``module``."""
        super().__init__()
        self.quantizers = quantizers
        self.module = module
        self.stage: Literal["scores", "softmax", "values"] = "scores"
        self.calls = 0
        self.probs_numel = 0

    def __enter__(self) -> AttentionMode:
        if not hasattr(_running, "modes"):
            _running.modes = []
        _running.modes.append(self)
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        _running.modes.pop()
        if kind is None and (self.calls == 0 or self.stage != "scores"):
            raise self.unknown("no attention product was seen")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A quantized module inside this one has its own mode, which handles its operations.
        if func not in _HANDLERS or _running.modes[-1] is not self:
            return func(*args, **kwargs)
        # A projection that is written as a product with its weight is not one of the two products.
        if func in MATMULS and len(args) > 1 and _is_weight(args[1]):
            return func(*args, **kwargs)
        return _HANDLERS[func](self, func, args, kwargs)

    def unknown(self, what: str) -> InputError:
        """The error for an attention that this mode does not understand."""
        return InputError(
            f"{self.quantizers.name or 'the model'} ({type(self.module).__name__}) computes attention in an unknown "
            f'way: {what}; use its "sdpa" or "eager" implementation, or override its sites with keep'
        )

    def operand(self, which: Literal["q", "k", "probs", "v"], x: Tensor) -> Tensor:
        """Quantize one operand."""
        quantizer: Quantizer | None = getattr(self.quantizers, which)
        return x if quantizer is None else quantizer(x)

    def _enter_product(self, a: Tensor, b: Tensor, *, b_transposed: bool) -> tuple[Tensor, Tensor]:
        """Quantize the operands of the next product; ``b_transposed`` says that k arrives as ``[..., D, S]``."""
        if self.stage == "softmax":
            raise self.unknown("more than one product before the softmax")
        if self.stage == "scores":
            self.stage = "softmax"
            k = self.operand("k", b.transpose(-2, -1)).transpose(-2, -1) if b_transposed else self.operand("k", b)
            return self.operand("q", a), k
        if a.numel() != self.probs_numel:
            raise self.unknown("the product after the softmax does not take the probabilities first")
        self.stage = "scores"
        self.calls += 1
        return a, self.operand("v", b)

    def matmul(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One of the two products, written as a plain matrix product."""
        if len(args) < 2:
            args = args + tuple(kwargs.pop(name) for name in ("input", "other", "mat2", "tensor2") if name in kwargs)
        a, b = self._enter_product(args[0], args[1], b_transposed=True)
        return func(a, b, *args[2:], **kwargs)

    def baddbmm(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One of the two products, with something added in the same call."""
        if len(args) < 3:
            args = args + tuple(kwargs.pop(name) for name in ("input", "batch1", "batch2") if name in kwargs)
        a, b = self._enter_product(args[1], args[2], b_transposed=True)
        return func(args[0], a, b, *args[3:], **kwargs)

    def einsum(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One of the two products, as an einsum of two operands."""
        operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        if len(operands) != 2:
            raise self.unknown(f"einsum {args[0]!r} of {len(operands)} operands")
        a, b = self._enter_product(operands[0], operands[1], b_transposed=False)
        return func(args[0], a, b, **kwargs)

    def softmax(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The softmax between the products; its result is quantized here, before any dropout."""
        if self.stage != "softmax":
            raise self.unknown("a softmax without the product of q and k before it")
        self.stage = "values"
        probs = func(*args, **kwargs)
        self.probs_numel = probs.numel()
        return self.operand("probs", probs)

    def sdpa(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Both products in one call."""
        if self.stage != "scores":
            raise self.unknown("scaled_dot_product_attention between two products")
        call = _SDPA_SIGNATURE.bind(*args, **kwargs)
        call.apply_defaults()
        self.calls += 1
        return attention(**call.arguments, operand=self.operand)[0]

    def multi_head(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The functional form behind ``nn.MultiheadAttention``."""
        if not isinstance(self.module, nn.MultiheadAttention):
            raise self.unknown("it calls multi_head_attention_forward itself")
        call = _MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
        call.apply_defaults()
        self.calls += 1
        return _multi_head(self, self.module, SimpleNamespace(**call.arguments))


def _is_weight(operand: Any) -> bool:
    """Whether an operand is a matrix that the model learns, or a view of one."""
    if not isinstance(operand, Tensor) or operand.ndim != 2:
        return False
    return isinstance(operand, nn.Parameter) or isinstance(operand._base, nn.Parameter)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(MATMULS, AttentionMode.matmul),
    **dict.fromkeys(BADDBMMS, AttentionMode.baddbmm),
    **dict.fromkeys(SOFTMAXES, AttentionMode.softmax),
    torch.einsum: AttentionMode.einsum,
    SDPA: AttentionMode.sdpa,
    MULTI_HEAD: AttentionMode.multi_head,
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    operand: Callable[[Any, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """``F.scaled_dot_product_attention`` with its operands passed through ``operand(which, tensor)``.

    Args:
        query: ``[..., H, L, D]``.
        key: ``[..., H or fewer, S, D]``; fewer heads with ``enable_gqa``.
        value: As key, with its own last dimension.
        attn_mask: Boolean (True takes part) or additive, broadcastable to ``[..., H, L, S]``.
        dropout_p: Dropout on the (quantized) probabilities.
        is_causal: Query i sees keys 0..i.
        scale: Factor on the scores, ``1/sqrt(D)`` when None.
        enable_gqa: Key and value heads are shared by groups of query heads.
        operand: Receives ``"q"``, ``"k"``, ``"probs"`` or ``"v"`` and the tensor.

    Returns:
        The output ``[..., H, L, Dv]`` and the probabilities before quantization ``[..., H, L, S]``.
    """
    q, k, v = operand("q", query), operand("k", key), operand("v", value)
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], dim=-3)
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.dtype in (torch.float16, torch.bfloat16):
        # The scores stay in float32 until the softmax, as in fused kernels; half precision overflows or rounds them.
        with torch.autocast(q.device.type, enabled=False):
            scores = q.float() @ k.float().transpose(-2, -1) * factor
    else:
        scores = q @ k.transpose(-2, -1) * factor
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    if attn_mask is None:
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    else:
        # Operate on the mask instead of the scores: all heads (in an exported graph, all layers) share the mask.
        if attn_mask.dtype == torch.bool:
            seen, bias = attn_mask, torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
        else:
            seen, bias = attn_mask > -torch.inf, attn_mask.to(scores.dtype)
        bias = bias.clamp(min=torch.finfo(bias.dtype).min / 2)  # stays finite when it is added to any score
        # A query whose keys are all masked gets zeros, as from the fused operator, instead of NaN.
        somewhere = seen.any(-1, keepdim=True)
        probs = torch.softmax(scores + bias, dim=-1, dtype=torch.float32).mul(somewhere).to(scores.dtype)
    weights = operand("probs", probs)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    if weights.dtype == v.dtype:
        return weights @ v, probs
    with torch.autocast(q.device.type, enabled=False):
        return (weights @ v.to(weights.dtype)).to(q.dtype), probs.to(q.dtype)


def _multi_head(
    mode: AttentionMode, module: nn.MultiheadAttention, call: SimpleNamespace
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` of a module with one fused projection; inputs ``[L, B, E]`` or ``[L, E]``."""
    batched = call.query.ndim == 3
    self_attention = call.query is call.key is call.value
    if not batched:
        call.query, call.key, call.value = (x.unsqueeze(1) for x in (call.query, call.key, call.value))
        if call.key_padding_mask is not None:
            call.key_padding_mask = call.key_padding_mask.unsqueeze(0)

    quantizers = mode.quantizers
    weight = call.in_proj_weight if quantizers.weight is None else quantizers.weight(call.in_proj_weight)
    inputs = [x.transpose(0, 1) for x in ((call.query,) if self_attention else (call.query, call.key, call.value))]
    if quantizers.input is not None:
        inputs = [quantizers.input(x) for x in inputs]
    if self_attention:
        q, k, v = F.linear(inputs[0], weight, call.in_proj_bias).chunk(3, dim=-1)
    else:
        biases = (None,) * 3 if call.in_proj_bias is None else call.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), biases, strict=True))

    # As torch does: without weights to return, a causal mask is a hint, and the mask itself is not read.
    causal = call.is_causal and call.key_padding_mask is None and not call.need_weights
    mask = None if causal else _merged_mask(call, q.dtype)
    batch = q.shape[0]
    extra = int(call.bias_k is not None) + int(call.add_zero_attn)
    if call.bias_k is not None:
        k, v = (torch.cat([x, bias.expand(batch, 1, -1)], dim=1) for x, bias in ((k, call.bias_k), (v, call.bias_v)))
    if call.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    if mask is not None:
        mask = F.pad(mask, (0, extra))

    q, k, v = (x.unflatten(-1, (call.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    dropout = call.dropout_p if call.training else 0.0
    heads, probs = attention(q, k, v, mask, dropout, causal, None, False, mode.operand)
    # The module itself, not its weight: it may be quantized, or hooked.
    output = module.out_proj(heads.transpose(1, 2).flatten(2)).transpose(0, 1)
    if not call.need_weights:
        return output if batched else output.squeeze(1), None
    weights = probs.mean(dim=1) if call.average_attn_weights else probs
    return (output, weights) if batched else (output.squeeze(1), weights.squeeze(0))


def _merged_mask(call: SimpleNamespace, dtype: torch.dtype) -> Tensor | None:
    """Attention mask and padding mask (True or -inf hides a key) as one additive mask ``[1|B, 1|H, 1|L, S]``."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)

    mask = None
    if call.attn_mask is not None:
        mask = additive(call.attn_mask)
        mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (-1, call.num_heads))
    if call.key_padding_mask is not None:
        padding = additive(call.key_padding_mask)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask
