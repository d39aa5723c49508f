"""The decay in torch's distributed checkpoints: saved on one number of ranks, continued on any other.

    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "decay": DecayState(decay)}, checkpoint_id=folder)

    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments, "decay": DecayState(decay)}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

The state of a decay (triplets, directions, the selection) is complete and equal on every rank, however the weights are
divided. So the number of ranks does not matter. Its keys change at every refresh, and a checkpoint that is loaded in
place needs fixed keys, so the state is stored as one value.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from s2d.decay.spectral_decay import SelectiveSpectralDecay


class DecayState:
    """A ``Stateful`` of ``torch.distributed.checkpoint`` around a decay."""

    def __init__(self, decay: SelectiveSpectralDecay) -> None:
        """Wrap the decay of this rank."""
        self._decay = decay

    def state_dict(self) -> dict[str, Any]:
        """The decay's state as bytes."""
        buffer = io.BytesIO()
        torch.save(self._decay.state_dict(), buffer)
        return {"state": buffer.getvalue()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; nothing in it can run code."""
        self._decay.load_state_dict(torch.load(io.BytesIO(state["state"]), map_location="cpu", weights_only=True))
