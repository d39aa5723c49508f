"""LLaVA-type models of the transformers library: an image tower, a projector of two Linears, a Llama-type decoder.

The projector has no role and is in no numbered block, so quantization leaves it at full precision and says so.
"""

from s2d.models.families.clip import TOWER_ROLES
from s2d.models.families.llama import LLAMA
from s2d.models.families.vit import VIT
from s2d.models.family import Family, register_family

LLAVA = register_family(
    Family(
        name="llava",
        modality="multimodal",
        norm_position="pre",
        models=(r".*\.(Llava|VipLlava)(Model|ForConditionalGeneration)",),
        roles=TOWER_ROLES + LLAMA.roles + VIT.roles + ((r"pre_layrnorm$", "norm_embed"),),
        block=r"(^|\.)layers?\.\d+$",
    )
)
