"""Quantization-aware training: a quantized model whose steps are trained together with its weights.

    model = s2d.prepare_qat(model, "w4a4", calibration=batches)        # an ordinary module; train it in any loop
    optimizer = torch.optim.AdamW(s2d.qat_parameters(model, lr=2e-5))
    schedule = s2d.QATSchedule(model, optimizer, steps=1000)           # hooks into optimizer.step()
    teacher = s2d.Distiller(model, full_precision, batches)            # optional: loss = task loss + teacher.loss()
    ...
    s2d.finish_qat(model)                                              # an ordinary quantized model; s2d.save stores it

Values are rounded with LSQ's gradients (`s2d.quant.numerics.lsq`). A training has three parts. First only activations
are quantized and the weights stay at full precision (the cheap recipe of GPLQ, arXiv 2506.11784, is only this part:
``warmup=1``). Then both are quantized, and steps and weights are trained together. At the end the steps are frozen and
only the weights are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d import quant
from s2d.errors import InputError
from s2d.quant.calibration.observe import set_weight_range
from s2d.quant.modules.record import Record, peek, record, switch_on
from s2d.quant.modules.sites import Site, weight_name
from s2d.quant.numerics.formats import IntFormat
from s2d.quant.numerics.lsq import LearnedQuantizer, lsq_step
from s2d.quant.numerics.oscillation import Oscillations, threshold_at
from s2d.quant.numerics.quantizer import Quantizer, quantize_codes
from s2d.quant.spec import QuantSpec

STEP_LR = 1e-3
_STATE_VERSION = 1


def prepare_qat(
    model: nn.Module,
    spec: str | Mapping[str, Any] | QuantSpec,
    *,
    calibration: Iterable[Any],
    method: str = "rtn",
    observer: str | None = "mse",
    start: Literal["observer", "lsq"] = "observer",
    inplace: bool = False,
    progress: bool = False,
    **options: Any,
) -> nn.Module:
    """Quantize a model so that the ranges of its quantizers can be trained.

    Static integer ranges, per tensor or per channel, are learned; ranges of tokens and blocks, floating-point formats
    and other quantizers stay as calibrated, with a straight-through gradient.

    Args:
        model: A plain model. Its modules, parameters and state-dict keys stay; every learned range adds ``log_step``
            and perhaps ``offset``.
        spec: As for `quantize`.
        calibration: Batches to start the ranges with.
        method: The post-training method to start from.
        observer: The calibrator to start from (for activations; ``"mse"`` for weights as well), or None for the spec's.
        start: Where the weights' steps start: ``"observer"``, or ``"lsq"`` for ``2 mean|w| / sqrt(qmax)``.
        inplace: Prepare this very model instead of a copy.
        progress: Show progress bars.
        options: Further options of `quantize`, such as ``seed``.

    Returns:
        The model, in the mode it had, everything quantized.

    Raises:
        InputError: As `quantize`; or no range in it can be learned.
    """
    if start not in ("observer", "lsq"):
        raise InputError(f"start={start!r} is unknown; choose observer or lsq")
    parsed = QuantSpec.parse(spec)
    if not any(_learnable(part) for part in (parsed, *(override for _, override in parsed.overrides))):
        raise InputError(f"{parsed} has no range to learn: it needs integers per tensor or channel, for example w4a4")
    model = quant.quantize(
        model,
        parsed,
        calibration=calibration,
        method=method,
        observer=observer,
        inplace=inplace,
        progress=progress,
        **options,
    )
    kept = record(model)
    for holder, name, child in list(_children(model)):
        if isinstance(child, Quantizer) and LearnedQuantizer.suits(child):
            setattr(holder, name, LearnedQuantizer(child))
    switch_on(model, Record(kept.spec, "qat", kept.sites, training=True))
    if start == "lsq":
        for _, quantizer, weight in learned_weights(model):
            rows = weight.detach().reshape(max(quantizer.scale.numel(), 1), -1)
            quantizer.restart(lsq_step(rows, quantizer.format).reshape(quantizer.scale.shape), quantizer.zero_point)
    return model


def finish_qat(model: nn.Module) -> nn.Module:
    """End the training, in place: an ordinary quantized model with the ranges that were learned.

    Weights still at full precision (``warmup=1``) get their ranges now, from the observer of the spec.

    Raises:
        InputError: The model was not prepared by `prepare_qat`, or is finished.
    """
    kept = _training_record(model)
    for site, quantizer, weight in learned_weights(model):
        if not quantizer.enabled:
            set_weight_range(site, quantizer, weight.detach())
    for holder, name, child in list(_children(model)):
        if isinstance(child, LearnedQuantizer):
            setattr(holder, name, child.plain())
    switch_on(model, Record(kept.spec, kept.method, kept.sites))
    return model


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained ranges: steps and offsets, without the weights."""
    return [p for module in model.modules() if isinstance(module, LearnedQuantizer) for p in module.parameters()]


def qat_parameters(
    model: nn.Module, *, lr: float = 2e-5, step_lr: float = STEP_LR, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices; vectors, without weight decay; ranges, at their own rate and without it.

    Args:
        model: From `prepare_qat`.
        lr: Peak learning rate of weights.
        step_lr: Of the ranges: about the share by which a step changes in one step of the optimizer.
        weight_decay: Of matrices.

    Raises:
        InputError: The model was not prepared, or nothing in it is trained.
    """
    _training_record(model)
    ranges = learned_parameters(model)
    own = {id(parameter) for parameter in ranges}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"params": ranges, "lr": step_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class QATSchedule:
    """The schedule of a training: what changes with the steps of its optimizer.

    Attributes:
        steps: How long the training is.
        warmup: Share of it, from the start, in which weights are not quantized; their ranges are found when they are.
        freeze: Share of it, at the end, in which ranges are frozen.
        oscillation: Freeze weights that oscillate between two codes; see `oscillation.py`. It takes as much
            memory as four copies of the weights.
        step_count: Steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        steps: int,
        warmup: float = 0.0,
        freeze: float = 0.2,
        oscillation: bool = False,
    ) -> None:
        """Attach to a prepared model and the optimizer that trains it.

        Raises:
            InputError: An impossible setting, not a prepared model, or an optimizer that does not hold its ranges.
        """
        _training_record(model)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimizer
        if not isinstance(inner, Optimizer):
            raise InputError("pass a torch.optim.Optimizer; the schedule follows its steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps={steps!r} must be a whole number, at least 1")
        for name, share in (("warmup", warmup), ("freeze", freeze)):
            if not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
                raise InputError(f"{name}={share!r} is a share of the training, between 0 and 1")
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        if not all(id(parameter) in held for parameter in learned_parameters(model)):
            raise InputError("the optimizer does not hold the model's ranges; make it with s2d.qat_parameters(model)")
        self.steps, self.warmup, self.freeze, self.oscillation = steps, float(warmup), float(freeze), oscillation
        self.step_count = 0
        self._model = model
        self._ranges = learned_parameters(model)
        self._weights = list(learned_weights(model))
        self._watched: dict[str, Oscillations] = {}
        self._set_weights(self._whole_steps == 0)
        self._hooks = [
            inner.register_step_pre_hook(lambda *_: self._before()),
            inner.register_step_post_hook(lambda *_: self._after()),
        ]

    @property
    def _whole_steps(self) -> int:
        return round(self.warmup * self.steps)

    @property
    def ranges_held(self) -> bool:
        """Whether ranges are frozen from now on."""
        return self.step_count >= self.steps - round(self.freeze * self.steps)

    @property
    def frozen(self) -> float:
        """Share of the quantized weights that are frozen because they oscillated."""
        total = sum(weight.numel() for _, _, weight in self._weights)
        return sum(int(watched.frozen.sum()) for watched in self._watched.values()) / max(total, 1)

    def _set_weights(self, on: bool) -> None:
        for _, quantizer, _ in self._weights:
            quantizer.enabled = on

    def _before(self) -> None:
        if self.ranges_held:
            for parameter in self._ranges:
                parameter.grad = None  # optimizers pass over parameters without a gradient

    @torch.no_grad()
    def _after(self) -> None:
        self.step_count += 1
        if self.step_count == self._whole_steps < self.steps:
            for site, quantizer, weight in self._weights:
                set_weight_range(site, quantizer, weight.detach())
            self._set_weights(True)
        if self.oscillation and self.step_count >= self._whole_steps:
            for site, quantizer, weight in self._weights:
                self._hold_oscillating(site.name, quantizer, weight)

    def _hold_oscillating(self, name: str, quantizer: LearnedQuantizer, weight: Tensor) -> None:
        scale, zero_point = quantizer.parameters_for(weight)
        codes = quantize_codes(weight, scale, zero_point, quantizer.format).float()
        if name not in self._watched:
            self._watched[name] = Oscillations(codes)
            return
        watched = self._watched[name]
        held = watched.update(codes, threshold_at(self.step_count / self.steps))
        if bool(watched.frozen.any()):
            weight.copy_(torch.where(watched.frozen, (held - zero_point) * scale, weight))

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, beside those of model and optimizer: plain containers of tensors."""
        return {
            "version": _STATE_VERSION,
            "steps": self.steps,
            "step_count": self.step_count,
            "oscillations": {name: watched.state_dict() for name, watched in self._watched.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the model's own state is loaded separately.

        Raises:
            InputError: It is of another training.
        """
        mine = {"version": _STATE_VERSION, "steps": self.steps}
        for key, value in mine.items():
            if state.get(key) != value:
                raise InputError(f"the schedule's state has {key} {state.get(key)!r}, not {value}; start again")
        self.step_count = state["step_count"]
        self._set_weights(self._whole_steps < self.steps and self.step_count >= self._whole_steps)
        self._watched = {}
        for site, _, weight in self._weights:
            if site.name in state["oscillations"]:
                self._watched[site.name] = Oscillations(weight.detach().float())
                self._watched[site.name].load_state_dict(state["oscillations"][site.name])

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def learned_weights(model: nn.Module) -> Iterator[tuple[Site, LearnedQuantizer, nn.Parameter]]:
    """Every weight site whose range is learned, with its quantizer and parameter."""
    quantizers = {module.name: module for module in model.modules() if isinstance(module, LearnedQuantizer)}
    for site in _training_record(model).sites:
        if site.what == "weight" and site.name in quantizers:
            yield site, quantizers[site.name], model.get_parameter(weight_name(model, site))


def _learnable(spec: QuantSpec) -> bool:
    groups = (spec.weight, spec.activation, spec.attention)
    return any(isinstance(g.format, IntFormat) and g.granularity in ("tensor", "channel") for g in groups if g)


def _training_record(model: nn.Module) -> Record:
    found = peek(model)
    if found is None or not found.training:
        raise InputError(f"this {type(model).__name__} has no ranges in training; call s2d.prepare_qat first")
    return found


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module's children: the module, the child's name, the child."""
    for module in list(model.modules()):
        yield from ((module, name, child) for name, child in list(module.named_children()))
