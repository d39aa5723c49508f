"""s2d quantize."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from s2d.commands.promises import METHOD, check_options, keep_promise
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
    command,
    save_json,
    say,
    settings,
)
from s2d.distributed import processes
from s2d.errors import InputError


@command(app, example="s2d quantize runs/conditioned --spec w4a4 --observer mse --out runs/w4a4", together=True)
def quantize(
    model: Model,
    spec: Annotated[
        str | None,
        typer.Option(
            help="Bits of weights and activations: w8a8, w4a4, w4a16, ..., or '{base: w4a4, attention: false}'. "
            "Default: w4a4, or the runtime's own with --for."
        ),
    ] = None,
    for_: ForRuntime = None,
    observer: Annotated[
        str | None, typer.Option(help="How ranges are chosen: minmax, percentile, percentile:99.99 or mse.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help='Average bits per weight, as "4.5 bits": each layer gets 3, 4, 6 or 8, by its measured error. Its '
            "input gets as many, unless --for names a runtime.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Quantization method, for example rotation+gptq. [bold]s2d doctor[/bold] lists them. auto: see below."
        ),
    ] = "rtn",
    within: Annotated[
        float | None, typer.Option(metavar="POINTS", help="With --method auto: what the file may lose of the metric.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="With --method auto: end after about so many.")] = None,
    fastest: Annotated[
        bool, typer.Option("--fastest/--smallest", help="With --method auto: what is wanted of the file.")
    ] = False,
    protocol: Annotated[
        str, typer.Option(help="own: each method chooses its ranges. unified: one rule for all methods.")
    ] = "own",
    prefix: Annotated[
        int,
        typer.Option(
            min=0, help="Number of first tokens of each text that stay in full precision and out of the ranges."
        ),
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Then train with the quantizers in place (QAT), this number of steps; needs --task."),
    ] = None,
    task: TaskName = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the quantized model.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that keeps finished blocks; the same command continues.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, with its size and time.")] = False,
    seed: Seed = 0,
    o: Overrides = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a model, calibrated on a little data; with --steps, train its weights and ranges on the grid.

    Calibration data: training examples of --task (128; -o quantize.calibration.samples=256), else the texts or images
    of --data, else docstrings of the standard library. --budget first measures each layer at every width, which takes
    minutes, and names the layers that make most of the error. Low bits are simulated in floating point; s2d.load and
    s2d evaluate read the folder. Under torchrun each process reads a share of the calibration data.

    --steps trains from where --method ends, with the loss of --task. The tasks unlabelled-text and unlabelled-images
    need no labels: their loss is the distance from the original model. Settings: -o qat.lr=2e-4, -o
    train.batch_size=32. An interrupted training continues with the same command.

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
    from s2d.commands.terminal import Watch
    from s2d.experiments.quantizing import Order, quantize_model
    from s2d.export.runtime import find_runtime
    from s2d.quant import QuantSpec
    from s2d.quant.modules.sites import described

    runtime = None if for_ is None else find_runtime(for_)
    parsed = QuantSpec.parse(spec or (runtime.spec if runtime is not None and runtime.spec else "w4a4"))
    if observer is not None:
        parsed = parsed.with_observer(observer)
    if prefix:
        parsed = replace(parsed, prefix=prefix)
    training = {} if steps is None else {"qat": {"steps": steps, "method": method}}
    recipe = settings(model, task, data, o, **training) if task is not None or o else None
    if steps is None and recipe is not None and recipe.qat is not None:
        raise InputError("qat is for training with the quantizers in place; add --steps")
    quiet = quiet or not processes.leads()
    check = None if runtime is None else runtime.refuse
    order = Order(model, parsed, method, protocol, seed, resume, budget, check, recipe, data, device, bars(quiet))
    with Watch(Console(stderr=True), quiet=quiet or steps is None) as watch:  # else the bars are those of quantize
        plan, run = quantize_model(order, None if dry_run else out, say=partial(say, quiet), watcher=watch)
    if json_file is not None and processes.leads():
        save_json(json_file, {"run": run, "plan": [described(site) for site in plan]})
