"""Drop-in use in the trainers that people already have, one file each; nothing is decided here.

Every adapter only delegates to :class:`s2d.SelectiveSpectralDecay`: it makes the decay when the trainer has made its
optimizer, keeps the decay's state beside the trainer's own checkpoints, shows a few numbers through the trainer's own
loggers, and takes the hooks out at the end.

- :mod:`s2d.integrations.huggingface`: ``transformers.Trainer``
- :mod:`s2d.integrations.lightning`: ``lightning.pytorch.Trainer``

accelerate and plain loops need no adapter: pass the optimizer (prepared or not) to the decay itself, and register the
decay with ``accelerator.register_for_checkpointing``.
"""

from __future__ import annotations

from s2d.decay import SelectiveSpectralDecay


def summary(decay: SelectiveSpectralDecay) -> dict[str, float]:
    """What a training log should show of a decay.

    Returns:
        ``s2d/shrinking``, how many components are being shrunk, and, from the first refresh on, ``s2d/outlier_ratio``,
        the largest activation over RMS that the last refresh saw.
    """
    shown = {"s2d/shrinking": float(sum(decay.selected.values()))}
    if decay.history:
        step = decay.history[-1]["step"]
        ratios = []
        for record in reversed(decay.history):
            if record["step"] != step:
                break
            ratios.append(record["outlier_ratio"])
        shown["s2d/outlier_ratio"] = float(max(ratios))
    return shown
