"""Selective spectral decay: during training, shrink the components of a model's weights that make its outliers.

    decay = SelectiveSpectralDecay(model, optimizer)      # any loop; nothing else changes

Source: "Selective Spectral Decay" (S2D), arXiv 2602.14432. The paper penalises, in the weights whose outliers come from
their top singular components (PCDR_k >= tau for a k <= K_max),

    L_S2D = lambda / (n + 1) * sum over selected r of sigma_r^(n+1),     dL/dW = lambda * sum sigma_r^n u_r v_r^T

and refreshes components and selection every m steps: ``preset="paper"``.

What differs, and why (docs/results/minilm.md has the measurements):

- ``mode="decoupled"`` shrinks the weight itself after the optimizer's step, by the closed form of d sigma / dt =
  -lambda sigma^n, scaled by the learning-rate schedule (as AdamW does for weight decay). Under Adam an entry moves by
  at most the learning rate a step, whatever the penalty's gradient. Outlier directions that sit on a few entries then
  survive the training.
- ``metric="data"`` and ``metric="site"`` ask which components the *data* excite; see `s2d.decay.selection`.
- A component is followed until its outlier is gone, not until its rank changes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2d.decay.budget import Budget, copies
from s2d.decay.closed_forms import (
    channels_here,
    measured,
    penalty_gradient,
    shrink_directions,
    shrink_rows,
    shrink_singular,
    slope_rows,
    summed_over,
)
from s2d.decay.eligibility import eligible, no_matrices, sort_out
from s2d.decay.fall import Fall
from s2d.decay.learning_rates import PeakRates
from s2d.decay.refresh_hooks import Eager, Watch, is_recomputed, is_transformed
from s2d.decay.schedule_free import moving_together
from s2d.decay.selection import METRICS, Components, Finding
from s2d.decay.selection.site import SiteMetric
from s2d.decay.settings import PRESETS, MetricName, Mode
from s2d.decay.steps import OutermostSteps
from s2d.decay.traced_model import Structure
from s2d.decay.written_sites import Site
from s2d.decay.written_stacks import StackSites, stack_target
from s2d.distributed.parameters import gradient_of
from s2d.distributed.sharding import (
    Block,
    agreed,
    all_ranks,
    all_reduce,
    all_reduce_many,
    data_groups,
    from_first,
    is_dtensor,
    is_fsdp_module,
    local_part,
    ranks_in,
    require_same,
)
from s2d.errors import InputError
from s2d.models.tracing import unwrapped
from s2d.spectral.statistics import Sums
from s2d.targets.calls import (
    bias_parameter,
    call_views,
    is_compiled,
    parts_of,
    projection_views,
    refuse_unreadable,
)
from s2d.targets.lora import with_adapters
from s2d.targets.stacked import StackTarget
from s2d.targets.weights import Kind, Selector, Target, find_targets, is_selected

_STATE_VERSION = 1
_NOT_RUN = "its module's forward was not called, or not with one tensor in and one out"
_HISTORY_LENGTH = 100_000


class SelectiveSpectralDecay:
    """Hooks into an optimizer's step and shrinks the components that make outliers.

    Between refreshes it costs a few row scalings or skinny products a step. On refresh steps forward hooks read the
    activations of that step's own batch. The model is never wrapped and its state dict keeps its keys.

    Attributes:
        settings: The resolved `DecaySettings`.
        targets: The observed weights.
        skipped: Weights left out, by name, with the reason.
        history: One record per refresh and weight: ``step, weight, sigma, pcdr, outlier_max, outlier_ratio, selected``
            (how many components), with a budget ``pace`` (see `pace`), with a fall the weight's ``strength``. The
            newest 100,000 are kept.
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
        budget: float | None = None,
        fall: float | None = None,
        threshold: float | None = None,
        max_rank: int | None = None,
        refresh_every: int | None = None,
        outlier_ratio: float | None = None,
        track: bool | None = None,
        kinds: Sequence[Kind] | None = None,
        include: Selector = "all-linear",
        exclude: Selector = (),
        frozen: bool = False,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        """Attach to a model and its optimizer.

        Args:
            model: Any module: compiled, wrapped by DDP, sharded by FSDP2 (``fully_shard``), tensor-parallel, or none of
                these. All ranks that train it must construct the decay, with the same settings.
            optimizer: The optimizer (or several) that trains it. Weights that none of them holds are not touched.
            preset: ``"paper"`` for the paper's recipe, ``"default"`` (also None) for ours.
            metric, mode, ..., kinds: Override the preset one by one; see `DecaySettings`.
            include: Which weights; see `s2d.targets.find_targets`.
            exclude: Which weights are left out.
            frozen: Also shrink weights that are not trained, for training with LoRA. Components are those of the merged
                weight; the change is applied to the frozen weight. Adapters saved alone no longer fit the original
                base; save the merged model.
            total_steps: Optimizer steps of the whole run; ``fall`` needs them. Recipes and adapters fill them in.
            seed: Seed of the random starts of the spectral iterations.

        Raises:
            InputError: An impossible setting, a pattern that matches nothing, or nothing left to condition.
        """
        if preset is not None and preset not in PRESETS:
            raise InputError(f"preset={preset!r} is unknown; choose from {', '.join(PRESETS)}")
        if not isinstance(model, nn.Module):
            raise InputError(f"model is {type(model).__name__}; pass the torch.nn.Module that is trained")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seed={seed!r} must be a whole number")
        given = {
            name: value
            for name, value in (
                ("metric", metric), ("mode", mode), ("power", power), ("strength", strength), ("budget", budget),
                ("fall", fall), ("threshold", threshold), ("max_rank", max_rank), ("refresh_every", refresh_every),
                ("outlier_ratio", outlier_ratio), ("track", track),
                ("kinds", (kinds,) if isinstance(kinds, str) else kinds and tuple(kinds)),
            )
            if value is not None
        }  # fmt: skip
        self.settings = replace(PRESETS[preset or "default"], **given)
        several = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
        self.optimizers = [_innermost(each) for each in several]
        if not self.optimizers or not all(isinstance(o, Optimizer) for o in self.optimizers):
            raise InputError("pass a torch.optim.Optimizer (or several); the decay acts at its steps")
        self._data_groups, self._everyone = data_groups(model), all_ranks(model)
        if frozen and self.settings.mode == "coupled":
            raise InputError("frozen=True shrinks weights that no loss can reach; use it with mode='decoupled'")
        if self.settings.fall is not None and (not isinstance(total_steps, int) or total_steps < 1):
            raise InputError(
                f"fall={self.settings.fall!r} is over the whole run; give its length, total_steps=N, "
                f"not {total_steps!r}"
            )
        self._rates = PeakRates(self.optimizers, total_steps or 0)
        self._model, self._take_frozen, self._seed = model, frozen, seed
        self._include, self._exclude = include, exclude
        self._found: list[Target] = []
        self._find()
        coupled = self.settings.mode == "coupled"
        self.targets, self.skipped = eligible(model, self._found, self._rates, coupled=coupled, frozen=frozen)
        self.skipped |= self._unfit
        self._changed: set[str] = set()
        self._take_note_of_targets()
        ranks = [min(target.block().shape) for target in self.targets if target.kind != "norm"]
        if max_rank is not None and ranks and max_rank > max(ranks):
            raise InputError(f"max_rank={max_rank} exceeds the rank of every weight here, at most {max(ranks)}")
        s = self.settings
        shared = {"threshold": s.threshold, "max_rank": s.max_rank, "outlier_ratio": s.outlier_ratio, "track": s.track}
        self._metric = METRICS[s.metric](
            self.targets, **shared, seed=seed, gradients=s.mode == "coupled", everyone=self._everyone
        )
        self._budget = None
        if s.metric == "site" and s.budget > 0 and s.strength > 0:
            self._budget = Budget(s.budget, self.optimizers, self._everyone)
        self._fall = None if s.fall is None else Fall(s.fall, s.power, s.strength)
        self._slopes: dict[str, Tensor] = {}
        self.history: deque[dict[str, Any]] = deque(maxlen=_HISTORY_LENGTH)
        self.step_count, self._refreshed_at = 0, -1
        self._ran: set[str] = set()
        self._structure = Structure(model, self._found)
        self._handles: list[Watch | Eager] = []
        self._owed: dict[str, Tensor] = {}
        self._eager = is_compiled(model)
        self._seen_now: dict[str, None] = {}
        self._step_hooks: list[Any] = []
        self._steps = OutermostSteps()
        for index, each in enumerate(self.optimizers):
            last = index == len(self.optimizers) - 1
            self._step_hooks.append(each.register_step_pre_hook(self._before_step(first=index == 0)))
            self._step_hooks.append(each.register_step_post_hook(self._after_step(last=last)))
        self._arm()

    def _find(self) -> None:
        """The weights of the modules that the model has now."""
        model, linear = self._model, "linear" in self.settings.kinds
        self._modules = [*model.modules()]
        self._found[:] = with_adapters(model, find_targets(model, self._include, self._exclude, self.settings.kinds))
        self._unfit = no_matrices(unwrapped(model)) if self._include == "all-linear" and linear else {}
        self._stacks = StackSites(unwrapped(model)) if self.settings.metric == "site" and linear else None

    # -- the optimizer's hooks -----------------------------------------------------------------------------------------

    def _before_step(self, first: bool) -> Callable[..., Any]:
        def prepare(optimizer: Optimizer) -> None:
            with self._exact_arithmetic():
                if first and self._budget is not None:
                    self._budget.judge(_loss_scale(optimizer))
                if first and self._handles:
                    self._refresh()
                if self.settings.mode == "coupled":
                    self._add_gradients(optimizer)

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if _skips_step(optimizer) or not self._steps.enter(optimizer):
                return None
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                prepare(optimizer)
                return self._steps.hold(optimizer, args), kwargs

            def run() -> Any:  # forward and backward happen inside the step (L-BFGS, Lightning)
                loss = closure()
                prepare(optimizer)
                return loss

            others = {name: value for name, value in kwargs.items() if name != "closure"}
            return self._steps.hold(optimizer, (optimizer, run, *args[2:])), others

        return hook

    def _after_step(self, last: bool) -> Callable[..., None]:
        def hook(optimizer: Optimizer, *_: Any) -> None:
            if _skips_step(optimizer) or not self._steps.leave(optimizer):
                return
            self._rates.note(optimizer)
            if self.settings.mode == "decoupled":
                with self._exact_arithmetic():
                    self._shrink(optimizer)
            elif self._fall is not None:
                for target in [each for each, _ in self._selected_of(optimizer)]:
                    self._fall.spend(target.name, self._rates.share(target.parameter))
            if last:
                self.step_count += 1
                if self.step_count % self.settings.refresh_every == 0:
                    self._arm()

        return hook

    @contextlib.contextmanager
    def _exact_arithmetic(self) -> Iterator[None]:
        """No graph is recorded, and autocast, which would compute directions in half precision, is off."""
        device = self._device.type
        active = torch.is_autocast_enabled(device)
        with torch.no_grad(), torch.autocast(device, enabled=False) if active else contextlib.nullcontext():
            yield

    def _selected_of(self, optimizer: Optimizer) -> Iterable[tuple[Target, Components]]:
        for target in self.targets:
            components = self._metric.selected.get(target.name)
            awake = self._take_frozen or target.parameter.requires_grad  # it may have been frozen since the last look
            if components is None or not len(components) or not awake:
                continue
            if self._rates.trainer(target.parameter) is optimizer:
                yield target, components

    def _shrink(self, optimizer: Optimizer) -> None:
        """Decoupled mode: apply the closed form to the selected components."""
        if self.settings.strength == 0:
            return
        members = list(self._selected_of(optimizer))
        if self._fall is not None:
            for target, components in members:
                if not self._fall.strength(target.name):
                    self._fall.solve(target.name, float(components.S.max()), self._rates.whole(target.parameter))
        present = self._present(members)
        if self._budget is not None and self._budget.looks(optimizer):
            known = [t for t, _ in members if t.name in self._slopes]
            costs = [self._strength(t) * self._rates.share(t.parameter) * self._slopes[t.name] for t in known]
            self._budget.moved(optimizer, sum(costs, torch.zeros(())))
        for target, components in members:
            amount = self._strength(target) * self.pace * self._rates.share(target.parameter)
            bias = self._own_bias(target)
            along, along_bias = present.get(target.name, (None, None))

            def change(
                W: Block, t=target, c=components, amount=amount, bias=bias, along=along, along_bias=along_bias
            ) -> None:
                self.shrink(t, W.mT if t.kind == "embedding" else W, c, amount, bias, along, along_bias)

            with moving_together(optimizer, [target.parameter, bias_parameter(target)]):
                target.edit(change)
            if target.name in self._frozen:
                self._changed.add(target.name)

    def shrink(
        self,
        target: Target,
        W: Block,
        components: Components,
        amount: float,
        bias: Block | None,
        along: Tensor | None,
        along_bias: Tensor | None,
    ) -> None:
        """Shrink the selected components of one weight, in place. The control experiment overrides this method.

        Args:
            target: The target of the weight.
            W: ``[O, I]``; a gain is one column.
            components: The selected components.
            amount: The strength times the schedule.
            bias: Bias of the target's rows, where it is trained.
            along: For a sharded weight, the summed `measured` of the whole weight.
            along_bias: The same for its bias.
        """
        power = self.settings.power
        half = torch.finfo(W.local.dtype).bits < 32
        if components.channels is not None:
            owed = self._owed_by(target, W) if half else None
            return shrink_rows(W, components, amount, power, bias, target.offset, owed)
        draw = self._draw(target, W.local.device) if half else None
        if self.settings.metric == "weight":
            shrink_singular(W, components, amount, power, along, draw)
        else:
            shrink_directions(W, components, amount, power, bias, along, along_bias, draw)

    def _owed_by(self, target: Target, W: Block) -> Tensor:
        """The shrinking of every row and bias that half precision could not yet represent: see `shrink_rows`."""
        if target.name not in self._owed:
            self._owed[target.name] = torch.zeros(2, len(W), device=W.local.device)
        owed = self._owed[target.name] = self._owed[target.name].to(W.local.device)
        return owed

    def _draw(self, target: Target, device: torch.device) -> torch.Generator:
        """A generator for random rounding: equal on all ranks and after a resume, separate from the training's own."""
        number = next(n for n, each in enumerate(self.targets) if each.name == target.name)
        seed = hash((self._seed, self.step_count, number)) & (2**63 - 1)  # of integers, the same in every process
        return torch.Generator(device).manual_seed(seed)

    def _strength(self, target: Target) -> float:
        """The lambda of a weight."""
        return self.settings.strength if self._fall is None else self._fall.strength(target.name)

    def _present(self, members: list[tuple[Target, Components]]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The summed `measured` of each sharded weight, and of its bias, which its step needs."""
        divided = [(t, c) for t, c in members if is_dtensor(t.parameter) and c.U is not None]
        weights = self._measured([(_oriented(t), c) for t, c in divided])
        biases = {t.name: (bias, c) for t, c in divided if (bias := self._own_bias(t)) is not None}
        if self.settings.metric == "weight":
            biases = {}  # the weight metric does not change biases
        along = dict(zip(biases, self._measured(list(biases.values())), strict=True))
        return {t.name: (weight, along.get(t.name)) for (t, _), weight in zip(divided, weights, strict=True)}

    def _measured(self, members: list[tuple[Block, Components]]) -> list[Tensor]:
        """`measured` of every whole weight: one message for all of them."""
        metric = self.settings.metric
        parts = [measured(W, components, metric) for W, components in members]
        return all_reduce_many(parts, [summed_over(W, components, metric) for W, components in members])

    def _own_bias(self, target: Target) -> Block | None:
        """The bias of a target's rows, unless it is frozen and the weight is not."""
        bias = bias_parameter(target)
        trained = bias is not None and bias.requires_grad and id(bias) in self._rates
        if bias is None or not (trained or target.name in self._frozen):
            return None
        whole = Block.of(_in_rows(target, bias.detach()))
        return whole if target.rows is None else whole.take(target.rows)

    def _add_gradients(self, optimizer: Optimizer) -> None:
        """Coupled mode: add the gradient of the penalty to the gradient of the loss."""
        if self.settings.strength == 0:
            return
        members = [
            (target, components, _oriented(target), _oriented(target, target.parameter.grad))
            for target, components in self._selected_of(optimizer)
            if target.parameter.grad is not None
        ]
        known = self._measured([(W, components) for _, components, W, _ in members])
        for (target, components, W, grad), present in zip(members, known, strict=True):
            scale, rows = _loss_scale(optimizer), None
            if target.kind == "norm":
                _, rows = channels_here(W, components)
                gain = W.local[rows] + target.offset
                gradient = gain.sign() * gain.abs().pow(self.settings.power)
            else:
                gradient = penalty_gradient(grad, components, self.settings.power, self.settings.metric, present)
            if self._fall is not None and self._refreshed_at == self.step_count:
                lengths = torch.stack([part.float().square().sum() for part in (grad.local, gradient)])
                of_loss, of_penalty = all_reduce(lengths, W.groups).sqrt().tolist()
                most = of_loss / (scale * of_penalty) if of_penalty > 0 else 0.0
                largest, whole = float(components.S.max()), self._rates.whole(target.parameter)
                self._fall.steer(target.name, largest, whole, most)
            if rows is None:
                grad.local.add_(gradient.to(grad.local.dtype), alpha=self._strength(target) * scale)
            else:
                grad.local[rows] += self._strength(target) * scale * gradient

    # -- refresh -------------------------------------------------------------------------------------------------------

    def _take_note_of_targets(self) -> None:
        """Look up which optimizer trains the targets, and their parameters between steps (FSDP2 replaces them)."""
        self._frozen = {t.name: t for t in self.targets if id(t.parameter) not in self._rates}
        self._rates.follow(target.parameter for target in self._frozen.values())  # the schedule of what is trained
        self._between_steps = {target.name: target.parameter for target in self.targets}

    def _look_for_changes(self) -> None:
        """Update the targets: since the last refresh weights may have been frozen, replaced, tied, or newly trained."""
        self._rates.look()
        if self._modules != [*self._model.modules()]:
            self._find_again()
        self._sort_out()

    def _find_again(self) -> None:
        """Modules were replaced, added or removed: their weights take the place of those that were found before."""
        before = {target.name: target for target in self._found}
        with contextlib.suppress(InputError):  # none is left; those of before are then left out by name
            self._find()
        self._found[:] = [replace(t, offset=before[t.name].offset) if t.name in before else t for t in self._found]
        same = {t.name for t in self._found if t.name in before and before[t.name].module is t.module}
        for name in before.keys() - same:  # what is known of them may have another shape
            self._metric.forget(name)
            self._owed.pop(name, None)
            if self._fall is not None:
                self._fall.forget(name)

    def _sort_out(self) -> None:
        coupled = self.settings.mode == "coupled"
        kept, left_out = sort_out(self._model, self._found, self._rates, coupled=coupled, frozen=self._take_frozen)
        if kept != self.targets:
            self.targets[:] = kept
            for name in left_out:
                self._metric.selected.pop(name, None)
        known = {target.name for target in self._found}
        unfit = {name: why for name, why in self._unfit.items() if name not in known}
        self.skipped = {n: why for n, why in self.skipped.items() if why == _NOT_RUN} | left_out | unfit
        self._take_note_of_targets()

    def _arm(self) -> None:
        """Begin a refresh: observe every forward pass until the next step."""
        self._disarm()
        self._look_for_changes()
        self._metric.begin()
        self._seen_now = {}
        by_module: dict[nn.Module, list[Target]] = {}
        for target in self.targets:
            if not isinstance(target, StackTarget):
                by_module.setdefault(target.module, []).append(target)
        looks = {module: self._look(targets) for module, targets in by_module.items()}
        if self._stacks is not None:
            for path, module in self._stacks.modules.items():
                if module not in looks:
                    looks[module] = self._look_inside(path, self._stacks)
        late = [m for m, group in by_module.items() if is_dtensor(group[0].parameter) and not is_fsdp_module(m)]
        structure = self._structure
        self._handles = [Watch(structure.look_again(), structure.enter, looks, structure.leave, late)]
        if self._eager:
            self._handles.append(Eager())

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.close()
        self._handles = []
        self._structure.forget_outputs()

    def _look(self, targets: list[Target]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            attention = isinstance(module, nn.MultiheadAttention)
            made = output[0] if attention else output
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if not isinstance(made, Tensor) or given is None or self._structure.tracing:
                return
            if self._stacks is not None and self._stacks.busy:
                return
            if not (module.training or made.requires_grad):
                return  # an evaluation between two steps
            if is_transformed(made) or (is_recomputed() and targets[0].name in self._seen_now):
                return
            # The refresh is not part of the model: an active function mode (quantized attention) must not see it.
            with torch._C.DisableTorchFunction(), self._exact_arithmetic():
                for target in targets:
                    self._ran.add(target.name)
                    self._seen_now[target.name] = None
                    refuse_unreadable(target, given, made)
                    if attention:
                        x, y = projection_views(target, module, args, kwargs)
                    else:
                        x, y = call_views(target, module, local_part(given), local_part(made))
                    parts = parts_of(target, self._between_steps[target.name], x, y, self._data_groups)
                    uses = self._structure.call(target, given, made)
                    self._metric.observe(target, x, y, self._structure.mask(uses, y), parts, uses)

        return hook

    def _look_inside(self, path: str, stacks: StackSites) -> Callable[..., None]:
        """Look at the products of a module with its stacks (experts)."""

        def see(writer: str, rows: tuple[int, ...], reader: str, sums: Sums) -> None:
            self._ran.add(writer)
            self._seen_now[writer] = None
            with torch._C.DisableTorchFunction():
                assert isinstance(self._metric, SiteMetric)
                self._metric.observe_stack(Site(writer, rows), reader, sums)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            made = output if isinstance(output, Tensor) else next((x for x in output if isinstance(x, Tensor)), None)
            if made is None or self._structure.tracing or not (module.training or made.requires_grad):
                return
            if is_transformed(made) or is_recomputed() or any(is_dtensor(p) for p in module.parameters()):
                return
            sites = self._structure.stack_sites(path)
            if sites:
                real = self._structure.real(sites[0].mask)
                stacks.show(path, sites, args, kwargs, real, self._data_groups, see)

        return hook

    def _refresh(self) -> None:
        """Compute the new selection from the observations."""
        require_same(self._seen_now, self._everyone, self._device)
        if not self._eager and (not self._seen_now or is_compiled(self._model)):
            self._eager = True  # perhaps the model was compiled after this decay was made: look again, eagerly
            return self._arm()
        if self._unknown_anywhere():
            self._structure.complete()
            return self._arm()
        self._disarm()
        self._take_offsets()
        findings = self._metric.finish()
        self._agree()
        if self._budget is not None:
            self._measure_slopes()
            self._budget.look()
        self._refreshed_at = self.step_count
        for name, finding in findings.items():
            self.history.append(self._record(name, finding))
        self._note_what_ran()
        if not self._ran:
            warnings.warn(
                "no forward pass of the conditioned model was seen before the optimizer's step, so nothing is "
                "selected; pass the model whose modules really run",
                stacklevel=4,
            )

    def _measure_slopes(self) -> None:
        """The derivative of the loss by the shrinking of each target. It is not known for frozen weights (LoRA)."""
        self._slopes = {}
        for optimizer in self.optimizers:
            for target, components in self._selected_of(optimizer):
                W, bias, gradient = _oriented(target), bias_parameter(target), gradient_of(target.parameter)
                if components.channels is None or gradient is None:
                    continue
                power, share = self.settings.power, copies(W.groups, self._everyone) / _loss_scale(optimizer)
                slope = slope_rows(W, _oriented(target, gradient), components, power, target.offset)
                own = self._own_bias(target)
                bias_gradient = None if bias is None else gradient_of(bias)
                if own is not None and bias_gradient is not None:
                    whole = Block.of(_in_rows(target, bias_gradient))
                    part = whole if target.rows is None else whole.take(target.rows)
                    # Where a weight is divided along its columns, every rank holds the whole bias.
                    slope = slope + slope_rows(own, part, components, power) / ranks_in(W.column_groups)
                self._slopes[target.name] = slope * share

    def _unknown_anywhere(self) -> bool:
        """Whether something ran on any rank that was not traced. All ranks then trace again together."""
        missing = torch.tensor([float(self._structure.incomplete)], device=self._device)
        return bool(all_reduce(missing, self._everyone, "max"))

    def _take_offsets(self) -> None:
        """Set the offsets of norms from the graph: a norm multiplies by its weight, or by a sum with it."""
        self._metric.searched = self._structure.traced
        if self._structure.traced:
            offsets = self._structure.offsets()
            self._found[:] = [replace(t, offset=offsets.get(t.name, t.offset)) for t in self._found]
            self._take_stacks(() if self._stacks is None else self._stacks.found.values())
            self._look_for_changes()

    def _take_stacks(self, found: Iterable[StackTarget]) -> None:
        """Condition stacks too that a trace, or a saved state, shows to write sites."""
        known = {target.name for target in self._found}
        self._found += [t for t in found if t.name not in known and is_selected(t, self._include, self._exclude)]

    def _note_what_ran(self) -> None:
        written = set(self._structure.writers.values())  # some weights are used without a call of their module
        for target in self.targets:
            if target.name not in self._ran and target.name not in written:
                self.skipped[target.name] = _NOT_RUN
            else:
                self.skipped.pop(target.name, None)

    @property
    def without_site(self) -> dict[str, str]:
        """The targets that write no quantizer's input alone, so that ``metric="site"`` leaves them, with the reason."""
        return self._structure.without_site() if self.settings.metric == "site" else {}

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
            **({} if self._budget is None else {"pace": self.pace}),
            **({} if self._fall is None else {"strength": self._fall.strength(name)}),
        }

    def _agree(self) -> None:
        """Make every rank shrink by the same values, those of rank 0, as copies of a model must stay equal."""
        if ranks_in(self._everyone) == 1:
            return
        selected, device = self._metric.selected, self._device
        marks = [_mark(selected.get(target.name), device) for target in self.targets]
        same = agreed(torch.stack(marks), self._everyone).tolist()
        differing = {t.name: t for t, agrees in zip(self.targets, same, strict=True) if not agrees}
        if not differing:
            return
        mine = {name: selected[name].to(torch.device("cpu")) for name in differing if name in selected}
        theirs = from_first(mine, self._everyone)
        for name, target in differing.items():
            selected.pop(name, None)
            if name in theirs:
                selected[name] = theirs[name].to(target.parameter.device)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    # -- for people ----------------------------------------------------------------------------------------------------

    @property
    def selected(self) -> dict[str, int]:
        """The number of components that are being shrunk now, by weight."""
        return {name: len(components) for name, components in self._metric.selected.items() if len(components)}

    @property
    def pace(self) -> float:
        """The share of the strength that the budget allows now."""
        return 1.0 if self._budget is None else self._budget.pace

    @property
    def fallbacks(self) -> int:
        """Number of warm iterations since the start that did not converge and fell back to a full SVD."""
        return getattr(self._metric, "fallbacks", 0)

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact continuation needs: plain containers of tensors and numbers."""
        return {
            "version": _STATE_VERSION,
            "settings": {f.name: getattr(self.settings, f.name) for f in fields(self.settings)},
            "targets": [[target.name, list(target.parameter.shape)] for target in self.targets],
            "stacks": [
                [t.module_name, t.parameter_name, t.summed, t.bias_name]
                for t in self.targets
                if isinstance(t, StackTarget)
            ],
            "step_count": self.step_count,
            "peak_lr": self._rates.state(),
            "selected": {name: vars(c.to(torch.device("cpu"))) for name, c in self._metric.selected.items()},
            "metric": self._metric.state(),
            "history": list(self.history),
            "ran": sorted(self._ran),
            "frozen": {name: _stored(self._frozen[name]) for name in sorted(self._changed) if name in self._frozen},
            "owed": {name: owed.cpu() for name, owed in self._owed.items()},
            "budget": None if self._budget is None else self._budget.state(),
            "fall": None if self._fall is None else self._fall.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            InputError: The state is of another version, of other settings, or of another model.
        """
        if not isinstance(state, dict) or "version" not in state:
            raise InputError("this is not a decay state; pass what state_dict() of a decay returned")
        if (version := state["version"]) != _STATE_VERSION:
            raise InputError(
                f"a decay state of version {version!r} cannot be read by version {_STATE_VERSION}; "
                "continue with the s2d that wrote it"
            )
        mine = {f.name: getattr(self.settings, f.name) for f in fields(self.settings)}
        other = {name: tuple(v) if isinstance(v, list) else v for name, v in state["settings"].items()}
        other = {"budget": 0.0, "fall": None} | other  # states of older versions have neither
        changed = [name for name in mine if mine[name] != other.get(name)]
        if changed:
            text = ", ".join(f"{name}: {other.get(name)!r} saved, {mine[name]!r} here" for name in changed)
            raise InputError(f"the decay state has other settings ({text}); construct the decay with the saved ones")
        self._restore_stacks(state.get("stacks", []))
        known = {target.name: target for target in self.targets}
        here = {name: list(target.parameter.shape) for name, target in known.items()}
        saved = dict(state["targets"])
        late = {t.name for t in self.targets if isinstance(t, StackTarget)} - saved.keys()  # found by a later trace
        foreign = [name for name in {**here, **saved} if here.get(name) != saved.get(name) and name not in late]
        if foreign:
            first, there = here.get(foreign[0], "missing"), saved.get(foreign[0], "missing")
            raise InputError(
                f"the decay state is of another model: {foreign[0]} is {there} there and {first} here; "
                "load it into the model that it was saved with"
            )
        for name, tensors in state.get("frozen", {}).items():
            for here, saved in zip(_held(known[name]), tensors, strict=True):
                here.copy_(saved)
            self._changed.add(name)
        self.step_count = state["step_count"]
        self._rates.load_state(state["peak_lr"])
        self._metric.selected = {
            name: Components(**parts).to(known[name].parameter.device) for name, parts in state["selected"].items()
        }
        self._metric.load_state(state["metric"])
        self._owed = {name: owed.clone() for name, owed in state.get("owed", {}).items()}
        if self._budget is not None:
            self._budget.load_state(state["budget"])
        if self._fall is not None:
            self._fall.load_state(state["fall"])
        self.history = deque(state["history"], maxlen=_HISTORY_LENGTH)
        self._ran = set(state["ran"])
        if self.step_count:
            self._note_what_ran()
        self._disarm()
        if self.step_count % self.settings.refresh_every == 0:
            self._arm()

    def _restore_stacks(self, saved: Iterable[Sequence[Any]]) -> None:
        """The stacks that the decay of a saved state had found."""
        modules = {} if self._stacks is None else self._stacks.modules
        found = [
            stack_target(path, modules[path], name, summed, bias)
            for path, name, summed, bias in saved
            if path in modules and name in modules[path]._parameters
        ]
        self._take_stacks(found)
        self._sort_out()

    def forget(self) -> None:
        """Call this when the optimizer's step is skipped: the observations of its passes are discarded."""
        if self._handles:
            self._arm()

    def remove(self) -> None:
        """Take every hook out. The model, its state dict and the optimizer are as if the decay had never been."""
        self._disarm()
        for handle in self._step_hooks:
            handle.remove()
        self._step_hooks = []

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            "a decay belongs to its own model and optimizer and cannot be copied or pickled; save its state_dict(), "
            "and keep it outside of the module that is copied"
        )

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"SelectiveSpectralDecay({len(self.targets)} weights, metric={s.metric}, mode={s.mode}, power={s.power}, "
            f"strength={s.strength}, step {self.step_count}, shrinking {sum(self.selected.values())} components)"
        )


def _oriented(target: Target, tensor: Tensor | None = None) -> Block:
    """``[out, in]`` of a weight, or of a tensor like it; an embedding table maps one-hot tokens to features."""
    block = target.block(tensor)
    return block.mT if target.kind == "embedding" else block


def _in_rows(target: Target, bias: Tensor) -> Tensor:
    """A bias, or a tensor like it, as a vector with an entry for each row of the target."""
    return bias.flatten() if isinstance(target, StackTarget) else bias


def _mark(components: Components | None, device: torch.device) -> Tensor:
    """A checksum of a selection: equal bits give equal sums."""
    tensors = [] if components is None else [t for t in vars(components).values() if t is not None]
    parts = [t.float().sum().to(device) * (number + 1) for number, t in enumerate(tensors)]
    return torch.stack(parts).sum() if parts else torch.zeros((), device=device)


def _held(target: Target) -> list[Tensor]:
    """A weight and, where there is one, its bias, whole and detached."""
    return [each.detach() for each in (target.parameter, bias_parameter(target)) if each is not None]


def _stored(target: Target) -> list[Tensor]:
    """A copy of a frozen weight that the decay changes; checkpoints of adapters do not hold it."""
    return [each.cpu().clone() for each in _held(target)]


def _innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and Lightning."""
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, Optimizer) else optimizer


def _loss_scale(optimizer: Optimizer) -> float:
    """The factor that the gradients still contain: a fused optimizer under GradScaler unscales them itself, later."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _skips_step(optimizer: Optimizer) -> bool:
    """A fused optimizer under a gradient scaler is stepped even when it will skip."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) > 0
