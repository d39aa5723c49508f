"""The Trainer of transformers itself: the callback trains what the plain loop trains, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from s2d.errors import InputError  # noqa: E402
from s2d.integrations.huggingface import STATE_FILE, SpectralDecayCallback, attach  # noqa: E402


class Regressor(nn.Module):
    """A norm with an outlier channel before two linear layers, and the loss in its output, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(64), nn.Linear(64, 16), nn.Linear(16, 4)
        self.norm.weight.data[3] = 40.0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(x))))
        return {"loss": torch.nn.functional.mse_loss(y, labels), "logits": y}


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": (x := torch.randn(64, generator=generator)), "labels": x[:4]} for _ in range(64)]


def trainer(folder: Path, steps: int = 12, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=options.pop("report_to", "none"),
        logging_steps=1,
        save_steps=6,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    return transformers.Trainer(model=Regressor(), args=arguments, train_dataset=rows())


def gain(model: nn.Module) -> float:
    return float(model.norm.weight.detach().abs().max())  # type: ignore[operator, union-attr]


def test_the_outlier_is_shrunk_and_no_hook_is_left(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", save_strategy="no")
    plain.train()
    conditioned = trainer(tmp_path / "s2d", save_strategy="no")
    callback = attach(conditioned, strength=0.2, refresh_every=1)
    conditioned.train()
    assert gain(plain.model) > 39 and gain(conditioned.model) < 20
    assert callback.decay is not None and callback.decay.step_count == 12 and callback.decay.history
    assert not conditioned.model.norm._forward_hooks
    before = conditioned.model.norm.weight.detach().clone()
    conditioned.model.norm.weight.grad = torch.zeros_like(before)
    optimizer = torch.optim.SGD(conditioned.model.parameters(), lr=1.0)
    optimizer.step()
    assert torch.equal(conditioned.model.norm.weight, before)


def test_gradients_are_accumulated_and_steps_are_the_optimizers(tmp_path: Path) -> None:
    accumulating = trainer(tmp_path, steps=5, save_strategy="no", gradient_accumulation_steps=3)
    callback = attach(accumulating)
    accumulating.train()
    assert callback.decay is not None and callback.decay.step_count == 5


def test_the_numbers_reach_the_trainers_own_loggers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = trainer(tmp_path, save_strategy="no", report_to="tensorboard")
    attach(logged, refresh_every=1)
    logged.train()
    tags: set[str] = set()
    for path in tmp_path.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    assert any("s2d/outlier_ratio" in tag for tag in tags) and any("s2d/shrinking" in tag for tag in tags)


@pytest.mark.parametrize("refresh_every", [1, 4])
def test_a_resumed_training_ends_bit_identical(tmp_path: Path, refresh_every: int) -> None:
    whole = trainer(tmp_path / "whole")
    attach(whole, strength=0.2, refresh_every=refresh_every)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-6" / STATE_FILE).is_file()

    rest = trainer(tmp_path / "whole")
    callback = attach(rest, strength=0.2, refresh_every=refresh_every)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert callback.decay is not None and callback.decay.step_count == 12
    for mine, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_without_the_decays_state_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    rest = trainer(tmp_path)
    rest.add_callback(SpectralDecayCallback())
    with pytest.raises(InputError, match="s2d_decay.pt"):
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_something_else_than_a_trainer_is_refused() -> None:
    with pytest.raises(InputError, match="Regressor"):
        attach(Regressor())
