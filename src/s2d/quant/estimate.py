"""Estimates before quantizing: the size of the stored model, and the time that the method needs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from s2d.models.running import evaluating, run
from s2d.quant.calibration.observe import Batches
from s2d.quant.coverage import planned
from s2d.quant.modules.sites import Site, plan, weight_name
from s2d.quant.numerics.formats import BlockFormat
from s2d.quant.ptq import get_methods
from s2d.quant.spec import QuantSpec

PAIR_BYTES = 8  # a float32 scale and an int32 zero point


@dataclass(frozen=True)
class Estimate:
    """The predicted size and time of quantizing a model.

    Attributes:
        plain_bytes: The model's parameters and buffers as they are.
        stored_bytes: The bytes in the file that `save` writes: packed codes, scales, and tensors at full precision.
        forward_seconds: One forward of the first batch, measured; None when it was not.
        batches: How many there are; 0 when that is not known.
        passes: How often the method goes through the data, at least.
    """

    plain_bytes: int
    stored_bytes: int
    forward_seconds: float | None
    batches: int
    passes: float

    @property
    def seconds(self) -> float | None:
        """Time of all the method's forwards, without its other work; None when it cannot be known."""
        if self.forward_seconds is None or not self.batches:
            return None
        return self.forward_seconds * self.batches * self.passes

    def __str__(self) -> str:
        plain, stored = self.plain_bytes / 2**20, self.stored_bytes / 2**20
        text = f"stored: {stored:.1f} MB, from {plain:.1f} MB ({self.plain_bytes / max(self.stored_bytes, 1):.1f}x)"
        if self.seconds is not None and self.forward_seconds is not None:
            text += (
                f"\ntime: at least {self.seconds:.1f} s for the forwards alone ({self.batches} batches, "
                f"{self.forward_seconds:.2f} s each, {self.passes:g} passes)"
            )
        return text


def estimate(
    model: nn.Module,
    sites: Sequence[Site] | str | Mapping[str, Any] | QuantSpec,
    method: str = "rtn",
    calibration: Any = None,
) -> Estimate:
    """Estimate size and time; changes nothing.

    Args:
        model: The plain model.
        sites: Its plan, or a spec as for `quantize`: its plan is made, from the modules alone without calibration.
        method: As for `quantize`.
        calibration: The batches; one forward of the first is timed. None to leave the time out.

    Raises:
        InputError: An unknown method, a batch or a spec that does not fit, or as `planned`.
    """
    batches = None if calibration is None else Batches(calibration)
    if isinstance(sites, (str, Mapping, QuantSpec)):
        spec = QuantSpec.parse(sites)
        sites = plan(model, spec) if batches is None else planned(model, spec, batches, method=method)
    passes = max(sum(entry.passes for entry in get_methods(method)), 1.0)
    plain = _bytes(model)
    seconds, count = None, 0
    if batches is not None:
        with evaluating(model):
            run(model, batches.first)  # the first forward of a process is slower than all others
            start = time.perf_counter()
            run(model, batches.first)
            seconds = time.perf_counter() - start
        count = len(batches)
    return Estimate(plain, plain + _difference(model, sites), seconds, count, passes)


def weight_bytes(site: Site) -> int:
    """Bytes of a quantized weight in the file: its codes, scales and zero points."""
    assert site.format is not None and site.shape
    numbers = math.prod(site.shape)
    codes = (numbers + 1) // 2 if site.format.bits <= 4 else numbers
    rows, inputs = site.matrix
    if isinstance(site.format, BlockFormat):
        along = inputs if site.summed else site.shape[-1]
        blocks = numbers // along * -(-along // site.format.block)
        return codes + blocks + PAIR_BYTES
    each = site.shape[0] if site.summed else 1
    pairs = {"channel": rows, "group": numbers // site.group if site.group else 0}.get(site.granularity, each)
    return codes + pairs * PAIR_BYTES


def _bytes(model: nn.Module) -> int:
    """Bytes of the state dict; a tensor with several names counts once."""
    tensors = {(t.data_ptr(), t.shape, t.stride()): t for t in model.state_dict().values() if isinstance(t, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _difference(model: nn.Module, sites: Sequence[Site]) -> int:
    """The change in size of the stored model through quantizing; mostly negative."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    change = 0
    for site in sites:
        if site.format is None:
            continue
        if site.what != "weight":
            change += PAIR_BYTES if site.granularity not in ("token", "span") else 0
            continue
        weight = model.get_parameter(weight_name(model, site))
        packed = weight_bytes(site)
        # A weight that has several names is stored as it is, once.
        change += packed - weight.numel() * weight.element_size() if uses[id(weight)] == 1 else 0
    return change
