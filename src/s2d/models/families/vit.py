"""Vision transformers of the transformers library: ViT, DeiT, DINOv2 (with registers), DINOv3, YOLOS.

Two generations of module names are covered: ``layers.N.attention.q_proj`` and, before transformers 5,
``encoder.layer.N.attention.attention.query``.
"""

from s2d.models.family import Family, register_family

VIT = register_family(
    Family(
        name="vit",
        modality="vision",
        norm_position="pre",
        models=(r".*\.(ViT|DeiT|Dinov2|Dinov2WithRegisters|DINOv3ViT|Yolos)(Model|For\w+)",),
        roles=(
            (r"patch_embeddings(\.projection)?$", "patch_embed"),
            (r"attention\.(attention\.)?(query|q_proj)$", "q"),
            (r"attention\.(attention\.)?(key|k_proj)$", "k"),
            (r"attention\.(attention\.)?(value|v_proj)$", "v"),
            (r"attention\.(output\.dense|o_proj)$", "proj"),
            (r"(layernorm_before|norm1)$", "norm1"),
            (r"(layernorm_after|norm2)$", "norm2"),
            (r"mlp\.gate_proj$", "gate"),
            (r"(mlp\.(fc1|up_proj|weights_in)|intermediate\.dense)$", "fc1"),
            (r"(mlp\.(activation_fn|activation|act_fn)|intermediate_act_fn)$", "activation"),
            (r"(mlp\.(fc2|down_proj|weights_out)|layers?\.\d+\.output\.dense)$", "fc2"),
            (r"^(\w+\.)*(layernorm|norm)$", "norm_final"),
            (r"pooler\.dense$", "pooler"),
            (r"(class_labels_classifier|bbox_predictor)\.layers\.\d+$", "head"),
        ),
        block=r"(?<!classifier\.)(?<!predictor\.)\blayers?\.\d+$",
    )
)
