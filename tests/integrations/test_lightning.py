"""Lightning's Trainer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytorch = pytest.importorskip("lightning.pytorch", reason='lightning is not installed: pip install "s2d[lightning]"')

from s2d.integrations.lightning import SpectralDecay  # noqa: E402


class Module(pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(64), nn.Linear(64, 16), nn.Linear(16, 4)
        self.norm.weight.data[3] = 40.0

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        y = self.fc2(torch.nn.functional.gelu(self.fc1(self.norm(batch))))
        return torch.nn.functional.mse_loss(y, batch[:, :4])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data() -> Any:
    rows = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


def fit(folder: Path, epochs: int, callback: Any, resume: str | None = None, logger: Any = False) -> Any:
    trainer = pytorch.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )
    module = Module()
    trainer.fit(module, data(), ckpt_path=resume)
    return trainer, module


def test_the_outlier_is_shrunk_and_no_hook_is_left(tmp_path: Path) -> None:
    callback = SpectralDecay(strength=0.2, refresh_every=1)
    _, module = fit(tmp_path, 2, callback)
    assert module.norm.weight.abs().max() < 20
    assert callback.decay is not None and callback.decay.step_count == 16
    assert not module.norm._forward_hooks


def test_the_numbers_reach_lightnings_own_logger(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    fit(tmp_path, 1, SpectralDecay(refresh_every=1), logger=CSVLogger(tmp_path))
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "s2d/outlier_ratio" in text and "s2d/shrinking" in text


def test_a_resumed_fit_ends_bit_identical(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, 4, SpectralDecay(strength=0.2, refresh_every=3))
    trainer, _ = fit(tmp_path, 2, SpectralDecay(strength=0.2, refresh_every=3))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    callback = SpectralDecay(strength=0.2, refresh_every=3)
    _, rest = fit(tmp_path, 4, callback, resume=str(tmp_path / "half.ckpt"))
    assert callback.decay is not None and callback.decay.step_count == 32
    for mine, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
