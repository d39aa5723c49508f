"""One model quantized from start to end: loaded, calibrated, rounded or trained on the grid, saved; or only planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from s2d import quant
from s2d.audit import audit_batches, random_batch
from s2d.checkpoint import load, refuse_in_the_way, save
from s2d.distributed import processes
from s2d.distributed.processes import device_of
from s2d.errors import InputError
from s2d.experiments.recipe import Recipe
from s2d.experiments.unfinished import clear, held_beside
from s2d.experiments.watcher import Silent, Watcher
from s2d.io.files import JSON
from s2d.io.provenance import run_metadata
from s2d.models import Loaded, footprint
from s2d.models.tracing import trace
from s2d.quant import QuantSpec, Site
from s2d.quant.allocate import CHOICES, affordable, all_with_bits, sensitivity
from s2d.tasks import Task, create
from s2d.tasks.base import calibration_inputs
from s2d.tasks.evaluation import encoder_inputs, is_bare, model_for
from s2d.training.qat_loop import train_quantized


@dataclass(frozen=True)
class Order:
    """A model to quantize, and the settings.

    Attributes:
        model: As `s2d.load` takes it.
        spec: The spec; with a budget, for the layers outside of it.
        method, protocol, seed, resume: As for `s2d.quantize`.
        budget: Average bits per weight, such as ``"4.5 bits"``.
        check: Refuses a plan that the runtime cannot hold, as `Runtime.refuse` does.
        recipe: Its task gives the calibration data; with ``qat`` the model is trained with quantizers.
        data: Texts or images to calibrate on, without a task.
        device: As in a recipe.
        progress: Show bars.
    """

    model: str
    spec: QuantSpec
    method: str = "rtn"
    protocol: str = "own"
    seed: int = 0
    resume: Path | None = None
    budget: str | None = None
    check: Callable[[Sequence[Site]], None] | None = None
    recipe: Recipe | None = None
    data: str | None = None
    device: str = "auto"
    progress: bool = False


def quantize_model(
    order: Order,
    out: Path | None,
    *,
    say: Callable[[str], None] = lambda line: None,
    watcher: Watcher | None = None,
) -> tuple[list[Site], JSON]:
    """Load, quantize and save a model; each of several processes reads a share of the data, and the first one saves.

    Args:
        order: The model and the settings.
        out: The folder to make; None for the plan alone, with its size and time. A plan needs no data.
        say: Receives lines of text for people.
        watcher: Receives the progress of a training.

    Returns:
        The plan with all its sites, quantized or not, and the description of the run for a results file.

    Raises:
        InputError: The model, the data, the settings or the folder cannot be used; too little memory.
    """
    if out is not None:
        refuse_in_the_way(out)  # before the work, not after it
    entries, training = quant.get_methods(order.method), order.recipe is not None and order.recipe.qat is not None
    shared = processes.count() > 1 and not training
    if processes.count() > 1:
        if shared:
            quant.refuse_undivided(entries)
        if order.budget is not None or out is None:
            raise InputError("--budget and --dry-run work in one process; start them without torchrun")
        processes.meet(device_of(order.device) == "cpu")
    bits = None if order.budget is None else affordable(order.budget, CHOICES)  # before the model is loaded
    task = None if order.recipe is None else create(order.recipe.task.name, **order.recipe.task.options)
    _refuse_too_little(order, task)
    loaded = load(order.model, device=device_of(order.device))
    bare = task is not None and not training and is_bare(loaded, task)
    model, spec = loaded.model if task is None or bare else model_for(loaded, task), order.spec
    needed = (out, bits, order.data) != (None, None, None)
    inputs = _calibration(order, loaded, task, needed=needed)
    if bare and task is not None and inputs is not None:
        say(f"{order.model} has no head: the encoder is quantized, calibrated on inputs of {task.name} alone")
        inputs = [encoder_inputs(model, each) for each in inputs]
    if shared:
        inputs = _share(inputs)
    if bits is not None:
        assert inputs is not None  # only a plan needs no data
        inputs = list(inputs)
        widths = _held_widths(order, model, spec, inputs)
        follow = "follow" if order.check is None else "base"  # a runtime multiplies by the inputs that the spec names
        found = sensitivity(
            model, choices=widths, calibration=inputs, base=spec, activations=follow, progress=order.progress
        )
        spec = found.allocate(bits)
        say(found.explain(spec))
    plan: list[Site] = []
    if out is None or order.check is not None:
        inputs = None if inputs is None else list(inputs)
        plan, traced = _plan(model, spec, inputs, order.method)
        if order.check is not None:
            order.check(plan)
    if out is None:
        if inputs is None:
            say(
                "no data: the model was traced with random inputs"
                if traced
                else "no data to trace the model with: the plan is that of its modules, without most attention"
            )
        say(f"{quant.describe(plan)}\n\n{quant.estimate(model, plan, order.method, inputs)}")
    else:
        quantized, said = _quantized(order, model, task, spec, inputs, held_beside(out), watcher or Silent())
        processes.part()
        plan = list(quant.record(quantized).sites)
        if processes.leads():
            notes = {**loaded.notes, "quantized": {"model": order.model}}
            save(quantized, out, tokenizer=loaded.tokenizer, processor=loaded.processor, notes=notes)
            if training:
                clear(held_beside(out))
            count = sum(site.format is not None for site in plan)
            say(f"{out}: {order.model} at {spec}{said}, {count} of {len(plan)} sites quantized")
    return plan, run_metadata(spec=spec.to_dict(), method=order.method, model=order.model, seed=order.seed)


def _plan(model: nn.Module, spec: QuantSpec, inputs: list[Any] | None, method: str) -> tuple[list[Site], bool]:
    """The plan that is executed, and whether a forward was traced for it; without one it is that of the modules."""
    if inputs is not None:
        return quant.planned(model, spec, inputs, method=method), True
    example, graph = random_batch(model), None
    with suppress(InputError):
        graph = None if example is None else trace(model, example)
    if graph is None:
        return quant.plan(model, spec), False
    return quant.planned(model, spec, [example], graph, method), True


def _held_widths(order: Order, model: nn.Module, spec: QuantSpec, inputs: list[Any]) -> tuple[int, ...]:
    """The widths of weights that a budget may choose from: those that the runtime holds, known before any is measured.

    Raises:
        InputError: It holds none; the reason is that of the largest.
    """
    check, held = order.check, list[int]()
    if check is None:
        return CHOICES
    for bits in CHOICES:
        try:
            check(_plan(model, all_with_bits(spec, bits, follow=False), inputs, order.method)[0])
        except InputError:
            if bits == CHOICES[-1] and not held:
                raise
        else:
            held.append(bits)
    return tuple(held)


def _refuse_too_little(order: Order, task: Task | None) -> None:
    if order.recipe is None or task is None or order.recipe.qat is None:
        footprint.refuse_too_little("quantizing", order.model, device_of(order.device))
        return
    needed = partial(footprint.to_train, tokens=order.recipe.train.batch_size * task.tokens, quantized=True)
    footprint.refuse_too_little("training", order.model, device_of(order.device), needed)


def _calibration(order: Order, loaded: Loaded, task: Task | None, *, needed: bool) -> Any:
    """Model inputs: training examples of the task, else the texts or images of the data; None for no such data."""
    try:
        if order.recipe is None or task is None:
            return audit_batches(loaded, order.data)
        calibration = order.recipe.quantize.calibration
        return calibration_inputs(task, calibration.samples, calibration.batch_size, order.seed)
    except InputError:
        if needed:
            raise
        return None


def _share(batches: Any) -> list[Any]:
    """The calibration batches of this process."""
    inputs = list(batches)
    if len(inputs) < processes.count():
        raise InputError(
            f"{len(inputs)} calibration batches cannot be shared by {processes.count()} processes; use more data, "
            "or smaller batches (-o quantize.calibration.batch_size=8)"
        )
    return inputs[processes.rank() :: processes.count()]


def _quantized(
    order: Order, model: nn.Module, task: Task | None, spec: QuantSpec, inputs: Any, held: Path, watcher: Watcher
) -> tuple[nn.Module, str]:
    """The quantized model, and the notes on its training."""
    recipe = order.recipe
    if recipe is None or task is None or recipe.qat is None:
        quantized = quant.quantize_loaded(
            model,
            spec,
            calibration=inputs,
            method=order.method,
            protocol=order.protocol,
            seed=order.seed,
            resume=order.resume,
            shared=processes.count() > 1,
            progress=order.progress,
        )
        return quantized, ""
    watcher.stage(f"training at {spec}", recipe.qat.steps)
    quantized, done = train_quantized(
        model,
        task,
        spec,
        recipe.qat.training(recipe.train),
        recipe.qat.settings,
        calibration=inputs,
        seed=order.seed,
        decay=recipe.arms["s2d"] if recipe.qat.decay else None,
        state=held / "state.pt",
        on_step=lambda step, loss: watcher.advance(step, f"loss {loss:.3g}"),
    )
    return quantized, f", trained for {done.steps} steps ({done.seconds:.0f} s, last loss {done.losses[-1]:.3g})"
