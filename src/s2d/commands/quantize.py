"""s2d quantize."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from s2d.commands.promise import METHOD, check_options, keep_promise
from s2d.commands.shared import (
    Data,
    Device,
    ForRuntime,
    JsonFile,
    Model,
    Overrides,
    Quiet,
    Seed,
    TaskName,
    app,
    bars,
    check_file,
    check_folder,
    clear,
    command,
    held_beside,
    refuse_too_little,
    save_json,
    say,
    settings,
)
from s2d.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from s2d.experiments.recipe import Recipe
    from s2d.quant import QuantSpec
    from s2d.tasks import Task
    from s2d.training.train_settings import Training


@command(app, example="s2d quantize runs/conditioned --spec w4a4 --observer mse --out runs/w4a4", together=True)
def quantize(
    model: Model,
    spec: Annotated[
        str | None,
        typer.Option(
            help="Bits of weights and activations: w8a8, w4a4, w4a16, ..., or '{base: w4a4, attention: false}'. By "
            "default w4a4, or what --for begins with."
        ),
    ] = None,
    for_: ForRuntime = None,
    observer: Annotated[str | None, typer.Option(help="minmax, percentile, percentile:99.99 or mse.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help='Bits a weight may have on average, as "4.5 bits": layers get 3, 4, 6 or 8, by measurement.',
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="How, for example rotation+gptq: see [bold]s2d doctor[/bold]; or auto, for a promise."),
    ] = "rtn",
    within: Annotated[
        float | None, typer.Option(metavar="POINTS", help="With --method auto: what the file may lose of the metric.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="With --method auto: end after about so many.")] = None,
    fastest: Annotated[
        bool, typer.Option("--fastest/--smallest", help="With --method auto: what is wanted of the file.")
    ] = False,
    protocol: Annotated[str, typer.Option(help="Ranges: each method's own, or one rule for all (unified).")] = "own",
    prefix: Annotated[
        int, typer.Option(min=0, help="First tokens of a text that stay at full precision, and out of the ranges.")
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Then train it with the quantizers in place (QAT) for so many steps; needs --task."),
    ] = None,
    task: TaskName = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the quantized model.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Keeps finished blocks, to continue from.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with its size and time, and stop.")
    ] = False,
    seed: Seed = 0,
    o: Overrides = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a model, calibrated on a little data; with --steps, train its weights and ranges on the grid.

    With --task, calibration uses training examples of it (128; -o quantize.calibration.samples=256); otherwise the
    texts or images of --data, or docstrings of the standard library. With --budget each layer is first measured at
    every width (minutes), and the layers that make most of the error are named. Low bits are simulated in floating
    point; s2d.load and s2d evaluate read the folder. Under torchrun each process reads a share of the calibration data.

    --steps continues from where --method ends, with the loss of --task: for unlabelled-text and unlabelled-images that
    is to stay the model that went in, so no labels are needed. Settings: -o qat.lr=2e-4, -o train.batch_size=32; how
    far it got is kept beside --out, and the same command continues.

    --method auto --for RUNTIME --within POINTS looks for the smallest (--fastest) file that loses at most so many
    points: candidates are exported, run in their runtime and compared with full precision on the validation split.
    Exit codes: 0 met, 3 not sure, 4 not met. Every file that was judged is kept, and the same command goes on.
    """
    chosen = {"--spec": spec, "--observer": observer, "--budget": budget, "--steps": steps, "--resume": resume}
    chosen |= {"--prefix": prefix or None, "--protocol": None if protocol == "own" else protocol}
    check_options(method, chosen, {"--within": within, "--minutes": minutes, "--fastest": fastest})
    if method == METHOD:
        search = {"runtime": for_, "within": within, "minutes": minutes, "fastest": fastest, "seed": seed}
        keep_promise(model, task, data, o, out=out, dry_run=dry_run, json_file=json_file, quiet=quiet, **search)
        return
    if out is None and not dry_run:
        raise InputError("where should the quantized model go? add --out FOLDER, or --dry-run to see the plan only")
    check_folder(out)
    check_file(json_file)
    if steps is not None and task is None:
        raise InputError(
            "--steps trains, so it needs a loss and data; add --task, and --data where the task reads some"
        )
    if steps is not None and (observer, budget, resume, protocol) != (None, None, None, "own"):
        raise InputError("--steps learns the ranges; leave out --observer, --budget, --protocol and --resume")
    from s2d import quant
    from s2d.audit import audit_batches
    from s2d.checkpoint import load, refuse_in_the_way, save
    from s2d.distributed import processes
    from s2d.distributed.processes import device_of
    from s2d.export.runtime import find_runtime
    from s2d.io.provenance import run_metadata
    from s2d.models import footprint
    from s2d.quant import QuantSpec
    from s2d.quant.allocate import CHOICES, affordable, sensitivity
    from s2d.tasks import create
    from s2d.tasks.base import calibration_inputs
    from s2d.tasks.evaluation import encoder_inputs, is_bare, model_for

    if out is not None and not dry_run:
        refuse_in_the_way(out)  # before the work, not after it
    runtime = None if for_ is None else find_runtime(for_)
    parsed = QuantSpec.parse(spec or (runtime.spec if runtime is not None and runtime.spec else "w4a4"))
    if observer is not None:
        parsed = parsed.with_observer(observer)
    if prefix:
        parsed = replace(parsed, prefix=prefix)
    entries = quant.get_methods(method)
    if processes.count() > 1:
        if steps is None:
            quant.refuse_undivided(entries)
        if budget is not None or dry_run:
            raise InputError("--budget and --dry-run work in one process; start them without torchrun")
        quiet = quiet or not processes.leads()
        processes.meet(device_of(device) == "cpu")
    bits = None if budget is None else affordable(budget, CHOICES)  # before the model is loaded
    training = {} if steps is None else {"qat": {"steps": steps, "method": method}}
    recipe = settings(model, task, data, o, **training) if task is not None or o else None
    if steps is None and recipe is not None and recipe.qat is not None:
        raise InputError("qat is for training with the quantizers in place; add --steps")
    made = None if recipe is None else create(recipe.task.name, **recipe.task.options)
    if recipe is not None and made is not None and recipe.qat is not None:
        needed = partial(footprint.to_train, tokens=recipe.train.batch_size * made.tokens, quantized=True)
        refuse_too_little(f"training {model}", model, device_of(device), needed)
    else:
        refuse_too_little(f"quantizing {model}", model, device_of(device))
    loaded = load(model, device=device_of(device))
    plain, bare = loaded.model, False
    if made is not None:
        bare = steps is None and is_bare(loaded, made)
        plain = loaded.model if bare else model_for(loaded, made)
    inputs: Any = None
    try:
        if recipe is None or made is None:
            inputs = audit_batches(loaded, data)
        else:
            inputs = calibration_inputs(
                made, recipe.quantize.calibration.samples, recipe.quantize.calibration.batch_size, seed
            )
            if bare:
                say(quiet, f"{model} has no head: the encoder is quantized, calibrated on inputs of {made.name} alone")
                inputs = [encoder_inputs(plain, each) for each in inputs]
    except InputError:
        if not dry_run or bits is not None:  # a plan needs no data; its time is then left out
            raise
    if processes.count() > 1 and steps is None:
        inputs = list(inputs)
        if len(inputs) < processes.count():
            raise InputError(
                f"{len(inputs)} calibration batches cannot be shared by {processes.count()} processes; use more data, "
                "or smaller batches (-o quantize.calibration.batch_size=8)"
            )
        inputs = inputs[processes.rank() :: processes.count()]
    if bits is not None:
        found = sensitivity(plain, calibration=inputs, base=parsed, progress=bars(quiet))
        parsed = found.allocate(bits)
        say(quiet, found.explain(parsed))
    if runtime is not None:
        inputs = None if inputs is None else list(inputs)
        runtime.refuse(quant.plan(plain, parsed) if inputs is None else quant.planned(plain, parsed, inputs))
    if dry_run:
        inputs = None if inputs is None else list(inputs)
        # The very plan that would be executed; without data what the modules alone tell.
        plan = quant.plan(plain, parsed) if inputs is None else quant.planned(plain, parsed, inputs)
        say(quiet, f"{quant.describe(plan)}\n\n{quant.estimate(plain, plan, method, inputs)}")
    else:
        assert out is not None and inputs is not None  # else it is a plan
        said = f"{out}: {model} at {parsed}"
        if recipe is not None and made is not None and recipe.qat is not None:
            quantized, done = _train(plain, made, parsed, recipe, inputs, seed, held_beside(out), quiet)
            said += f", trained for {done.steps} steps ({done.seconds:.0f} s, last loss {done.losses[-1]:.3g})"
        else:
            quantized = quant.quantize(
                plain,
                parsed,
                calibration=inputs,
                method=method,
                protocol=protocol,
                seed=seed,
                resume=resume,
                inplace=True,
                shared=processes.count() > 1,
                progress=bars(quiet),
            )
        processes.part()
        if not processes.leads():
            return  # the first process writes
        plan = quant.record(quantized).sites
        notes = {**loaded.notes, "quantized": {"model": model}}
        save(quantized, out, tokenizer=loaded.tokenizer, processor=loaded.processor, notes=notes)
        if steps is not None:
            clear(held_beside(out))
        count = sum(site.format is not None for site in plan)
        say(quiet, f"{said}, {count} of {len(plan)} sites quantized")
    if json_file is not None:
        sites = [{**vars(site), "format": None if site.format is None else site.format.name} for site in plan]
        about = run_metadata(spec=parsed.to_dict(), method=method, model=model, seed=seed)
        save_json(json_file, {"run": about, "plan": sites})


def _train(
    model: nn.Module,
    task: Task,
    spec: QuantSpec,
    recipe: Recipe,
    calibration: Any,
    seed: int,
    held: Path,
    quiet: bool,
) -> tuple[nn.Module, Training]:
    """Quantization-aware training as in a recipe, for one model and spec."""
    from s2d.commands.terminal import Watch
    from s2d.training.qat_loop import train_quantized

    assert recipe.qat is not None
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        watch.stage(f"training at {spec}", recipe.qat.steps)
        return train_quantized(
            model,
            task,
            spec,
            recipe.qat.training(recipe.train),
            recipe.qat.settings,
            calibration=calibration,
            seed=seed,
            decay=recipe.arms["s2d"] if recipe.qat.decay else None,
            state=held / "state.pt",
            on_step=lambda step, loss: watch.advance(step, f"loss {loss:.3g}"),
        )
