"""CLIP of the transformers library: two pre-norm towers; the image tower has a norm before its first block too."""

from s2d.models.family import Family, register_family

# SigLIP's towers are named alike, so its family builds on these.
TOWER_ROLES: tuple[tuple[str, str], ...] = (
    (r"embeddings\.(token|position)_embedding$", "embedding"),
    (r"embeddings\.patch_embedding$", "patch_embed"),
    (r"self_attn\.q_proj$", "q"),
    (r"self_attn\.k_proj$", "k"),
    (r"self_attn\.v_proj$", "v"),
    (r"self_attn\.out_proj$", "proj"),
    (r"layer_norm1$", "norm1"),
    (r"layer_norm2$", "norm2"),
    (r"mlp\.fc1$", "fc1"),
    (r"mlp\.activation_fn$", "activation"),
    (r"mlp\.fc2$", "fc2"),
    (r"(final_layer_norm|post_layernorm)$", "norm_final"),
)

CLIP = register_family(
    Family(
        name="clip",
        modality="multimodal",
        norm_position="pre",
        models=(r".*\.CLIP(Model|VisionModel|TextModel|VisionTransformer|TextTransformer|\w+WithProjection|For\w+)",),
        roles=TOWER_ROLES
        + (
            (r"pre_layrnorm$", "norm_embed"),  # spelt so in the checkpoints
            (r"(visual|text)_projection$", "head"),
        ),
        block=r"(^|\.)encoder\.layers\.\d+$",
    )
)
