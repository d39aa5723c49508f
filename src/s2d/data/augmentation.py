"""Random augmentation of training images that keeps their meaning: mirroring and shifting."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d.distributed import processes

_SHIFT = 8  # images are shifted by up to one eighth of their edge


def augment(pixels: Tensor) -> Tensor:
    """Mirror each image with probability one half and shift it by up to 1/8 of its edge, filling with its border.

    The usual augmentation of CIFAR-10 (He et al. 2015, section 4.2). Draws from torch's global random state.
    With several processes, each draws for the whole batch and takes its own part. So the changes differ between
    processes, and each image changes as it would in one process.

    Args:
        pixels: `[batch, 3, height, width]`, any type; this process's share, of equal size in all.

    Returns:
        The same shape and type.
    """
    batch, _, height, width = pixels.shape
    most = max(1, min(height, width) // _SHIFT)
    everywhere, mine = batch * processes.count(), slice(batch * processes.rank(), batch * (processes.rank() + 1))
    mirrored = torch.where((torch.rand(everywhere, 1, 1, 1)[mine] < 0.5).to(pixels.device), pixels.flip(-1), pixels)
    padded = F.pad(mirrored.float(), (most,) * 4, mode="replicate").to(pixels.dtype)
    down, right = torch.randint(0, 2 * most + 1, (2, everywhere))[:, mine].to(pixels.device)
    rows = down.view(-1, 1) + torch.arange(height, device=pixels.device)
    columns = right.view(-1, 1) + torch.arange(width, device=pixels.device)
    which = torch.arange(batch, device=pixels.device).view(-1, 1, 1)
    return padded[which, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
