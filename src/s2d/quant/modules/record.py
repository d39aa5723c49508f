"""The record in a quantized model: how it was quantized."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from s2d.errors import InputError
from s2d.models.saved import fingerprint
from s2d.quant.modules import cached_steps, sites
from s2d.quant.modules.sites import Site
from s2d.quant.spec import QuantSpec

_ATTRIBUTE = "_s2d_quantization"


@dataclass(frozen=True)
class Record:
    """How a model was quantized: the spec, the method, and the plan that was carried out.

    ``training`` says that its quantizers are still being trained; ``calibrated`` is the fingerprint of the final
    weights and ranges, empty while they are trained.
    """

    spec: QuantSpec
    method: str
    sites: tuple[Site, ...]
    training: bool = False
    calibrated: str = field(default="", compare=False)  # a saved model holds its weights rounded


def switch_on(model: nn.Module, record: Record) -> None:
    """Turn on every quantizer in the model and note how it was quantized."""
    for quantizer in sites.quantizers_of(model):
        quantizer.enabled = True
    cached_steps.install(model)
    note(model, record)


def note(model: nn.Module, record: Record) -> None:
    """Store how a model was quantized, with a fingerprint of its present state."""
    model.__dict__[_ATTRIBUTE] = replace(record, calibrated="" if record.training else fingerprint(model))


def holder(model: nn.Module) -> nn.Module:
    """The module that was quantized: the model itself, or the encoder inside it."""
    return next((module for module in model.modules() if peek(module) is not None), model)


def check_unchanged(model: nn.Module) -> None:
    """Refuse a quantized model whose weights or ranges changed after calibration.

    Raises:
        InputError: They changed, or it is no quantized model.
    """
    model = holder(model)
    if record(model).calibrated != fingerprint(model):
        raise InputError(
            f"the weights of this {type(model).__name__} changed after it was calibrated, so its ranges are not "
            "theirs; quantize it again, or load the saved one"
        )


def peek(model: nn.Module) -> Record | None:
    """The record of a quantized model, in training or not; None for a plain one."""
    return model.__dict__.get(_ATTRIBUTE)


def record(model: nn.Module) -> Record:
    """How this model was quantized.

    Raises:
        InputError: It is not a quantized model, or its quantizers are still being trained.
    """
    found = peek(model)
    if found is None:
        raise InputError(f"{type(model).__name__} is not a quantized model; call quantize first")
    if found.training:
        raise InputError(f"the quantizers of this {type(model).__name__} are still trained; call finish_qat first")
    return found


def remove(model: nn.Module) -> nn.Module:
    """Take every quantizer out of the model, in place; its weights are bit-identical to those before."""
    cached_steps.take_out(model)
    sites.remove(model)
    model.__dict__.pop(_ATTRIBUTE, None)
    return model
