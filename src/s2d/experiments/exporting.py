"""One quantized model written for a runtime: loaded, checked against what the runtime takes, exported, compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2d import quant
from s2d.audit import audit_batches
from s2d.checkpoint import load
from s2d.errors import InputError
from s2d.experiments.recipe import Recipe
from s2d.export import RUNNABLE, ExportReport, example_of, export
from s2d.export.operators import FORMS, Form
from s2d.export.runtime import Runtime, device_of, sizes_for
from s2d.export.towers import export_towers
from s2d.models.dual_encoder import DualEncoder
from s2d.models.saved import save_parts
from s2d.quant.modules.sites import is_quantized
from s2d.tasks import Split, create
from s2d.tasks.evaluation import model_for


@dataclass(frozen=True)
class ExportOrder:
    """A quantized model to export, and the settings.

    Attributes:
        model: As `s2d.load` takes it.
        recipe: Its task gives the example inputs and the metric that is compared.
        data: Texts or images for the example, without a task.
        runtime: Refuses a model, a file or sizes that it does not take.
        embeddings, split, time_it, force: As for `s2d.export.export`.
        form: Operators of ONNX; None for those that the runtime reads.
        shape: Sizes that the file fixes.
        provider: The device whose nodes are listed.
        fallback: Accept nodes that run elsewhere.
    """

    model: str
    recipe: Recipe | None = None
    data: str | None = None
    runtime: Runtime | None = None
    embeddings: int | None = None
    form: Form | None = None
    shape: dict[str, int] = field(default_factory=dict)
    provider: str | None = None
    fallback: bool = True
    split: Split = "validation"
    time_it: bool = True
    force: bool = False


def export_model(
    order: ExportOrder, out: Path, *, notes: Callable[[str], None] = lambda text: None
) -> list[ExportReport]:
    """Load a quantized model and write it, with its tokenizer or image processor beside files that s2d runs.

    Args:
        order: The model and the settings.
        out: The file or folder to make.
        notes: Receives progress messages.

    Returns:
        The reports of the files: one, or two for a model with an image and a text tower.

    Raises:
        InputError: The model is not quantized, the runtime does not take it, or the file does not compute the same.
    """
    runtime, sizes, device = order.runtime, order.shape, order.provider
    if runtime is not None:
        runtime.check_file(out)
        device, sizes = device or device_of(runtime, out, not order.fallback), sizes_for(runtime, out, sizes)
    notes(f"loading {order.model}")
    loaded = load(order.model)
    if not is_quantized(loaded.model):
        raise InputError(f"{order.model} is not quantized; first: s2d quantize {order.model} --spec w4a4 --out FOLDER")
    if runtime is not None:
        runtime.refuse(quant.record(loaded.model).sites)
    task = None if order.recipe is None else create(order.recipe.task.name, **order.recipe.task.options)
    inputs: Any
    if task is None:
        inputs = audit_batches(loaded, order.data)
    else:
        built = model_for(loaded, task)
        # A model that was saved for this task is whole; else the task's parts are put on the quantized encoder.
        loaded.model = loaded.model if type(loaded.model) is type(built) else built
        del built  # the memory of the model that is not exported
        inputs = (each for batch in task.batches("train", batch_size=16) for each in task.inputs(batch))
    options: dict[str, Any] = {
        "example": example_of(inputs),
        "embeddings": order.embeddings,
        "form": order.form or (runtime.form if runtime is not None and out.suffix == ".onnx" else FORMS[0]),
        "shape": sizes,
        "provider": device,
        "fallback": order.fallback,
        "task": task,
        "split": order.split,
        "time_it": order.time_it,
        "force": order.force,
        "notes": notes,
    }
    if isinstance(loaded.model, DualEncoder):
        reports = list(export_towers(loaded.model, out, **options).values())
    else:
        reports = [export(loaded.model, out, tokenizer=loaded.tokenizer, **options)]
    if out.suffix in RUNNABLE:
        save_parts(out.with_suffix(".inputs"), loaded.tokenizer, loaded.processor)
    return reports
