"""SigLIP and SigLIP2 of the transformers library.

Their image tower has no class token: a pooling head with one learned query attends to all tokens. Its attention is an
`nn.MultiheadAttention` with one fused ``in_proj_weight``, found as ``qkv``.
"""

from s2d.models.families.clip import TOWER_ROLES
from s2d.models.family import Family, register_family

SIGLIP = register_family(
    Family(
        name="siglip",
        modality="multimodal",
        norm_position="pre",
        models=(r".*\.Siglip2?(Model|VisionModel|TextModel|VisionTransformer|TextTransformer|For\w+)",),
        roles=(
            (r"head\.attention$", "qkv"),
            (r"head\.attention\.out_proj$", "proj"),
            (r"head\.layernorm$", "norm2"),
        )
        + TOWER_ROLES
        + ((r"text_model\.head$", "head"),),
        block=r"(^|\.)encoder\.layers\.\d+$",
    )
)
