"""s2d quantize."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from s2d.commands.shared import (
    Data,
    Device,
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
    command,
    refuse_too_little,
    save_json,
    say,
    settings,
)
from s2d.errors import InputError


@command(app, example="s2d quantize runs/conditioned --spec w4a4 --observer mse --out runs/w4a4", together=True)
def quantize(
    model: Model,
    spec: Annotated[str, typer.Option(help="Bits of weights and activations: w8a8, w4a4, w4a16, ...")] = "w4a4",
    observer: Annotated[str | None, typer.Option(help="minmax, percentile, percentile:99.99 or mse.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help='Bits a weight may have on average, as "4.5 bits": layers get 3, 4, 6 or 8, by measurement.',
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="How, for example rotation+gptq: see [bold]s2d doctor[/bold].")] = "rtn",
    protocol: Annotated[str, typer.Option(help="Ranges: each method's own, or one rule for all (unified).")] = "own",
    prefix: Annotated[
        int, typer.Option(min=0, help="First tokens of a text that stay at full precision, and out of the ranges.")
    ] = 0,
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
    """Quantize a model after training, calibrated on a little data.

    With --task, calibration uses training examples of it (128; -o quantize.calibration.samples=256); otherwise the
    texts or images of --data, or docstrings of the standard library. With --budget each layer is first measured at
    every width (minutes), and the layers that make most of the error are named. Low bits are simulated in floating
    point; s2d.load and s2d evaluate read the folder. Under torchrun each process reads a share of the calibration data.
    """
    if out is None and not dry_run:
        raise InputError("where should the quantized model go? add --out FOLDER, or --dry-run to see the plan only")
    check_folder(out)
    check_file(json_file)
    from s2d import launch, quant
    from s2d.audit import audit_batches
    from s2d.checkpoint import load, save
    from s2d.evaluation import model_for
    from s2d.quant import QuantSpec
    from s2d.quant.allocate import CHOICES, affordable, sensitivity
    from s2d.results import run_metadata
    from s2d.runner import calibration_inputs, device_of
    from s2d.tasks import create

    parsed = QuantSpec.parse(spec) if observer is None else QuantSpec.parse(spec).with_observer(observer)
    if prefix:
        parsed = replace(parsed, prefix=prefix)
    entries = quant.get_methods(method)
    if launch.count() > 1:
        quant.refuse_undivided(entries)
        if budget is not None or dry_run:
            raise InputError("--budget and --dry-run work in one process; start them without torchrun")
        quiet = quiet or not launch.leads()
        launch.meet(device_of(device) == "cpu")
    bits = None if budget is None else affordable(budget, CHOICES)  # before the model is loaded
    recipe = settings(model, task, data, o) if task is not None or o else None
    made = None if recipe is None else create(recipe.task.name, **recipe.task.options)
    refuse_too_little(f"quantizing {model}", model, device_of(device))
    loaded = load(model, device=device_of(device))
    plain = loaded.model if made is None else model_for(loaded, made)
    plan = quant.plan(plain, parsed)
    inputs: Any = None
    try:
        if recipe is None or made is None:
            inputs = audit_batches(loaded, data)
        else:
            inputs = calibration_inputs(made, recipe.quantize.calibration, seed)
    except InputError:
        if not dry_run or bits is not None:  # a plan needs no data; its time is then left out
            raise
    if launch.count() > 1:
        inputs = list(inputs)
        if len(inputs) < launch.count():
            raise InputError(
                f"{len(inputs)} calibration batches cannot be shared by {launch.count()} processes; use more data, or "
                "smaller batches (-o quantize.calibration.batch_size=8)"
            )
        inputs = inputs[launch.rank() :: launch.count()]
    if bits is not None:
        found = sensitivity(plain, calibration=inputs, base=parsed, progress=bars(quiet))
        parsed = found.allocate(bits)
        plan = quant.plan(plain, parsed)
        say(quiet, found.explain(parsed))
    if dry_run:
        say(quiet, f"{quant.describe(plan)}\n\n{quant.estimate(plain, plan, method, inputs)}")
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
            shared=launch.count() > 1,
            progress=bars(quiet),
        )
        launch.part()
        if not launch.leads():
            return  # the first process writes
        assert out is not None
        notes = {**loaded.notes, "quantized": {"model": model}}
        save(quantized, out, tokenizer=loaded.tokenizer, processor=loaded.processor, notes=notes)
        count = sum(site.format is not None for site in plan)
        say(quiet, f"{out}: {model} at {parsed}, {count} of {len(plan)} sites quantized")
    if json_file is not None:
        sites = [{**vars(site), "format": None if site.format is None else site.format.name} for site in plan]
        about = run_metadata(spec=parsed.to_dict(), method=method, model=model, seed=seed)
        save_json(json_file, {"run": about, "plan": sites})
