"""A fine-tuning as a program, for torchrun: ``train_job.py FOLDER DECAY [kill]``.

FOLDER holds a model and data of `tests.tiny_text`. With ``kill`` the last process ends itself by SIGKILL in its fourth
step, once. The first process writes what became of the model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from s2d.distributed import processes
from s2d.io.files import write_json
from s2d.models import load
from s2d.tasks import create
from s2d.training.loop import train
from s2d.training.train_settings import TrainSettings

DECAYS = {
    "default": {"refresh_every": 3, "outlier_ratio": 1.5, "threshold": 0.1},
    "paper": {"preset": "paper", "refresh_every": 3, "threshold": 0.1},
}


def main(folder: Path, decay: str, kill: bool) -> None:
    torch.set_num_threads(1)
    loaded = load(folder / "bert")
    task = create("text-classification", data=folder / "words", max_length=24)
    task.prepare(loaded)
    model = task.build(loaded, 0)
    out = folder / f"{decay}-{processes.count()}{'-killed' if kill else ''}"
    last = processes.count() > 1 and int(os.environ["RANK"]) == processes.count() - 1
    if kill and last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        whole, steps = task.loss, iter(range(100))

        def loss(*given: object) -> torch.Tensor:
            if next(steps) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*given)  # type: ignore[arg-type]

        task.loss = loss  # type: ignore[method-assign]
    settings = TrainSettings(steps=8, batch_size=8, lr=1e-3, head_lr=1e-2, save_every=0)
    state = out.with_suffix(".state")
    found = [0] if not state.exists() else [torch.load(state, weights_only=True)["step"]]
    done = train(model, task, settings, decay=DECAYS[decay], state=state)
    processes.part()
    if processes.leads():
        torch.save(model.state_dict(), out.with_suffix(".pt"))
        selected = [[record["weight"], record["selected"]] for record in done.history]
        write_json(out.with_suffix(".json"), {"losses": done.losses, "selected": selected, "continued_from": found[0]})
        print(json.dumps({"steps": done.steps, "continued_from": found[0]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "kill" in sys.argv)
