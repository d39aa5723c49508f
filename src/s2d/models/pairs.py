"""An image encoder and a frozen text encoder in one space: ``pair:IMAGE+TEXT``, trained as SigLIP is.

The text tower is frozen and the image tower is trained to match it: locked tuning (LiT, arXiv 2111.07991, with the
other tower locked) under the pairwise sigmoid loss (SigLIP, arXiv 2303.15343). IMAGE and TEXT are anything that
`s2d.load` takes; a head on the image encoder is left out. The text vector is the mean over real tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.families.bert import BERT
from s2d.models.families.vit import VIT
from s2d.models.family import Family, register_family, register_loader
from s2d.models.heads import SentenceEncoder, encoder_of, hidden_width
from s2d.models.image_heads import feature_width, image_encoder, image_features
from s2d.models.saved import describe, rebuild, register_architecture

# SigLIP's own start, section 3.2: scores of -10 and a temperature of 10, since nearly all pairs are wrong ones.
_SCALE, _BIAS = math.log(10.0), -10.0


class ImageTextPair(nn.Module):
    """Two towers behind the methods that CLIP and SigLIP of transformers have.

    Args:
        image: An image encoder; its pooled features go through a new linear layer.
        text: A text encoder of the transformers kind; it is frozen.
        seed: For the new layer's random start; the global random state is not touched.
    """

    reads_masks = True  # its texts are padded to the longest, not to a fixed length as SigLIP's

    def __init__(self, image: nn.Module, text: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.image, self.text = image, SentenceEncoder(text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image_projection = nn.Linear(feature_width(image), hidden_width(text))
        self.logit_scale = nn.Parameter(torch.tensor(_SCALE))
        self.logit_bias = nn.Parameter(torch.tensor(_BIAS))
        self.text.requires_grad_(False)

    @property
    def text_positions(self) -> int:
        """Most tokens of a text."""
        config: Any = self.text.encoder.config
        return int(config.max_position_embeddings)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`[images, 3, height, width]` to `[images, width]`."""
        return self.image_projection(image_features(self.image, pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[texts, tokens]` to `[texts, width]`."""
        return self.text(input_ids, attention_mask)


@register_loader("pair")
def load_pair(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    """The pair, the text tower's tokenizer and the image tower's preprocessing."""
    from s2d.models.loading import load  # which imports every loader

    image, plus, text = name.rpartition("+")
    if not plus or not image or not text:
        raise InputError(f"pair:{name}: write pair:IMAGE+TEXT, two models that s2d can load")
    images, texts = load(image, **options), load(text, **options)
    if texts.tokenizer is None:
        raise InputError(f"pair:{name}: {text} comes without a tokenizer; name a text encoder")
    pair = ImageTextPair(image_encoder(images.model), encoder_of(texts.model))
    return pair, texts.tokenizer, images.processor


register_family(
    Family(
        name="pair",
        modality="multimodal",
        norm_position="pre",
        models=(r"s2d\.models\.pairs\.ImageTextPair",),
        roles=((r"(^|\.)image_projection$", "head"), *VIT.roles, *BERT.roles),
        block=rf"(^|\.)image\..*{VIT.block}|(^|\.)text\..*{BERT.block}",
    )
)
register_architecture(
    "image-text-pair",
    matches=lambda model: isinstance(model, ImageTextPair),
    describe=lambda model: {"image": describe(model.image), "text": describe(model.text.encoder)},
    rebuild=lambda description: ImageTextPair(rebuild(description["image"]), rebuild(description["text"])),
)
