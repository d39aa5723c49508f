"""Conditioning inside ``transformers.Trainer``.

    callback = attach(trainer)          # the library's defaults; or attach(trainer, preset="paper"), ...
    trainer.train()

or, without the numbers in TensorBoard and its like, ``Trainer(..., callbacks=[SpectralDecayCallback()])``: the trainer
puts its own reporters before the callbacks passed to it, so they have written before these run.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from s2d.errors import InputError
from s2d.integrations import Conditioning, summary
from s2d.io.files import write_atomic
from s2d.optional import require

transformers = require("transformers", "hf")

STATE_FILE = "s2d_decay.pt"


class SpectralDecayCallback(Conditioning, transformers.TrainerCallback):
    """Delegates to `s2d.SelectiveSpectralDecay`; its state is ``s2d_decay.pt`` in every checkpoint."""

    resumed_from: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer exists: attach to it, and continue where a resumed training stopped.

        Raises:
            InputError: The checkpoint that the trainer resumes from has no state of a decay, or that of another.
        """
        known = _read_state(args, self.resumed_from, state.global_step) if state.global_step else None
        self._attach(kwargs["model"], kwargs["optimizer"], known, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state into the checkpoint that the trainer has just written."""
        if self.decay is None or not state.is_world_process_zero:
            return
        content = self.decay.state_dict()
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE
        write_atomic(place, lambda file: torch.save(content, file))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the numbers of the decay to the trainer's logs."""
        if logs is not None and self.decay is not None and "loss" in logs:
            logs.update(summary(self.decay))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks out."""
        self._remove()


def attach(trainer: Any, **settings: Any) -> SpectralDecayCallback:
    """Condition the model while this trainer runs, with the decay's numbers in its logs.

    Args:
        trainer: A ``transformers.Trainer``, before ``train()``.
        settings: Keywords of `s2d.SelectiveSpectralDecay`.

    Raises:
        InputError: `trainer` is not a ``transformers.Trainer``.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise InputError(f"trainer is {type(trainer).__name__}; pass the transformers.Trainer that will train")
    callback = SpectralDecayCallback(**settings)
    plain = trainer.train

    @functools.wraps(plain)
    def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        callback.resumed_from = resume_from_checkpoint  # callbacks are not told, and it may be in another folder
        return plain(resume_from_checkpoint, *args, **kwargs)

    trainer.train = train
    trainer.callback_handler.callbacks.insert(0, callback)  # before the reporters, which then see its numbers
    return callback


def _read_state(args: Any, resumed_from: Any, step: int) -> dict[str, Any]:
    """The state beside the checkpoint of so many steps: where the trainer resumes from, or in its own folder."""
    named = (resumed_from, args.resume_from_checkpoint)
    places = [Path(each) for each in named if isinstance(each, str | os.PathLike)]
    places.append(Path(args.output_dir) / f"checkpoint-{step}")
    for place in places:
        if (place / STATE_FILE).is_file():
            return torch.load(place / STATE_FILE, map_location="cpu", weights_only=True)
    raise InputError(
        f"the training is resumed at step {step}, but there is no {STATE_FILE} in {places[0]}; resume from a "
        "checkpoint written with this callback, or begin anew; from another folder use attach(trainer)"
    )
