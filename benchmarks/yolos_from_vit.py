"""A YOLOS that starts from a trained vision transformer: its patches and blocks, new detection tokens and heads.

    python benchmarks/yolos_from_vit.py trained:vit-fashion new:yolos-fashion --out runs/yolos-start

That is how YOLOS itself is made (arXiv 2106.00666, section 3.1). Positions are the encoder's, resized to the larger
grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d.models import load, save_model
from s2d.models.image_heads import image_encoder

# What transformers calls the parts of a ViT, and those of a YOLOS.
NAMES = (
    ("layers.", "encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def resized(positions: Tensor, patches: int) -> Tensor:
    """Positions of another number of patches, both square, without that of the class token ``[1, patches, width]``."""
    edge, new = (round(count**0.5) for count in (positions.shape[1] - 1, patches))
    grid = positions[:, 1:].unflatten(1, (edge, edge)).permute(0, 3, 1, 2)
    return F.interpolate(grid, (new, new), mode="bicubic").flatten(2).transpose(1, 2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("encoder")
    parser.add_argument("detector")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    loaded = load(arguments.detector)
    own = loaded.model.vit.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    taken = 0
    for name, tensor in image_encoder(load(arguments.encoder).model).state_dict().items():
        for old, new in NAMES:
            name = name.replace(old, new)
        if name in own and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
            taken += 1
        elif name.endswith("position_embeddings"):
            tokens = loaded.model.config.num_detection_tokens
            patches = own[name].shape[1] - 1 - tokens
            own[name][:, :1].copy_(tensor[:, :1])
            own[name][:, 1 : 1 + patches].copy_(resized(tensor, patches))
    save_model(loaded.model, arguments.out, processor=loaded.processor)
    print(f"{arguments.out}: {taken} of {len(own)} tensors are those of {arguments.encoder}")


if __name__ == "__main__":
    main()
