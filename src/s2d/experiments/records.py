"""The records of a run, and the names of its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2d.experiments.recipe import Cell, Recipe
from s2d.io.files import JSON
from s2d.io.provenance import digest
from s2d.quant import QuantSpec
from s2d.tasks import Task


def records_of(
    recipe: Recipe,
    task: Task,
    arm: str,
    seed: int,
    spec: str | dict[str, Any],
    method: str,
    observer: str,
    cell: JSON,
) -> list[JSON]:
    """The records of one finished cell, one for each metric, the task's own first.

    Args:
        recipe, task: The recipe and the task of the run.
        arm, seed: How the model was trained, and from which seed.
        spec, method, observer: How it was quantized; ``"none"`` where no method was.
        cell: ``metrics`` by name, ``seconds`` and ``peak_mb``.
    """
    return [
        {
            "task": recipe.task.label,
            "model": recipe.model,
            "conditioning": arm,
            "seed": seed,
            "spec": spec_name(spec),
            "method": method,
            "observer": observer,
            "metric": metric,
            "value": float("nan") if value is None else value,
            "higher_is_better": task.prefers_higher(metric),
            "seconds": cell["seconds"],
            "peak_mb": cell["peak_mb"],
            "split": recipe.split,
        }
        for metric, value in sorted(cell["metrics"].items(), key=lambda item: item[0] != task.primary)
    ]


def spec_name(spec: str | dict[str, Any]) -> str:
    """A spec as it stands in tables and file names: its short text, or bits and a digest of the full form."""
    short = isinstance(spec, str) and "{" not in spec
    return str(spec) if short else f"{QuantSpec.parse(spec)}-{digest(spec)[:4]}"


def cell_name(cell: Cell) -> str:
    """For people: ``w4a4 gptq``, ``w4a4 mse``."""
    method = "" if cell.method == "rtn" and cell.observer else cell.method
    return " ".join(part for part in (spec_name(cell.spec), method, cell.observer) if part)


def shown_path(path: Path) -> str:
    """A path as people type it from the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
