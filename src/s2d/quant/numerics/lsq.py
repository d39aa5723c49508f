"""Quantizers whose steps are trained: the forward of `quantizer.py`, and a gradient for scale and lower end as well.

Sources: LSQ (arXiv 1902.08153, eq. 3: the gradient of the step, and its factor g in section 2.2) and, for ranges with a
zero point, LSQ+ (arXiv 2004.09576, eq. 4-6). With v = (x - offset) / scale and codes 0..N (or -N..N without offset):

                      v below its codes    inside              above
    d x_hat / dx      0                    1                   0
    d x_hat / dscale  lowest code          round(v) - v        highest code        times g = 1 / sqrt(n N)
    d x_hat / doffset 1                    0                   1                   times g

where n values share the scale. Two things differ from the papers:

- The zero point stays an integer, `round(-offset / scale)`, passed straight through in the gradient: zero is exact, and
  what was trained is stored like any other quantized model.
- The optimizer trains not the scale but its logarithm relative to the calibrated one, and the offset as a share of the
  calibrated range. The steps of one model differ by orders of magnitude, while Adam moves every parameter by the same
  amount. In this form each step changes by the same share, and no scale can become negative (as in TQT, arXiv
  1903.08066).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from s2d.quant.numerics.formats import IntFormat
from s2d.quant.numerics.quantizer import SMALLEST_SCALE, Quantizer, WeightQuantizer, fake_quantize, spread


def lsq_step(x: Tensor, format: IntFormat) -> Tensor:
    """LSQ's first step of every row: ``2 mean|x| / sqrt(qmax)``.

    Args:
        x: ``[rows, columns]``.
        format: The number format.

    Returns:
        ``[rows]``, float32, > 0.
    """
    return (2.0 * x.float().abs().mean(dim=1) / math.sqrt(format.qmax)).clamp(min=SMALLEST_SCALE)


def gradient_factor(x: Tensor, scale: Tensor, format: IntFormat) -> float:
    """LSQ's g: keeps a step's relative update near that of the values it rounds, however many share it."""
    return 1.0 / math.sqrt(x.numel() / scale.numel() * format.qmax)


def zero_point_of(scale: Tensor, offset: Tensor | None, format: IntFormat) -> Tensor:
    """The integer zero point whose lowest value is next to ``offset``; 0 is always among the values."""
    if offset is None:
        return torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (format.qmin - torch.round(offset / scale)).clamp(format.qmin, format.qmax)
    return zero_point.to(torch.int32)


def learned_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, format: IntFormat) -> Tensor:
    """`fake_quantize` with the gradients of LSQ+ for ``x``, ``scale`` and ``offset``.

    Args:
        x: Any shape.
        scale: > 0, broadcastable to x.
        offset: The lowest value, the shape of ``scale``; None for ranges that are symmetric or start at 0.
        format: The number format.
    """
    return _Learned.apply(x, scale, offset, format)  # pyright: ignore[reportReturnType]


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, format: IntFormat) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        zero_point = zero_point_of(scale, offset, format)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.format, ctx.has_offset = format, offset is not None
        return fake_quantize(x, scale, zero_point, format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, zero_point = ctx.saved_tensors
        format: IntFormat = ctx.format
        v = x.float() * (1.0 / scale)
        code = torch.round(v)
        below, above = v < format.qmin - zero_point, v > format.qmax - zero_point
        outside = below | above
        grad_x = grad.masked_fill(outside, 0.0) if ctx.needs_input_grad[0] else None
        grad_scale = grad_offset = None
        factor = gradient_factor(x, scale, format)
        if ctx.needs_input_grad[1]:
            # Seen from the lower end, which the offset holds in place, the codes run from 0.
            lowest = format.qmin if format.signed else 0
            slope = code.sub_(v).masked_fill_(below, lowest).masked_fill_(above, format.qmax - format.qmin + lowest)
            grad_scale = (slope.mul_(grad)).sum_to_size(scale.shape).mul_(factor)
        if ctx.has_offset and ctx.needs_input_grad[2]:
            grad_offset = (grad * outside).float().sum_to_size(scale.shape).mul_(factor)
        return grad_x, grad_scale, grad_offset, None


class LearnedQuantizer(Quantizer):
    """Takes the place of a calibrated integer quantizer while its range is trained.

    Attributes:
        scale: The calibrated scale (a buffer); the present one is `step`.
        log_step: Parameter, the shape of ``scale``: ``log(step / scale)``.
        offset: Parameter of ranges with a zero point inside, in calibrated widths; None for those that start at 0 or
            are symmetric.
    """

    format: IntFormat
    log_step: nn.Parameter
    offset: nn.Parameter | None

    def __init__(self, plain: Quantizer) -> None:
        """Start from a calibrated quantizer; its tensors are copied."""
        super().__init__(plain.format, plain.granularity, name=plain.name)
        self.plain_class = type(plain)
        self.enabled, self.prefix, self.transposed = plain.enabled, plain.prefix, plain.transposed
        self.scale = plain.scale.clone()
        self.zero_point = plain.zero_point.clone()
        self.log_step = nn.Parameter(torch.zeros_like(self.scale))
        has_offset = not self.format.signed and bool((self.zero_point != self.format.qmin).any())
        self.offset = nn.Parameter(torch.zeros_like(self.scale)) if has_offset else None
        self.restart(self.scale, self.zero_point)
        self.train(plain.training)

    @staticmethod
    def suits(quantizer: nn.Module) -> bool:
        """Whether it is a quantizer with a static integer range that can be trained."""
        if not isinstance(quantizer, Quantizer) or type(quantizer) not in (Quantizer, WeightQuantizer):
            return False
        whole = isinstance(quantizer.format, IntFormat) and not quantizer.format.power_of_two
        return whole and quantizer.granularity in ("tensor", "channel")

    @torch.no_grad()
    def restart(self, scale: Tensor, zero_point: Tensor) -> None:
        """Continue from this scale and zero point (shapes of the buffers) instead of the learned ones."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.log_step.zero_()
        if self.offset is not None:
            self.offset.copy_((self.format.qmin - self.zero_point) / (self.format.qmax - self.format.qmin))

    def set_range(self, lo: Tensor, hi: Tensor) -> None:
        """Start again from the range ``[lo, hi]`` (shape of ``scale``)."""
        super().set_range(lo, hi)
        self.restart(self.scale, self.zero_point)

    @property
    def step(self) -> Tensor:
        """The present scale, float32, differentiable."""
        return self.scale * self.log_step.float().exp()

    @property
    def lowest(self) -> Tensor | None:
        """The present lower end of the range in the values' own units, differentiable."""
        if self.offset is None:
            return None
        return self.scale * (self.format.qmax - self.format.qmin) * self.offset.float()

    @torch.no_grad()
    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The present scale and zero point, shaped to broadcast against ``x``."""
        step = self.step
        return spread(step, x.shape), spread(zero_point_of(step, self.lowest, self.format), x.shape)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` (any shape) as its codes hold it, with gradients for the range."""
        lowest = self.lowest
        lowest = None if lowest is None else spread(lowest, x.shape)
        return learned_quantize(x, spread(self.step, x.shape), lowest, self.format)

    @torch.no_grad()
    def plain(self) -> Quantizer:
        """An ordinary quantizer with the scale and zero point that were learned."""
        quantizer = self.plain_class(self.format, self.granularity, name=self.name, channels=self.scale.numel())
        quantizer = quantizer.to(self.scale.device)
        step = self.step
        quantizer.scale.copy_(step)
        quantizer.zero_point.copy_(zero_point_of(step, self.lowest, self.format))
        quantizer.enabled, quantizer.prefix, quantizer.transposed = self.enabled, self.prefix, self.transposed
        return quantizer.train(self.training)
