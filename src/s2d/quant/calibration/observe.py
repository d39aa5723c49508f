"""Observation: calibration batches through a model, with padding masks and observers at static activation sites."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import length_hint
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from s2d.distributed.sharding import Groups
from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.models.masks import Padding, token_mask
from s2d.models.running import evaluating, real_tokens, run
from s2d.models.stack_products import real_rows
from s2d.models.tracing import trace
from s2d.quant.calibration.resume import Store
from s2d.quant.modules.experts import quantizers_of_stack
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.modules.products import attentions_of
from s2d.quant.modules.sites import OPERANDS, Site, replace_quantizer, weight_name
from s2d.quant.numerics.formats import Format
from s2d.quant.numerics.observers import Observer, Rounding, make_observer, weight_range
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.numerics.stacks import StackQuantizer, rows_of
from s2d.quant.spec import QuantSpec

Stage = Literal["transform", "rounding", "correction"]
Protocol = Literal["own", "unified"]


# Batches of a loader are kept in memory up to this many bytes; a list is kept by the caller.
HELD_BYTES = 8 * 2**30


class Batches:
    """Calibration batches, the same ones in the same order in every pass.

    A list can be read as often as a method needs. So can a DataLoader: the batches of its first pass are kept, since
    another pass may shuffle or augment again. A generator can be read once.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        """Look at the first batch.

        Raises:
            InputError: Not an iterable of batches, or an empty one.
        """
        if isinstance(source, (Mapping, Tensor, str)) or not isinstance(source, Iterable):
            raise InputError(f"calibration is a list of batches, or a DataLoader, not one {type(source).__name__}")
        self._source = source
        self._stream = iter(source)
        # A generator is its own iterator and cannot start again, so what was read from it is held.
        self._once = self._stream is source
        try:
            self.first = next(self._stream)
        except StopIteration:
            raise InputError("the calibration data is empty; give at least one batch") from None
        self._used = False
        self._held: list[Any] | None = None if self._once or isinstance(source, (list, tuple)) else [self.first]
        self._whole = False
        self._bytes = 0

    def __len__(self) -> int:
        return length_hint(self._source)  # 0 where it is not known, as of a loader over a stream

    def __iter__(self) -> Iterator[Any]:
        if self._held is not None:
            yield from self._hold()
            return
        if not self._once:
            yield from self._source
            return
        if self._used:
            raise InputError("this method reads the calibration data several times; give a list, not a generator")
        self._used = True
        yield self.first
        yield from self._stream

    def _hold(self) -> Iterator[Any]:
        """The batches that were read before, then the remaining ones of the first pass."""
        assert self._held is not None
        at = 0
        while True:
            if at == len(self._held):
                batch = _END if self._whole else next(self._stream, _END)
                if batch is _END:
                    self._whole = True
                    return
                self._held.append(batch)
                self._bytes += _bytes(batch)
                if self._bytes > HELD_BYTES:
                    raise InputError(
                        f"the calibration batches take more than {HELD_BYTES / 2**30:g} GiB, and a loader's have to be "
                        "held so that every pass sees the same; use fewer or smaller ones, or a list"
                    )
            yield self._held[at]
            at += 1


_END = object()


def _bytes(value: Any) -> int:
    """Memory of the tensors in a batch."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


@dataclass
class Job:
    """The input of a quantization method: the model with its quantizers inserted and off, and the calibration data.

    Attributes:
        model: Changed in place.
        spec: What was asked for.
        sites: The whole plan, with the sites that stay at full precision.
        quantizers: The quantizer of every site that is not kept. A rounding must give each static one its range.
        batches: The calibration data.
        seed: Seed of all random numbers in the method; see `generator`.
        progress: Whether to show progress bars.
        method: All methods of this call, ``"rotation+gptq"``.
        protocol: ``"own"``: ranges and defaults as the method's authors published them. ``"unified"``: the ranges are
            those of the spec's observers on the full-precision model, the same for every method.
        store: Where finished blocks are kept, for a call that can be interrupted; None to keep nothing.
        stage: Which kind of method is running.
        published: The observer of the running method's own protocol, for sites whose spec names none (min-max); None
            for methods that have none, and under the unified protocol.
        ranks: The processes, each with this model and its own share of the data; empty for a single process.
        traced: The graph of the first batch, if the model has been traced already.
        original: For a correction: a copy of the model as it was before the rounding, all its quantizers off.
    """

    model: nn.Module
    spec: QuantSpec
    sites: list[Site]
    quantizers: dict[Site, Quantizer]
    batches: Batches
    seed: int
    progress: bool
    method: str = "rtn"
    protocol: Protocol = "own"
    store: Store | None = None
    stage: Stage = "rounding"
    published: str | None = None
    ranks: Groups = ()
    traced: Graph | None = None
    original: nn.Module | None = None

    @cached_property
    def graph(self) -> Graph:
        """What the model does with its weights, seen in one forward of the first calibration batch."""
        return traced(self.model, self.batches) if self.traced is None else self.traced

    def observer_of(self, site: Site) -> str:
        """The observer that finds the range of a site."""
        named = site.observer != "minmax" or site.granularity == "block"
        return site.observer if named or self.published is None else self.published

    def observed(self, site: Site) -> Site:
        """The site with the observer that finds its range."""
        return replace(site, observer=self.observer_of(site))

    def weight(self, site: Site) -> Tensor:
        """The weight of a ``weight`` site as it is now, detached."""
        return self.model.get_parameter(weight_name(self.model, site)).detach()

    def replace_quantizer(self, site: Site, quantizer: Quantizer) -> None:
        """Put another kind of quantizer at a site that has one."""
        replace_quantizer(self.model, site, quantizer)
        quantizer.train(self.quantizers[site].training)
        self.quantizers[site] = quantizer

    def generator(self, name: str) -> torch.Generator:
        """Random numbers (on CPU) that depend on the seed and on ``name`` alone, such as a block's.

        So an interrupted call that continues draws the same numbers as an uninterrupted one.
        """
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def traced(model: nn.Module, batches: Batches) -> Graph:
    """What a model does with the first batch.

    Raises:
        InputError: It cannot run it.
    """
    try:
        return trace(model, batches.first)
    except InputError:
        with evaluating(model):
            run(model, batches.first)  # says what is wrong in the words of calibration
        raise


def watch_inputs(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None], mask: Callable[[], Padding]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Show ``see`` the name and the real tokens ``[N, in]`` of the input of each module, as often as it runs.

    The inputs are what a Linear's own input quantizer would see, or the queries of an `nn.MultiheadAttention`. The
    caller removes the returned hooks.

    Args:
        modules: By the names that ``see`` gets.
        see: Called in every forward.
        mask: Gives the padding masks of the running forward.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["query" if isinstance(module, nn.MultiheadAttention) else "input"]
            if isinstance(module, QuantizedLinear):
                x = module.transform_input(x)
            see(name, real_tokens(x.detach(), mask()(name), "input").flatten(0, -2))

        return before

    return [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]


def observe(job: Job, only: Container[Site] | None = None) -> None:
    """Pass over the data once and set the range of every static activation quantizer.

    Args:
        job: The call's job; the model runs as it is.
        only: The sites to observe, all when None.

    Raises:
        InputError: NaN or infinite activations (the site is named), a batch that does not fit, a site that no data
            reached, or an attention that the plan does not know.
    """
    chosen = {site: q for site, q in job.quantizers.items() if only is None or site in only}
    with (
        token_mask(job.model, job.graph) as mask,
        refusing_unplanned(job) as check,
        evaluating(job.model),
        observing(job, chosen, lambda: mask) as observers,
    ):
        if not observers:
            run(job.model, job.batches.first)
            return
        batches = track(
            job.batches, "calibrating", total=len(job.batches) or None, disable=not job.progress, transient=True
        )
        for index, batch in enumerate(batches):
            run(job.model, batch, index)
            check(batch)


@contextmanager
def observing(
    job: Job, quantizers: Mapping[Site, Quantizer], mask: Callable[[], Padding]
) -> Iterator[Mapping[Site, Observer | PerHead]]:
    """While active, the spec's observers see the inputs of static activation quantizers; then the ranges are set.

    Args:
        job: The call's job.
        quantizers: The sites; weights and dynamic ones are left alone.
        mask: Gives the padding masks of the running forward.

    Raises:
        InputError: NaN or infinite activations, or a site that nothing reached; both are named.
    """
    static = {site: q for site, q in quantizers.items() if site.what != "weight" and not q.dynamic}
    observers = {site: _observer(replace(site, observer=job.observer_of(site))) for site in static}
    try:
        for site, quantizer in static.items():
            rows = None
            if site.summed:
                held = quantizers_of_stack(job.model.get_submodule(site.owner), site.module.rpartition(".")[2])
                rows = partial(getattr, held, "rows_seen")
            quantizer.watch = _watcher(observers[site], site, mask, rows)
        yield observers
    finally:
        for quantizer in static.values():
            quantizer.watch = None
    _refuse_unreached(observers)
    if job.ranks:
        for observer in observers.values():
            observer.add_up(job.ranks)
    for site, quantizer in static.items():
        quantizer.fit(observers[site])


class PerHead:
    """An observer for every head of an attention operand."""

    def __init__(self, site: Site) -> None:
        """Start empty, for the operand ``site``."""
        self.site = site
        self.heads: list[Observer] = []

    @property
    def seen(self) -> bool:
        """Whether any value was seen."""
        return bool(self.heads)

    def update(self, x: Tensor) -> None:
        """Take in the operand of some tokens, heads along dimension 1.

        Raises:
            InputError: It holds NaN or infinity, or another number of heads than before.
        """
        if not self.heads:
            self.heads = [make_observer(self.site.observer, self.site.name) for _ in range(x.shape[1])]
        if x.shape[1] != len(self.heads):
            raise InputError(f"{self.site.name}: {len(self.heads)} heads, then {x.shape[1]}; use granularity tensor")
        for head, observer in zip(x.unbind(1), self.heads, strict=True):
            observer.update(head)

    def add_up(self, groups: Groups) -> None:
        """Take in what those of other ranks saw."""
        for observer in self.heads:
            observer.add_up(groups)

    def range(self, format: Format, rounding: Rounding | None = None) -> tuple[Tensor, Tensor]:
        """The range of every head, ``lo`` and ``hi`` of shape ``[H]``."""
        ranges = [observer.range(format, rounding) for observer in self.heads]
        return torch.stack([lo for lo, _ in ranges]), torch.stack([hi for _, hi in ranges])


def _observer(site: Site) -> Observer | PerHead:
    return PerHead(site) if site.granularity == "head" else make_observer(site.observer, site.name)


def _watcher(
    observer: Observer | PerHead,
    site: Site,
    mask: Callable[[], Padding],
    rows: Callable[[], tuple[Tensor | None, int]] | None,
) -> Callable[[Tensor], None]:
    def see(x: Tensor) -> None:
        if rows is not None:  # of a stack: the tokens were sorted and picked since
            x, kept = x.flatten(0, -2), real_rows(*rows(), mask().of_rows(site.owner))
            observer.update(x if kept is None or len(kept) != len(x) else x[kept])
            return
        if site.granularity == "head" and x.ndim != 4:
            raise InputError(
                f"{site.name} has {x.ndim} dimensions, but a range a head needs [batch, heads, tokens, features]; "
                "use granularity tensor"
            )
        real = mask()(site.module, site.what)
        if site.prefix:  # those are neither rounded nor in the range
            x = x[..., site.prefix :, :]
            real = None if real is None else real[:, site.prefix :]
        observer.update(real_tokens(x, real, site.what))

    return see


def _refuse_unreached(observers: Mapping[Site, Observer | PerHead]) -> None:
    missed = [site.name for site, observer in observers.items() if not observer.seen]
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        raise InputError(
            f"the calibration data never reached {', '.join(missed[:3])}{more}; "
            "feed data that does, or override them with keep"
        )


@contextmanager
def refusing_unplanned(job: Job) -> Iterator[Callable[[Any], None]]:
    """While active, give a function to call after each batch; it traces modules that ran for the first time.

    Attention that runs unquantized must be in the plan as kept; otherwise the plan does not know it.
    """
    operands = [site for site in job.sites if site.what in OPERANDS]
    if not any(site.format for site in operands):
        yield lambda batch: None
        return
    planned = {site.module for site in operands}
    modules = dict(job.model.named_modules())
    unseen = [modules[name] for name in job.graph.unseen if name in modules]
    ran: list[nn.Module] = []
    # Any part of a module that did not run may have been called.
    parts = {part for module in unseen for part in module.modules()}
    hooks = [part.register_forward_pre_hook(lambda module, _: ran.append(module)) for part in parts]

    def check(batch: Any) -> None:
        if not ran:
            return
        for hook in hooks:
            hook.remove()
        for name in attentions_of(job.model, trace(job.model, batch)):
            if name not in planned:
                raise InputError(
                    f"{name or 'the model'} ({type(modules[name]).__name__}) computes attention that the plan does not "
                    "cover; put a batch that reaches it first, or set attention: false in the spec"
                )
        ran.clear()

    try:
        yield check
    finally:
        for hook in hooks:
            hook.remove()


def set_weight_range(site: Site, quantizer: Quantizer, weight: Tensor) -> None:
    """Give a weight quantizer the range that its site's observer finds in ``weight`` (``[out, in]`` or a kernel)."""
    if quantizer.dynamic:
        return
    rows = rows_of(quantizer, weight).flatten(1)
    if site.granularity == "group":
        rows = rows.reshape(-1, site.group)
    elif site.granularity != "channel" and not isinstance(quantizer, StackQuantizer):
        rows = rows.reshape(1, -1)
    lo, hi = weight_range(rows, site.observer, quantizer.format, name=site.name)
    quantizer.set_range(lo.reshape(quantizer.scale.shape), hi.reshape(quantizer.scale.shape))


def set_weight_ranges(job: Job) -> None:
    """Give every weight quantizer the range that its site's observer finds in the weight."""
    for site, quantizer in job.quantizers.items():
        if site.what == "weight":
            set_weight_range(job.observed(site), quantizer, job.weight(site))


def least_error(job: Job) -> None:
    """For transforms and GPTQ: sites whose spec names no observer get ranges of least squared error.

    Their papers keep activations at full precision or use a range per token, and most of them search a clipping
    threshold for weights. Min-max over all calibration data, the default of ``rtn``, is not part of them: there a
    single extreme sets the range. Under the unified protocol nothing changes.
    """
    if job.protocol == "own":
        job.published = "mse"
