"""The decay's graph of its model. It is traced at the first refresh, and again when the forward pass no longer fits it.

A trace is an extra forward of two rows in evaluation, before the training's own forward and on its own inputs; it
leaves weights, buffers, modes and random numbers as they were. It happens once per structure, not once per refresh.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from s2d.decay.refresh_hooks import is_recomputed, is_transformed
from s2d.decay.written_sites import Site, Sites, Uses, sites_of
from s2d.decay.written_stacks import StackSite
from s2d.errors import InputError
from s2d.models.tracing import inputs_by_key, trace_call, unwrapped
from s2d.targets.padding import MASKS, given_mask, real_of
from s2d.targets.weights import Target, clean_name

# A new branch that calls the same weights in the same order shows only in a new trace.
_TRACE_AGAIN = 50

# Autograd names of the operations that may stand between two modules that a training loop calls one by one. Each output
# channel is one input channel. A product of which only one factor has a gradient is a dropout.
_CHANNEL_BY_CHANNEL = (
    "GeluBackward",
    "ReluBackward",
    "SiluBackward",
    "NativeDropoutBackward",
    "MulBackward",
    "ToCopyBackward",
    "CloneBackward",
)


class Structure:
    """The sites and masks of every call of a target's module, in the forward that is running.

    A forward is a call of the model, or of a module of it that is called from outside.

    Attributes:
        traced: A forward was traced since `look_again`.
        tracing: The forward that runs is the trace's, not the training's.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        """Begin without a trace; `targets` may change later."""
        self._model, self._targets = unwrapped(model), targets
        self._known: dict[nn.Module, Sites] = {}
        self._paths: dict[nn.Module, str] = {}
        self._masked: dict[nn.Module, inspect.Signature] = {}
        self._mark: Any = None
        self._looks = 0
        # Names of targets: those asked for ever, those that ran unknown, those to find now, those to find next time.
        self._asked: set[str] = set()
        self._unknown: set[str] = set()
        self._missing: set[str] = set()
        self._wanted: set[str] = set()
        self._outermost: nn.Module | None = None
        self._called: Counter[str] = Counter()
        self._real: dict[str, Tensor] = {}
        self._named: Tensor | None = None
        self._outputs: dict[Any, tuple[str, int]] = {}  # target and width of outputs, by what autograd knows them by
        self.traced = self.tracing = False

    def look_again(self) -> list[nn.Module]:
        """Begin a refresh. The trace is discarded if the structure of the model has changed.

        Returns:
            The modules whose calls must be passed to `enter` and `leave`.
        """
        modules = {module: clean_name(path) for path, module in self._model.named_modules()}
        numbers: dict[int, int] = {}
        tied = [numbers.setdefault(id(p), i) for i, p in enumerate(_parameters(self._model))]
        mark = [(path, module, type(module).__name__) for module, path in modules.items()], tied
        if mark != self._mark or self._looks >= _TRACE_AGAIN:
            self._known, self._asked, self._looks = {}, set(), 0
            signatures = {module: inspect.signature(module.forward) for module in modules}
            self._masked = {m: s for m, s in signatures.items() if not MASKS.isdisjoint(s.parameters)}
        self._mark, self._paths = mark, modules
        self._looks += 1
        self._outermost, self._named, self.traced = None, None, False
        self._unknown, self._missing, self._wanted = set(), self._wanted, set()
        return list(modules)

    @property
    def incomplete(self) -> bool:
        """Whether something ran that the trace did not show, and no further trace was requested for it yet."""
        return bool(self._unknown)

    def complete(self) -> None:
        """At the next refresh, trace the whole forwards in training mode, to find what was missing."""
        self._asked |= self._unknown
        self._wanted = set(self._unknown)

    # -- the running forward -------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module is about to run."""
        if self.tracing:
            return
        if self._outermost is None or module is self._outermost:
            self._begin(module, args, kwargs)
        signature = self._masked.get(module)
        if signature is None:
            return
        found = real_of(signature, args, kwargs)
        if found is not None:
            self._named = found.detach()
        elif not given_mask(signature, args, kwargs):
            self._named = None  # of an earlier call

    def leave(self, module: nn.Module) -> None:
        """Note that a module has run."""
        if module is self._outermost and not self.tracing:
            self._outermost = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._outermost = module
        self._called.clear()
        self._real = {}
        given, rest = _by_name(module, args, kwargs)
        values = inputs_by_key(rest, given)
        if module not in self._known or self._missing:
            trains = module.training or torch.is_grad_enabled()
            if not trains or is_recomputed() or is_transformed(*values.values()):
                self._outermost = None
                return
            self._trace(module, rest, given)
        for mask in self._known[module].masks:
            value = values.get(mask.key)
            if value is not None and value.ndim == 2:
                named = mask.padding is None and module in self._masked
                real = real_of(self._masked[module], args, kwargs) if named else None
                self._real[mask.key] = mask.keeps(value.detach()) if real is None else real

    def _trace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known, problem = self._known.get(module, Sites()), None
        for training in (True,) if module in self._known else (False, True):
            self.tracing = True
            try:
                graph = trace_call(module, args, kwargs, as_it_trains=training)
            except InputError as error:
                problem = error
                continue
            finally:
                self.tracing = False
            found = sites_of(graph, self._targets, self._paths.get(module, ""))
            known.uses = {**found.uses, **known.uses}
            known.offsets = {**found.offsets, **known.offsets}
            known.without = {**found.without, **known.without}
            known.masks = known.masks or found.masks
            seen = {(site.owner, site.reader) for site in known.stacks}
            known.stacks += [site for site in found.stacks if (site.owner, site.reader) not in seen]
            problem = None
            break
        if problem is not None:
            self._asked |= {target.name for target in self._targets}  # once is enough
            warnings.warn(
                f"the conditioned model could not be traced, so its sites are not known: {problem}", stacklevel=2
            )
        self._missing -= known.uses.keys()
        self._known[module], self.traced = known, True

    def call(self, target: Target, given: Tensor, made: Tensor) -> Uses:
        """The graph's information about a call that has just ended. It must be requested once for each call.

        Args:
            target: The target whose module ran.
            given: Input of the module.
            made: Output of the module.
        """
        if made.grad_fn is not None and target.rows is None and not isinstance(target.module, nn.MultiheadAttention):
            self._outputs[made.grad_fn] = target.name, made.shape[-1]
        number = self._called[target.name]
        self._called[target.name] += 1
        sites = self._known.get(self._outermost) if self._outermost is not None else None
        own = sites.uses.get(target.name) if sites is not None else None
        # A head that is called from outside, for some of the tokens, reads the same site as in the model.
        calls = own or next((s.uses[target.name] for s in self._known.values() if target.name in s.uses), None)
        if not calls:
            if sites is not None and target.name not in self._asked:
                self._unknown.add(target.name)
            return Uses()
        uses = calls[min(number, len(calls) - 1)]
        if uses.read is None and target.kind == "linear" and self._outermost is target.module:
            uses = replace(uses, read=self._made_outside(given))
        site = uses.read
        if own and sites and site is not None and site.writer in sites.uses and not self._called[site.writer]:
            return Uses(None, uses.written, uses.mask)  # its writer was left out: somebody else wrote this
        return uses

    def _made_outside(self, given: Tensor) -> Site | None:
        """The writer of the input of a module that the training loop calls directly (Lightning's `training_step`)."""
        node = given.grad_fn
        while node is not None and node not in self._outputs:
            before = [each for each, _ in node.next_functions if each is not None]
            node = before[0] if len(before) == 1 and node.name().startswith(_CHANNEL_BY_CHANNEL) else None
        name, width = self._outputs.get(node, ("", 0))
        return Site(name) if width == given.shape[-1] else None

    def forget_outputs(self) -> None:
        """End the refresh: release all references to autograd graphs."""
        self._outputs.clear()

    def mask(self, uses: Uses, here: Tensor) -> Tensor | None:
        """Which tokens of an activation ``[..., D]`` are real, in its order; None: all, or not known."""
        sites = self._known.get(self._outermost) if self._outermost is not None else None
        if sites is None or not sites.masks:
            found = self._named
        elif uses.mask is None:
            return None
        else:
            found = self._real.get(uses.mask.key)
            found = found.mT if found is not None and uses.mask.turned else found
        return found if found is not None and found.numel() == here[..., 0].numel() else None

    def stack_sites(self, path: str) -> list[StackSite]:
        """The sites inside the experts of a module, from the trace of the forward that runs, or of another."""
        running = [] if self._outermost is None else [self._outermost]
        for module in (*running, *self._known):
            prefix = self._paths.get(module, "")
            sites = self._known[module].stacks if module in self._known else []
            found = [site for site in sites if clean_name(f"{prefix}.{site.owner}".strip(".")) == path]
            if found:
                return found
        return []

    def real(self, key: str) -> Tensor | None:
        """Which tokens of a model input are real, ``[B, T]``; None: all, or not known."""
        return self._real.get(key) if key else None

    @property
    def writers(self) -> dict[str, str]:
        """The writer of each weight's input, where the weight is its first reader; the last writer of several."""
        found = [pair for sites in self._known.values() for pair in sites.uses.items()]
        return {name: uses.read.writer for name, calls in found for uses in calls if uses.read is not None}

    def without_site(self) -> dict[str, str]:
        """Targets that have run and write no site in any forward, with the reason."""
        sited = {name for sites in self._known.values() for name in sites.writers()}
        every = {name: why for sites in self._known.values() for name, why in sites.without.items()}
        return {name: why for name, why in every.items() if name not in sited}

    def offsets(self) -> dict[str, float]:
        """The numbers that norms add to their gains, for norms that have run."""
        return {name: value for sites in self._known.values() for name, value in sites.offsets.items()}


def _parameters(model: nn.Module) -> list[Tensor]:
    return [p for _, p in model.named_parameters(remove_duplicate=False)]


def _by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The arguments of a call by name, and those without a name."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    named: dict[str, Any] = dict(kwargs)
    for number, value in enumerate(args):
        kind = parameters[number].kind if number < len(parameters) else None
        if kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return dict(kwargs), args
        named[parameters[number].name] = value
    return named, ()


__all__ = ["Structure"]
