"""Conditioning inside ``lightning.pytorch.Trainer``.

trainer = lightning.pytorch.Trainer(callbacks=[SpectralDecay()])
"""

from __future__ import annotations

from typing import Any

from s2d.integrations import Conditioning, summary
from s2d.optional import require

pytorch = require("lightning.pytorch", "lightning")


class SpectralDecay(Conditioning, pytorch.Callback):
    """Delegates to `s2d.SelectiveSpectralDecay`; its state is part of Lightning's checkpoints."""

    def __init__(self, **settings: Any) -> None:
        """Store the settings; the keywords are those of `s2d.SelectiveSpectralDecay`."""
        super().__init__(**settings)
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The optimizers exist: attach to them, and continue where a resumed fit stopped."""
        steps = trainer.estimated_stepping_batches  # inf for a training without an end
        self._attach(pl_module, trainer.optimizers, self._restored, steps if isinstance(steps, int) else None)
        self._restored = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the numbers of the decay through the module's own logger."""
        if self.decay is not None:
            self.log_dict(summary(self.decay))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks out."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks after a failed fit too."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The decay's state; empty before the first fit."""
        return {} if self.decay is None else self.decay.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning restores callbacks before there are optimizers: kept until the fit begins."""
        self._restored = state_dict or None
