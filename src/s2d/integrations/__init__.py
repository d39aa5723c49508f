"""Adapters for other trainers, one file each; they only delegate.

Every adapter only delegates to `s2d.SelectiveSpectralDecay`: it makes the decay when the trainer has made its
optimizer, keeps the decay's state beside the trainer's own checkpoints, shows a few numbers through the trainer's own
loggers, and takes the hooks out at the end.

- `s2d.integrations.huggingface`: ``transformers.Trainer``
- `s2d.integrations.lightning`: ``lightning.pytorch.Trainer``

accelerate and plain loops need no adapter: pass the optimizer (prepared or not) to the decay itself, and register the
decay with ``accelerator.register_for_checkpointing``.
"""

from __future__ import annotations

from typing import Any

from s2d.decay.spectral_decay import SelectiveSpectralDecay


class Conditioning:
    """The base of every adapter: it keeps settings until the trainer has an optimizer, then a decay, and removes the
    hooks at the end.

    Attributes:
        settings: Keywords of `s2d.SelectiveSpectralDecay`.
        decay: From the beginning of the training on; its history stays when the training is over.
    """

    def __init__(self, **settings: Any) -> None:
        """Store the settings of the decay.

        Args:
            settings: Keywords of `s2d.SelectiveSpectralDecay`.
        """
        self.settings = settings
        self.decay: SelectiveSpectralDecay | None = None

    def _attach(self, model: Any, optimizer: Any, state: dict[str, Any] | None, steps: int | None) -> None:
        """Begin a run of ``steps``, or continue from the state of an earlier one, in place of what was attached."""
        self._remove()
        self.decay = SelectiveSpectralDecay(model, optimizer, **{"total_steps": steps, **self.settings})
        if state is not None:
            self.decay.load_state_dict(state)

    def _remove(self) -> None:
        """Take the hooks out."""
        if self.decay is not None:
            self.decay.remove()


def summary(decay: SelectiveSpectralDecay) -> dict[str, float]:
    """The numbers of a decay for a training log.

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
