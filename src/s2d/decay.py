"""Selective spectral decay: shrink the components of a model's weights that make its outliers, while it trains.

    decay = SelectiveSpectralDecay(model, optimizer)      # any loop; nothing else changes

Source: "Selective Spectral Decay" (S2D), arXiv 2602.14432. The paper penalises, in the weights whose outliers come from
their top singular components (PCDR_k >= tau for a k <= K_max),

    L_S2D = lambda / (n + 1) * sum over selected r of sigma_r^(n+1),     dL/dW = lambda * sum sigma_r^n u_r v_r^T

and refreshes components and selection every m steps: ``preset="paper"``.

What differs, and why (docs/results/minilm.md has the measurements):

- ``mode="decoupled"`` shrinks the weight itself after the optimizer's step, by the closed form of d sigma / dt =
  -lambda sigma^n, scaled by the learning-rate schedule (AdamW treats weight decay so). Under Adam an entry moves by at
  most the learning rate a step, whatever the penalty's gradient; outlier directions that sit on a few entries then
  outlive the training.
- ``metric="data"`` and ``metric="site"`` ask which components the *data* excite; see :mod:`s2d.selection`.
- A component is followed until its outlier is gone, not until its rank changes.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.errors import InputError
from s2d.selection import Components, DataMetric, Finding, Metric, SiteMetric, WeightMetric, bias_of, call_views
from s2d.targets import Kind, Selector, Target, find_targets

MetricName = Literal["site", "data", "weight"]
Mode = Literal["decoupled", "coupled"]

_METRICS: dict[str, type[Metric]] = {"site": SiteMetric, "data": DataMetric, "weight": WeightMetric}
_STATE_VERSION = 1
_HISTORY_LENGTH = 100_000


@dataclass(frozen=True)
class DecaySettings:
    """The numbers behind a decay. `PRESETS` holds the named ones.

    Attributes:
        metric: Component of what: see :mod:`s2d.selection`.
        mode: ``"decoupled"`` or ``"coupled"``.
        power: n of the penalty; 1 is exponential decay, the same for every size of component.
        strength: lambda. Decoupled: per step, times the schedule. Coupled: of the loss.
        threshold: tau, the share of the outliers that selects a component (weight and data metric).
        max_rank: K_max, components per weight at most (weight and data metric).
        refresh_every: m, optimizer steps between two looks at the activations.
        outlier_ratio: Largest activation over RMS from which a site or an output is worth touching.
        track: Follow a component until its outlier is gone.
        kinds: Kinds of weight considered.
    """

    metric: MetricName = "site"
    mode: Mode = "decoupled"
    power: float = 1.0
    strength: float = 0.05
    threshold: float = 0.3
    max_rank: int = 3
    refresh_every: int = 5
    outlier_ratio: float = 6.0
    track: bool = True
    kinds: tuple[Kind, ...] = ("linear", "norm")

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            InputError: Naming the setting, its value and the range.
        """
        for name, value, allowed in (
            ("metric", self.metric, get_args(MetricName)),
            ("mode", self.mode, get_args(Mode)),
        ):
            if value not in allowed:
                raise InputError(f"{name}={value!r} is unknown; choose from {', '.join(allowed)}")
        ranges = (
            ("strength", self.strength, 0.0, math.inf, "at least 0"),
            ("power", self.power, 1.0, 16.0, "between 1 (plain decay) and 16"),
            ("threshold", self.threshold, 0.0, 1.0, "between 0 and 1 (a share of the outliers)"),
            ("outlier_ratio", self.outlier_ratio, 0.0, math.inf, "at least 0"),
        )
        for name, value, low, high, text in ranges:
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise InputError(f"{name}={value!r} is out of range; it must be {text}")
        for name, value in (("max_rank", self.max_rank), ("refresh_every", self.refresh_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r} is out of range; it must be a whole number, at least 1")
        if self.metric == "site" and self.mode == "coupled":
            raise InputError(
                "metric='site' shrinks rows and gains directly and has no loss form; "
                "use mode='decoupled', or metric='weight' or 'data' with mode='coupled'"
            )


PRESETS: dict[str, DecaySettings] = {
    "default": DecaySettings(),
    "paper": DecaySettings(
        metric="weight",
        mode="coupled",
        power=2.0,
        strength=5e-4,
        threshold=0.95,
        max_rank=3,
        refresh_every=100,
        outlier_ratio=0.0,
        track=False,
        kinds=("linear", "conv"),
    ),
}


def decayed(sigma: Tensor, amount: float, power: float) -> Tensor:
    """Follow d sigma / dt = -sigma^power for a time ``amount``: the closed form, which never overshoots.

    Args:
        sigma: Non-negative singular values, any shape.
        amount: lambda times the schedule's factor, at least 0.
        power: n >= 1. n = 1: ``sigma e^-amount``; n = 2: ``sigma / (1 + amount sigma)``.

    Returns:
        Between 0 and ``sigma``.
    """
    if power == 1.0:
        return sigma * math.exp(-amount)
    return sigma * (1 + amount * (power - 1) * sigma.pow(power - 1)).pow(-1 / (power - 1))


def spectral_penalty(sigma: Tensor, strength: float, power: float) -> Tensor:
    """The paper's loss, ``lambda / (n + 1) * sum sigma^(n+1)``, a scalar (arXiv 2602.14432)."""
    return strength / (power + 1) * sigma.pow(power + 1).sum()


class SelectiveSpectralDecay:
    """Rides on an optimizer's step and shrinks the components that make outliers.

    Between refreshes it costs a few row scalings or skinny products a step; on refresh steps forward hooks look at the
    activations of that step's own batch. The model is never wrapped and its state dict keeps its keys.

    Attributes:
        settings: The resolved :class:`DecaySettings`.
        targets: What is looked at.
        skipped: Weights left out, by name, with the reason.
        history: One record per refresh and weight: ``step, weight, sigma, pcdr, outlier_max, outlier_ratio, selected``
            (how many components). The newest 100,000 are kept.
        step_count: Optimizer steps seen.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        preset: str | None = None,
        metric: MetricName | None = None,
        mode: Mode | None = None,
        power: float | None = None,
        strength: float | None = None,
        threshold: float | None = None,
        max_rank: int | None = None,
        refresh_every: int | None = None,
        outlier_ratio: float | None = None,
        track: bool | None = None,
        kinds: Sequence[Kind] | None = None,
        include: Selector = "all-linear",
        exclude: Selector = (),
        seed: int = 0,
    ) -> None:
        """Attach to a model and its optimizer.

        Args:
            model: Any module, compiled, or wrapped by DDP or not.
            optimizer: The optimizer (or several) that trains it. Weights that none of them holds are not touched.
            preset: ``"paper"`` for the paper's recipe, ``"default"`` (also None) for ours.
            metric: Overrides the preset, like all settings below; see :class:`DecaySettings`.
            mode: See :class:`DecaySettings`.
            power: See :class:`DecaySettings`.
            strength: See :class:`DecaySettings`.
            threshold: See :class:`DecaySettings`.
            max_rank: See :class:`DecaySettings`.
            refresh_every: See :class:`DecaySettings`.
            outlier_ratio: See :class:`DecaySettings`.
            track: See :class:`DecaySettings`.
            kinds: See :class:`DecaySettings`.
            include: Which weights; see :func:`s2d.targets.find_targets`.
            exclude: Which not.
            seed: Of the random starts of the spectral iterations.

        Raises:
            InputError: An impossible setting, a pattern that matches nothing, or nothing left to condition.
        """
        if preset is not None and preset not in PRESETS:
            raise InputError(f"preset={preset!r} is unknown; choose from {', '.join(PRESETS)}")
        given = {
            name: value
            for name, value in (
                ("metric", metric), ("mode", mode), ("power", power), ("strength", strength), ("threshold", threshold),
                ("max_rank", max_rank), ("refresh_every", refresh_every), ("outlier_ratio", outlier_ratio),
                ("track", track), ("kinds", None if kinds is None else tuple(kinds)),
            )
            if value is not None
        }  # fmt: skip
        self.settings = replace(PRESETS[preset or "default"], **given)
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if not self.optimizers or not all(isinstance(o, Optimizer) for o in self.optimizers):
            raise InputError("pass a torch.optim.Optimizer (or several); its steps are what the decay rides on")
        self.skipped: dict[str, str] = {}
        self._group: dict[int, tuple[Optimizer, int]] = {}
        self.targets = self._usable(model, find_targets(model, include, exclude, self.settings.kinds))
        for target in self.targets:
            if target.kind in ("linear", "conv", "embedding") and self.settings.max_rank > min(target.matrix().shape):
                if max_rank is not None:
                    raise InputError(f"max_rank={max_rank} exceeds the rank of {target.name} {list(target.matrix().shape)}")
        s = self.settings
        self._metric = _METRICS[s.metric](
            self.targets, threshold=s.threshold, max_rank=s.max_rank, outlier_ratio=s.outlier_ratio, track=s.track, seed=seed
        )
        self.history: deque[dict[str, Any]] = deque(maxlen=_HISTORY_LENGTH)
        self.step_count = 0
        self._peak_lr: dict[tuple[int, int], float] = {}
        self._ran: set[str] = set()
        self._mask: Tensor | None = None
        self._handles: list[Any] = []
        self._stance: Any = None
        self._compiled = any(type(m).__name__ == "OptimizedModule" for m in model.modules())
        self._mask_sources = _modules_with_mask(model)
        self._step_hooks: list[Any] = []
        for index, each in enumerate(self.optimizers):
            last = index == len(self.optimizers) - 1
            self._step_hooks.append(each.register_step_pre_hook(self._before_step(first=index == 0)))
            self._step_hooks.append(each.register_step_post_hook(self._after_step(last=last)))
        self._arm()

    # -- construction --------------------------------------------------------------------------------------------------

    def _usable(self, model: nn.Module, found: list[Target]) -> list[Target]:
        """Keep the weights that an optimizer trains; say why the others are left out."""
        for index, optimizer in enumerate(self.optimizers):
            for g, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    self._group[_key(parameter)] = (self.optimizers[index], g)
        owners: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), set()).add(name)
        kept = []
        for target in found:
            parameter = target.parameter
            if type(parameter.data).__name__ == "DTensor":
                raise InputError(
                    f"{target.name} is sharded (DTensor); conditioning sharded weights is not supported yet: "
                    "condition before fully_shard, or train with DDP"
                )
            if ".lora_" in target.name or "lora_embedding" in target.name:
                self.skipped[target.name] = "a LoRA factor, not the weight that runs; merge the adapter to condition"
            elif not parameter.requires_grad:
                self.skipped[target.name] = "frozen (requires_grad is False)"
            elif _key(parameter) not in self._group:
                self.skipped[target.name] = "no optimizer passed here holds it"
            elif len(owners.get(id(parameter), ())) > 1:
                self.skipped[target.name] = "tied to " + ", ".join(sorted(owners[id(parameter)]))
            else:
                kept.append(target)
        if not kept:
            name, reason = next(iter(self.skipped.items()))
            raise InputError(
                f"nothing to condition: all {len(self.skipped)} matching weights are left out, e.g. {name}: {reason}"
            )
        return kept

    # -- the optimizer's hooks -----------------------------------------------------------------------------------------

    def _before_step(self, first: bool) -> Callable[..., None]:
        @torch.no_grad()
        def hook(optimizer: Optimizer, *_: Any) -> None:
            if first and self._handles:
                self._refresh()
            if self.settings.mode == "coupled":
                self._add_gradients(optimizer)

        return hook

    def _after_step(self, last: bool) -> Callable[..., None]:
        @torch.no_grad()
        def hook(optimizer: Optimizer, *_: Any) -> None:
            skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer under GradScaler skips by itself
            if self.settings.mode == "decoupled" and not (skipped is not None and float(skipped) > 0):
                self._shrink(optimizer)
            if last:
                self.step_count += 1
                if self.step_count % self.settings.refresh_every == 0:
                    self._arm()

        return hook

    def _selected_of(self, optimizer: Optimizer) -> Iterable[tuple[Target, Components]]:
        for target in self.targets:
            components = self._metric.selected.get(target.name)
            if components is not None and len(components) and self._group[_key(target.parameter)][0] is optimizer:
                yield target, components

    def _schedule(self, target: Target) -> float:
        """The learning rate as a share of its peak, like the factor on AdamW's weight decay."""
        optimizer, index = self._group[_key(target.parameter)]
        group = optimizer.param_groups[index]
        lr = float(group["lr"])
        key = (self.optimizers.index(optimizer), index)
        peak = max(self._peak_lr.get(key, 0.0), lr, float(group.get("max_lr", group.get("initial_lr", 0.0))))
        self._peak_lr[key] = peak
        return lr / peak if peak > 0 else 0.0

    def _shrink(self, optimizer: Optimizer) -> None:
        """Decoupled: the closed form on the selected components, nothing else."""
        power, strength = self.settings.power, self.settings.strength
        if strength == 0:
            return
        for target, components in self._selected_of(optimizer):
            amount = strength * self._schedule(target)
            if target.kind == "norm":
                shrink_rows(target.parameter.detach(), components, amount, power, bias_of(target))
                continue
            W = target.matrix().mT if target.kind == "embedding" else target.matrix()
            if components.channels is not None:
                shrink_rows(W, components, amount, power, bias_of(target))
            elif self.settings.metric == "weight":
                shrink_singular(W, components, amount, power)
            else:
                shrink_directions(W, components, amount, power, bias_of(target))

    def _add_gradients(self, optimizer: Optimizer) -> None:
        """Coupled: the gradient of the penalty joins the gradient of the loss."""
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under GradScaler unscales by itself, later
        factor = self.settings.strength * (1.0 if scale is None else float(scale))
        if factor == 0:
            return
        for target, components in self._selected_of(optimizer):
            parameter = target.parameter
            if parameter.grad is None:
                continue
            if target.kind == "norm":
                gain = parameter.detach()[components.channels]
                parameter.grad[components.channels] += factor * gain.sign() * gain.abs().pow(self.settings.power)
                continue
            grad, W = target.view(parameter.grad), target.matrix()
            if target.kind == "embedding":
                grad, W = grad.mT, W.mT
            gradient = penalty_gradient(W, components, self.settings.power, self.settings.metric)
            grad.add_(gradient.to(grad.dtype), alpha=factor)

    # -- refresh -------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Put the forward hooks in; they see every forward pass until the next step."""
        self._metric.begin()
        by_module: dict[nn.Module, list[Target]] = {}
        for target in self.targets:
            by_module.setdefault(target.module, []).append(target)
        for module in self._mask_sources:
            self._handles.append(module.register_forward_pre_hook(self._remember_mask, with_kwargs=True))
        for module, targets in by_module.items():
            self._handles.append(module.register_forward_hook(self._look(targets)))
        if self._compiled:
            self._stance = torch.compiler.set_stance("force_eager")  # compiled code does not run hooks added later

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._mask = [], None
        if self._stance is not None:
            torch.compiler.set_stance("default")
            self._stance = None

    def _remember_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            names = list(inspect.signature(module.forward).parameters)
            position = names.index("attention_mask")
            mask = args[position] if position < len(args) else None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self._mask = mask.detach()

    def _look(self, targets: list[Target]) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not module.training and self._any_training:
                return
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            for target in targets:
                self._ran.add(target.name)
                x, y = call_views(target, module, args[0], output)
                mask = self._mask if self._mask is not None and self._mask.numel() == y[..., 0].numel() else None
                self._metric.observe(target, x, y, mask)

        return hook

    @property
    def _any_training(self) -> bool:
        """Evaluation passes between two steps are not looked at, unless the whole model trains in eval mode."""
        return any(target.module.training for target in self.targets)

    def _refresh(self) -> None:
        """Turn what the hooks saw into the new selection."""
        self._disarm()
        findings = self._metric.finish()
        self._share_across_ranks()
        for name, finding in findings.items():
            self.history.append(self._record(name, finding))
        if self.step_count == 0:
            for target in self.targets:
                if target.name not in self._ran:
                    self.skipped[target.name] = "its module's forward was not called in the first step"
            if not self._ran:
                warnings.warn(
                    "no forward pass of the conditioned model was seen before the optimizer's step, so nothing is "
                    "selected; pass the model whose modules really run",
                    stacklevel=4,
                )

    def _record(self, name: str, finding: Finding) -> dict[str, Any]:
        components = self._metric.selected.get(name)
        return {
            "step": self.step_count,
            "weight": name,
            "sigma": finding.sigma,
            "pcdr": finding.pcdr,
            "outlier_max": finding.outlier_max,
            "outlier_ratio": finding.outlier_ratio,
            "selected": 0 if components is None else len(components),
        }

    def _share_across_ranks(self) -> None:
        """Every rank shrinks what rank 0 selected: data-parallel copies must stay equal."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        if torch.distributed.get_world_size() == 1:
            return
        device = self.targets[0].parameter.device
        box = [{n: _moved(c, torch.device("cpu")) for n, c in self._metric.selected.items()}]
        torch.distributed.broadcast_object_list(box, src=0)
        self._metric.selected = {n: _moved(c, device) for n, c in box[0].items()}

    # -- for people ----------------------------------------------------------------------------------------------------

    @property
    def selected(self) -> dict[str, int]:
        """How many components of which weight are being shrunk now."""
        return {name: len(components) for name, components in self._metric.selected.items() if len(components)}

    @property
    def fallbacks(self) -> int:
        """Warm iterations that did not converge and were answered by a full SVD, since the start."""
        return getattr(self._metric, "fallbacks", 0)

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact continuation needs: plain containers of tensors and numbers."""
        return {
            "version": _STATE_VERSION,
            "settings": {f.name: getattr(self.settings, f.name) for f in fields(self.settings)},
            "step_count": self.step_count,
            "peak_lr": [[*key, value] for key, value in self._peak_lr.items()],
            "selected": {name: vars(_moved(c, torch.device("cpu"))) for name, c in self._metric.selected.items()},
            "metric": self._metric.state(),
            "history": list(self.history),
            "ran": sorted(self._ran),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            InputError: The state is of another version, of other settings, or of another model.
        """
        if state.get("version") != _STATE_VERSION:
            raise InputError(f"a decay state of version {state.get('version')!r} cannot be read by version {_STATE_VERSION}")
        mine = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        other = {name: tuple(v) if isinstance(v, list) else v for name, v in state["settings"].items()}
        changed = [name for name in mine if mine[name] != other.get(name)]
        if changed:
            text = ", ".join(f"{name}: {other.get(name)!r} saved, {mine[name]!r} here" for name in changed)
            raise InputError(f"the decay state has other settings ({text}); construct the decay with the saved ones")
        known = {target.name: target for target in self.targets}
        foreign = [name for name in state["selected"] if name not in known]
        if foreign:
            raise InputError(f"the decay state is of another model: it selects {foreign[0]}, which is not a target here")
        self.step_count = state["step_count"]
        self._peak_lr = {(a, b): value for a, b, value in state["peak_lr"]}
        self._metric.selected = {
            name: _moved(Components(**parts), known[name].parameter.device) for name, parts in state["selected"].items()
        }
        self._metric.load_state(state["metric"])
        self.history = deque(state["history"], maxlen=_HISTORY_LENGTH)
        self._ran = set(state["ran"])
        self._disarm()
        if self.step_count % self.settings.refresh_every == 0:
            self._arm()

    def remove(self) -> None:
        """Take every hook out. The model, its state dict and the optimizer are as if the decay had never been."""
        self._disarm()
        for handle in self._step_hooks:
            handle.remove()
        self._step_hooks = []

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"SelectiveSpectralDecay({len(self.targets)} weights, metric={s.metric}, mode={s.mode}, power={s.power}, "
            f"strength={s.strength}, step {self.step_count}, shrinking {sum(self.selected.values())} components)"
        )


# -- pure pieces -------------------------------------------------------------------------------------------------------


def shrink_singular(W: Tensor, components: Components, amount: float, power: float) -> None:
    """W <- W - U (s - s') V^T, with s the present values u^T W v, not those of the last refresh. In place.

    Args:
        W: ``[O, I]``.
        components: With U and V.
        amount: See :func:`decayed`.
        power: See :func:`decayed`.
    """
    assert components.U is not None and components.V is not None
    U, V = components.U, components.V
    s = ((W.to(U.dtype) @ V) * U).sum(0).clamp_min(0)  # a component that training turned around is left alone
    W.sub_(((U * (s - decayed(s, amount, power))) @ V.mT).to(W.dtype))


def shrink_directions(W: Tensor, components: Components, amount: float, power: float, bias: Tensor | None) -> None:
    """W <- (I - U diag(rho) U^T) W and the same for the bias, rho = 1 - s'/s in the metric of the data. In place."""
    assert components.U is not None
    U = components.U
    after = decayed(components.S, amount, power)
    rho = 1 - after / components.S.clamp_min(torch.finfo(after.dtype).tiny)
    W.sub_(((U * rho) @ (U.mT @ W.to(U.dtype))).to(W.dtype))
    if bias is not None:
        bias.sub_(((U * rho) @ (U.mT @ bias.to(U.dtype))).to(bias.dtype))
    components.S = after


def shrink_rows(W: Tensor, components: Components, amount: float, power: float, bias: Tensor | None) -> None:
    """Scale the selected rows (or gains) and their biases by s'/s. In place.

    Args:
        W: ``[O, I]``, or a gain ``[O]``.
        components: With channels.
        amount: See :func:`decayed`.
        power: See :func:`decayed`.
        bias: ``[O]`` or None.
    """
    assert components.channels is not None
    after = decayed(components.S, amount, power)
    kept = after / components.S.clamp_min(torch.finfo(after.dtype).tiny)
    shape = (-1, *[1] * (W.ndim - 1))
    W[components.channels] *= kept.to(W.dtype).view(shape)
    if bias is not None:
        bias[components.channels] *= kept.to(bias.dtype)
    components.S = after


def penalty_gradient(W: Tensor, components: Components, power: float, metric: MetricName) -> Tensor:
    """The gradient of ``sum sigma^(n+1) / (n + 1)`` at the selected components, ``[O, I]``.

    Weight metric: ``sum s^n u v^T`` with the present ``s = u^T W v`` (a stale one would overshoot). Data metric: with
    sigma^2 = u^T W C W^T u, ``sum s^(n-1) u (C W^T u)^T``.
    """
    assert components.U is not None and components.V is not None
    U, V = components.U, components.V
    if metric == "weight":
        s = ((W.to(U.dtype) @ V) * U).sum(0).clamp_min(0)
        return (U * s.pow(power)) @ V.mT
    return (U * components.S.pow(power - 1)) @ V.mT


def _modules_with_mask(model: nn.Module) -> list[nn.Module]:
    return [
        m
        for m in model.modules()
        if type(m).__name__ != "OptimizedModule" and "attention_mask" in inspect.signature(m.forward).parameters
    ]


def _moved(components: Components, device: torch.device) -> Components:
    return Components(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(components).items()})


def _key(parameter: Tensor) -> int:
    return id(parameter)
