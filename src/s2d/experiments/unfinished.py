"""The folder beside a model's folder in which a training keeps its state until the model is saved."""

from __future__ import annotations

import contextlib
from pathlib import Path

from s2d.io.files import sweep
from s2d.quant.calibration.resume import Store


def held_beside(out: Path) -> Path:
    """The folder for the model that will be at `out`."""
    return out.with_name(f"{out.name}.training")


def clear(held: Path) -> None:
    """Remove the saved state of a training, and no other files."""
    sweep(held, age=0.0)  # left by a run that was killed while it saved
    (held / "state.pt").unlink(missing_ok=True)
    Store.discard(held / "blocks")
    with contextlib.suppress(OSError):
        held.rmdir()
