"""s2d export --calibration-set: the model in full precision for a compiler that quantizes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from s2d.commands.shared import check_file, check_folder, save_json, say, settings
from s2d.errors import InputError


def write_calibration_set(
    model: str,
    out: Path | None,
    *,
    runtime: str | None,
    shape: str | None,
    task: str | None,
    data: str | None,
    overrides: list[str] | None,
    samples: int,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Load, take examples of the training split (or what an audit takes), write the folder, say what is in it."""
    from s2d.export.conditioned import export_conditioned, find_compiler
    from s2d.export.fixed_shapes import parse_shape

    if runtime is None:
        raise InputError("which compiler is the set for? add --for any, or its name")
    compiler, sizes = find_compiler(runtime), parse_shape(shape)
    if out is None or out.suffix:
        raise InputError("a calibration set is a folder: add --out NAME, without a suffix")
    check_folder(out)
    check_file(json_file)
    from s2d.audit import audit_batches
    from s2d.checkpoint import load
    from s2d.commands.terminal import Watch
    from s2d.models.dual_encoder import DualEncoder
    from s2d.tasks import create
    from s2d.tasks.base import calibration_inputs
    from s2d.tasks.evaluation import model_for

    recipe = settings(model, task, data, overrides) if task is not None or overrides else None
    with Watch(Console(stderr=True), quiet=quiet) as watch:
        watch.stage(f"loading {model}", 1)
        loaded = load(model)
        plain, inputs = loaded.model, []
        if recipe is None:
            inputs = [batch for batch in audit_batches(loaded, data, num=samples) if isinstance(batch, dict)]
        else:
            made = create(recipe.task.name, **recipe.task.options)
            plain = model_for(loaded, made)
            inputs = calibration_inputs(made, samples, 16, seed=0)
        if isinstance(plain, DualEncoder):
            raise InputError(f"{model} has two towers, and a compiler takes one model; export its parts one by one")
        options: dict[str, Any] = {"tokenizer": loaded.tokenizer, "processor": loaded.processor}
        report = export_conditioned(
            plain,
            out,
            compiler=compiler,
            inputs=inputs,
            shape=sizes,
            notes=lambda text: watch.stage(text, 1),
            **options,
        )
    if json_file is not None:
        save_json(json_file, {"export": report.to_dict()})
    masks = "no mask to bound" if report.mask is None else f"masks bounded at {-report.mask:.0f}"
    say(quiet, f"{report.path}: full precision for {report.compiler}, opset {report.opset}, {masks}")
    say(quiet, f"{report.rows} examples to calibrate with; outputs within {report.outputs_moved:.1e} of torch's")
    for line in report.findings:
        say(quiet, line)
    say(quiet, f"next: the commands in {out / 'README.md'}")
