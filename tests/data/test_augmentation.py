"""Random changes of training images: which they are, and the same on one process and on several."""

from __future__ import annotations

import pytest
import torch

from s2d.data.augmentation import augment


def test_each_image_is_mirrored_and_shifted_and_keeps_its_own_values() -> None:
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16) * 1000 + torch.arange(16.0)
    torch.manual_seed(0)
    changed = augment(pixels)
    assert changed.shape == pixels.shape
    assert ((changed // 1000) == torch.arange(4.0).view(4, 1, 1, 1)).all()
    rows = changed[:, 0, 0] % 1000
    assert {bool(row[8] > row[7]) for row in rows} == {True, False}, "some are mirrored, some are not"
    assert ((rows[:, 1:] - rows[:, :-1]).abs() <= 1).all()


def test_processes_change_their_shares_as_one_changes_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    whole, after = augment(pixels), torch.rand(())
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, share in enumerate(pixels.chunk(3)):
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(0)
        assert torch.equal(augment(share), whole.chunk(3)[rank])
        assert torch.rand(()) == after, "the generators stay together"
